"""How an adapter is measured on tasks, during training and at its end."""

from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config.parse import NOT_NONE, require

Asking = Literal["labels", "choices"]

_NOT_BETWEEN = "0 measures at the end only"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The tasks that an adapter is measured on, as by `moe-jax evaluate`.

    Attributes:
      tasks: their names. Their rows are those of `tasks_folder`, or else of the hub.
      every: steps between two measurements while training; 0 measures at the end only, once all
        adapters have finished.
      limit: only so many of each task's first rows.
      limit_between: the same for the measurements before the end; None is `limit`.
      protocols: how the tasks are asked. `labels` gives `label_acc`, `choices` gives `acc` and
        `acc_norm`. A task that a protocol does not fit is left out of it.
      split: another split than each task's own.
      shots: answered examples before each question; None leaves each task's own number.
      batch_size: sequences computed at once, over all devices.
      buckets: ascending lengths that sequences are padded to; by default 32, 64, ... The base's
        context is always the last one. Each is one compilation.
      truncate: cuts the start off a prompt longer than the base's context, which is refused else.
      with_base: at the end, the base without an adapter is measured on these tasks too.
    """

    tasks: tuple[str, ...]
    every: int = field(default=0, metadata={NOT_NONE: _NOT_BETWEEN})
    limit: int | None = None
    limit_between: int | None = None
    protocols: tuple[Asking, ...] = ("labels", "choices")
    split: str | None = None
    shots: int | None = None
    batch_size: int = 16
    buckets: tuple[int, ...] = ()
    truncate: bool = False
    with_base: bool = False

    def __post_init__(self):
        for given in ("tasks", "protocols"):
            names = getattr(self, given)
            require(bool(names), given, "names none")
            repeated = sorted({name for name in names if names.count(name) > 1})
            require(not repeated, given, f"names {', '.join(repeated)} more than once")
        require(self.every >= 0, "every", f"must not be negative; {_NOT_BETWEEN}")
        for given in ("limit", "limit_between"):
            number = getattr(self, given)
            require(number is None or number > 0, given, "must be positive, or None for all")
        require(self.shots is None or self.shots >= 0, "shots", "must not be negative")
        require(self.batch_size > 0, "batch_size", "must be positive")
        ascends = list(self.buckets) == sorted(set(self.buckets))
        require(ascends and all(b > 0 for b in self.buckets), "buckets", "must ascend strictly")
