"""Optimiser and learning-rate schedule of one adapter."""

import math
from dataclasses import dataclass
from typing import Literal

from moe_jax.config.parse import require


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up from zero, then decay from the peak to `final_fraction` of it at the last step.

    Attributes:
      kind: `constant` does not decay.
      warmup_steps: optimiser steps of linear warm-up; exclusive with `warmup_ratio`.
      warmup_ratio: the same as a share of all steps.
      final_fraction: where the decay ends, as a fraction of the peak learning rate.
    """

    kind: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    final_fraction: float = 0.0

    def __post_init__(self):
        require(
            self.warmup_steps is None or self.warmup_ratio is None,
            "warmup_ratio",
            "give warmup_steps or warmup_ratio, not both",
        )
        require((self.warmup_steps or 0) >= 0, "warmup_steps", "must not be negative")
        require(0.0 <= (self.warmup_ratio or 0.0) < 1.0, "warmup_ratio", "must lie in [0, 1)")
        require(0.0 <= self.final_fraction <= 1.0, "final_fraction", "must lie in [0, 1]")

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up out of `total_steps`."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * total_steps)
        return self.warmup_steps or 0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimiser of one adapter.

    Attributes:
      name: which rule. `adafactor` factors its moments only where an array's two widest axes are
        both 128 or more, which LoRA's rarely are.
      b1: decay of the first moment, of `adamw` and `lion`.
      b2: decay of the second moment; None is what the papers use, 0.999 for `adamw` and 0.99 for
        `lion`.
      eps: of `adamw`.
      momentum: of `sgd`.
      learning_rate: the peak of the schedule.
      lora_plus_ratio: the learning rate of every B is this times that of all other leaves (LoRA+,
        arXiv:2402.12354, section 4; its authors use 16, with a smaller `learning_rate`). Learning
        rates in metrics and plots are those of A.
      weight_decay: decoupled decay of A and B, by each one's own learning rate. Routers and DoRA's
        magnitudes are not decayed.
      clip_norm: largest global norm of this adapter's gradient; None does not clip.
    """

    learning_rate: float
    name: Literal["adamw", "sgd", "adafactor", "lion"] = "adamw"
    schedule: ScheduleConfig = ScheduleConfig()
    lora_plus_ratio: float = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float | None = None
    eps: float = 1e-8
    momentum: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self):
        require(self.learning_rate > 0, "learning_rate", "must be positive")
        require(self.lora_plus_ratio > 0, "lora_plus_ratio", "must be positive")
        require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        for name in ("b1", "b2", "momentum"):
            require(0.0 <= (getattr(self, name) or 0.0) < 1.0, name, "must lie in [0, 1)")
        require(self.eps > 0, "eps", "must be positive")
        require(
            self.clip_norm is None or self.clip_norm > 0, "clip_norm", "must be positive or None"
        )

    @property
    def second_decay(self) -> float:
        """`b2`, or what it stands for."""
        usual = 0.99 if self.name == "lion" else 0.999
        return usual if self.b2 is None else self.b2
