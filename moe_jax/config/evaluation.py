"""Evaluation of an adapter on tasks, by the run that trains it."""

from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config.parse import NONE_ADVICE, require

ProtocolName = Literal["labels", "choices"]
"""Protocols of evaluation: the label of an option, or the text of each option, is scored."""

_END_ONLY = "0 measures at the end only"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation of an adapter on tasks during and after training, as by `moe-jax evaluate`.

    Attributes:
      tasks: names of the tasks. Required. Their rows come from `tasks_folder`, or else the hub.
      every: steps between two evaluations during training. Default 0: at the end only, once all
        adapters have finished.
      limit: largest number of rows of each task, from its start. Default None: all rows.
      limit_between: the same for evaluations before the end. Default None: `limit`. A few hundred
        rows show the trend.
      protocols: scoring protocols. `labels` gives `label_acc`; `choices` gives `acc` and
        `acc_norm`. A task without labels is left out of `labels`. Default: both.
      split: split to evaluate. Default None: each task's own.
      shots: number of answered examples before each question. Default None: each task's own.
      batch_size: rows per forward pass, over all devices. Default 16; lower it if evaluation runs
        out of memory.
      row_length: tokens of a row, into which questions are packed. Default 256. Rows double in
        length until they hold the longest question; each length is one compilation.
      truncate: truncate prompts longer than the base's context at their start, in place of refusing
        them. Default False.
      with_base: evaluate the base model without an adapter too, at the end. Default False.
    """

    tasks: tuple[str, ...]
    every: int = field(default=0, metadata={NONE_ADVICE: _END_ONLY})
    limit: int | None = None
    limit_between: int | None = None
    protocols: tuple[ProtocolName, ...] = ("labels", "choices")
    split: str | None = None
    shots: int | None = None
    batch_size: int = 16
    row_length: int = 256
    truncate: bool = False
    with_base: bool = False

    def __post_init__(self):
        for field_name in ("tasks", "protocols"):
            names = getattr(self, field_name)
            require(bool(names), field_name, "is empty")
            repeated = sorted({name for name in names if names.count(name) > 1})
            require(not repeated, field_name, f"names {', '.join(repeated)} more than once")
        require(self.every >= 0, "every", f"must not be negative; {_END_ONLY}")
        for field_name in ("limit", "limit_between"):
            number = getattr(self, field_name)
            require(number is None or number > 0, field_name, "must be positive, or None for all")
        require(self.shots is None or self.shots >= 0, "shots", "must not be negative")
        require(self.batch_size > 0, "batch_size", "must be positive")
        require(self.row_length > 0, "row_length", "must be positive")
