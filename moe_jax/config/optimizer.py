"""Optimizer and learning-rate schedule of one adapter."""

import math
from dataclasses import dataclass
from typing import Literal

from moe_jax.config.parse import require


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning-rate schedule: linear warm-up from zero, then decay until the last step.

    Attributes:
      kind: shape of the decay: `linear`, `cosine`, or `constant` for no decay. Default `linear`.
      warmup_steps: optimizer steps of warm-up. Exclusive with `warmup_ratio`. Default None: no
        warm-up. Set it if the loss jumps in the first steps.
      warmup_ratio: warm-up as a share of all steps, in [0, 1). Default None.
      final_fraction: learning rate of the last step, as a fraction of the peak. Default 0.
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
        """Number of warm-up steps of a run of `total_steps`."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * total_steps)
        return self.warmup_steps or 0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer of one adapter.

    Attributes:
      learning_rate: peak learning rate of the schedule. Required; 1e-4 to 3e-4
        is usual for LoRA on large models.
      name: update rule: `adamw`, `sgd`, `adafactor` or `lion`. Default `adamw`. `adafactor` factors
        its moments only where the two widest axes of an array are both at least 128, which is rare
        in LoRA.
      schedule: see `ScheduleConfig`. Default: linear decay to 0, no warm-up.
      lora_plus_ratio: learning rate of every B divided by that of all other leaves (LoRA+,
        arXiv:2402.12354, section 4). Default 1. The authors use 16, with a smaller
        `learning_rate`. Metrics and plots show the learning rate of A.
      weight_decay: decoupled weight decay of A and B, scaled by the learning rate of each. Default
        0. Routers and DoRA's magnitudes are not decayed.
      b1: decay of the first moment, for `adamw` and `lion`, in [0, 1). Default 0.9.
      b2: decay of the second moment, in [0, 1). Default None: 0.999 for `adamw` and 0.99 for
        `lion`, as in their papers.
      eps: term added to the denominator of `adamw`. Default 1e-8.
      momentum: momentum of `sgd`, in [0, 1). Default 0.
      clip_norm: largest global norm of this adapter's gradient. Default 1; None does not clip.
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
        """`b2`, or its default for this optimizer."""
        usual = 0.99 if self.name == "lion" else 0.999
        return usual if self.b2 is None else self.b2
