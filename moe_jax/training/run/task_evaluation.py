"""What training asks of the evaluation of tasks, which stands above it and is handed in.

`moe_jax.evaluation.in_training.OnTasks` is what `train.py` hands in.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from moe_jax.config.run import RunConfig
from moe_jax.training.run.inputs import Inputs
from moe_jax.training.step.program import Program

_T = TypeVar("_T")

FOLDER = "evaluation"
"""Of a work directory: results of the evaluation at the end, and the answer to each question."""


class Stopped(Exception):
    """An evaluation was asked to stop before its end."""


class Share(Protocol):
    """A share of right answers."""

    @property
    def value(self) -> float: ...
    @property
    def standard_error(self) -> float: ...


Shares = Mapping[str, Share]
"""By `task/measure`."""


class Table(Protocol):
    """What came of the evaluation at the end; see `moe_jax.evaluation.results.Evaluation`."""

    def shares(self, model: str) -> Shares:
        """Of one of the adapters."""
        ...

    def to_markdown(self) -> str: ...

    def save(self, folder: Path) -> None: ...


class Evaluator(Protocol):
    """Asks the adapters of a run the questions of their tasks.

    Both methods raise `Stopped` soon after `stop` says so, and `ConfigError` where scores are not
    finite.
    """

    def measure(self, name: str, tree: Any, params: Any, stop: Callable[[], bool]) -> Shares:
        """One adapter while it trains.

        Args:
          name: of the adapter.
          tree: its weights, on the run's mesh.
          params: the base's, likewise.
          stop: whether to stop.
        """
        ...

    def finish(
        self,
        adapters: Mapping[str, Path],
        params: Any,
        folder: Path,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> Table:
        """All adapters at the end, from their final folders; goes on where it was stopped.

        Args:
          adapters: the folders.
          params: the base's weights, on the run's mesh.
          folder: gets the answer to each question.
          say: is told what goes on.
          stop: whether to stop.
        """
        ...


class EvaluationOfTasks(Protocol):
    """Makes an `Evaluator`."""

    def is_done(self, config: RunConfig, steps: Mapping[str, int], folder: Path) -> bool:
        """Whether `folder` has the results of the evaluation that `config` asks for at the end.

        Args:
          config: the run's configuration.
          steps: after which each adapter ended.
          folder: of the results.
        """
        ...

    def prepare(self, config: RunConfig, inputs: Inputs, program: Program) -> Evaluator:
        """Reads the tasks; needs no weights.

        Raises:
          ConfigError: tasks, protocols or adapters do not go together.
          DataError: the tasks' data cannot be used, or does not fit the base.
        """
        ...


def asks_for_tasks(config: RunConfig) -> bool:
    """Whether any adapter of `config` is to be measured on tasks."""
    return any(adapter.evaluation is not None for adapter in config.adapters.values())


def by_task(shares: Mapping[str, _T]) -> dict[str, dict[str, _T]]:
    """What is there by `task/measure`, by task and measure."""
    tasks: dict[str, dict[str, _T]] = {}
    for key, share in shares.items():
        task, _, measure = key.rpartition("/")
        tasks.setdefault(task, {})[measure] = share
    return tasks


def sentences(step: int, name: str, shares: Shares) -> list[str]:
    """The shares for people, a line for each task, in percent with one standard error."""
    lines = []
    for task, own in by_task(shares).items():
        texts = [
            f"{measure} {100 * share.value:.1f} ± {100 * share.standard_error:.1f}"
            for measure, share in own.items()
        ]
        lines.append(f"step {step}  evaluation {name}/{task}  {'  '.join(texts)}")
    return lines
