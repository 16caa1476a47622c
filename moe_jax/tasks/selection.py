"""Which tasks the user means."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.config.parse import located, suggest
from moe_jax.errors import ConfigError, DataError
from moe_jax.tasks.families import TASKS
from moe_jax.tasks.families.template import TEMPLATE_FILE, TemplateTask
from moe_jax.tasks.task import Task


def task_names() -> list[str]:
    """The tasks that a name is enough for."""
    return sorted(name for name, cls in TASKS.items() if cls is not TemplateTask)


def named_task(
    name: str,
    *,
    data: str | Path | None = None,
    path: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
) -> Task:
    """A task by its name.

    Args:
      name: see `task_names`; also that of a folder in `data` which holds a `template.txt`, as
        `families.template` describes it.
      data: a folder that has a folder of that name; None takes the hub's data.
      path: a file or folder with the task's rows, in place of those.
      split, limit, shots: see `Task`; None leaves the task's own.

    Raises:
      ConfigError: there is no such task, or a value is out of range.
      DataError: `data` has no folder for it.
    """
    known, own = task_names(), {}
    if data is not None:
        own = {f.parent.name: f for f in Path(data).expanduser().glob(f"*/{TEMPLATE_FILE}")}
    if name not in known and name not in own:
        hint = suggest(name, [*known, *own])
        raise ConfigError(f"task {name!r}: there is none of that name; {hint}")
    if name in known and name in own:
        raise ConfigError(
            f"{own[name]}: describes a task called {name!r}, which there is already; rename its "
            "folder"
        )
    if path is None and data is not None:
        folder = Path(data).expanduser() / name
        if not folder.parent.is_dir():
            raise DataError(f"{folder.parent}: no such folder; give one with a folder {name}")
        if not folder.is_dir():
            others = [other.name for other in folder.parent.glob("*") if other.is_dir()]
            raise DataError(f"{folder}: no such folder for the task; {suggest(name, others)}")
        path = folder
    fields: dict[str, Any] = {
        "path": None if path is None else str(path),
        "split": split,
        "limit": limit,
    }
    if shots is not None:
        fields["shots"] = shots
    if name in own:
        return make_task(TemplateTask, f"task {name!r}", template=str(own[name]), **fields)
    return make_task(TASKS[name], f"task {name!r}", **fields)


def own_task(
    template: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
) -> Task:
    """A user's own task; see `families.template`.

    Args:
      template: the text file that says how rows are asked; the task is called as it is.
      data: a file or folder with the rows.
      split, limit, shots: see `Task`.

    Raises:
      ConfigError: a value is out of range.
    """
    return make_task(
        TemplateTask,
        f"task {str(template)!r}",
        template=str(template),
        path=str(data),
        split=split,
        limit=limit,
        shots=shots or 0,
    )


def make_task(cls: type, where: str, **fields: Any) -> Task:
    """A task from its fields; what is wrong with one is said to stand in `where`."""
    with located(where):
        return cls(**fields)


def require_distinct(tasks: Sequence[Task]) -> None:
    """Refuses two tasks of one name: results go by the name."""
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"task {name!r}: is given twice; evaluate it once, or rename one")
