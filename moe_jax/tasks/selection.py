"""Tasks by name, and tasks from a template file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_jax.config.parse import located, suggest
from moe_jax.errors import ConfigError, DataError
from moe_jax.tasks.families import TASKS
from moe_jax.tasks.families.template import TEMPLATE_FILE, TemplateTask
from moe_jax.tasks.task import Task


def task_names() -> list[str]:
    """Names of the registered tasks, sorted."""
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
    """Creates a task from its name.

    Args:
      name: a name of `task_names`, or of a folder in `data` with a `template.txt` (see
        `families.template`).
      data: folder with a folder of rows for each task; None reads them from the hub.
      path: file or folder with the rows of this task, in place of those.
      split, limit, shots: see `Task`; None leaves the task's default.

    Raises:
      ConfigError: there is no such task, or a value is out of range.
      DataError: `data` has no folder for the task.
    """
    known, templates = task_names(), {}
    if data is not None:
        templates = {f.parent.name: f for f in Path(data).expanduser().glob(f"*/{TEMPLATE_FILE}")}
    if name not in known and name not in templates:
        hint = suggest(name, [*known, *templates])
        raise ConfigError(f"task {name!r}: unknown task; {hint}")
    if name in known and name in templates:
        raise ConfigError(
            f"{templates[name]}: the name {name!r} of this task is taken by a registered task; "
            "rename its folder"
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
    if name in templates:
        return make_task(TemplateTask, f"task {name!r}", template=str(templates[name]), **fields)
    return make_task(TASKS[name], f"task {name!r}", **fields)


def template_task(
    template: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
) -> Task:
    """Creates a task from a template file; see `families.template`.

    Args:
      template: template file, after which the task is named.
      data: file or folder with the rows.
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
    """Creates a task from its fields; messages about an invalid field begin with `where`."""
    with located(where):
        return cls(**fields)


def require_distinct(tasks: Sequence[Task]) -> None:
    """Refuses two tasks of the same name, which is the key of their results."""
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"task {name!r}: is given twice; remove or rename one")
