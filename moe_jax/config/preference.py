"""Losses of preference training, chosen by name.

A preference adapter learns from pairs of a chosen and a rejected answer to one prompt, or from
unpaired feedback: single answers that are labeled desirable or undesirable.
The formulas are in `moe_jax.training.step.preference_loss`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from moe_jax.config.parse import Registry, require

PREFERENCES = Registry("preference loss")
"""Preference losses by the name that `preference.name` gives in a configuration."""

PreferenceSchema = Literal["preference", "feedback"]

Reference = Literal["base", "start"]

ROWS_PER_EXAMPLE = 2
"""Rows of a batch that an example of preference data takes, side by side."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Settings that all preference losses share.

    Attributes:
      beta: scale of the rewards, above 0. The default is that of the loss.
      sft_weight: weight of the cross-entropy of the chosen answers, in nats per token, which is
        added to the loss. Default 0, and 1 for `orpo`.
      keep_best: measure of the validation sets that `best/NAME` is chosen by: the lowest mean
        `loss`, or the highest mean `accuracy` and among equal ones the lowest loss. Default `loss`.
    """

    registry: ClassVar[Registry] = PREFERENCES
    schema: ClassVar[PreferenceSchema] = "preference"
    """Schema of the data: pairs, or single answers with a label."""

    estimates_kl: ClassVar[bool] = False
    """True for a loss of single answers that compares with an estimate of KL, as `kto` does."""

    beta: float = 0.1
    sft_weight: float = 0.0
    keep_best: Literal["loss", "accuracy"] = "loss"

    def __post_init__(self):
        require(self.beta > 0, "beta", "must be above 0")
        require(self.sft_weight >= 0, "sft_weight", "must not be negative")

    @property
    def answers_per_example(self) -> int:
        """Rows of an example that are learned: both of a pair, or the single answer."""
        return 1 if self.schema == "feedback" else ROWS_PER_EXAMPLE

    @property
    def cached_reference(self) -> Reference | None:
        """The reference if it scores the answers before the first step; else None."""
        return None

    @property
    def step_reference(self) -> Reference | None:
        """The reference if it scores the answers in each step; else None."""
        return None

    def check_adapter(
        self, batch_size: int, start_from: str | None, new_tokens: Sequence[str]
    ) -> None:
        """Refuses, with `require`, fields of the adapter that do not fit."""


@dataclass(frozen=True, kw_only=True)
class ReferencedPreferenceConfig(PreferenceConfig):
    """Settings of the losses that compare with a reference model.

    Attributes:
      reference: the reference model. `base`: the base without the adapter. `start`: the adapter of
        `start_from`, frozen. Neither needs a second copy of the base. Default `base`.
      reference_log_probs: when the reference scores the answers. `cached`: all of them before the
        first step; the scores are cached with the data, and runs of the same base and reference
        read them. `step`: those of a batch in each step, which costs a forward pass. Default
        `cached`; choose `step` for runs that end long before the first pass over the data.
    """

    reference: Reference = "base"
    reference_log_probs: Literal["cached", "step"] = "cached"

    @property
    def cached_reference(self) -> Reference | None:
        return self.reference if self.reference_log_probs == "cached" else None

    @property
    def step_reference(self) -> Reference | None:
        return self.reference if self.reference_log_probs == "step" else None

    def check_adapter(
        self, batch_size: int, start_from: str | None, new_tokens: Sequence[str]
    ) -> None:
        require(
            self.reference != "start" or start_from is not None,
            "preference.reference",
            "'start' is the adapter of start_from, which is not given; give it, or use 'base'",
        )
        require(
            self.reference != "base" or not new_tokens,
            "preference.reference",
            "'base' has no embeddings of method.new_tokens; use 'start', or leave the tokens out",
        )


@PREFERENCES.register("dpo")
@dataclass(frozen=True, kw_only=True)
class DpoConfig(ReferencedPreferenceConfig):
    """Direct preference optimization (Rafailov et al., arXiv:2305.18290, equation 7).

    Attributes:
      loss_type: function of the margin of the rewards. `sigmoid`: that of the paper. `hinge`: of
        SLiC (arXiv:2305.10425). `ipo`: identity preference optimization (arXiv:2310.12036, equation
        17), with log-probabilities divided by the lengths of the answers. Default `sigmoid`.
      label_smoothing: probability that chosen and rejected are swapped in the data, in [0, 0.5);
        for `sigmoid` alone (conservative DPO: Mitchell, A note on DPO with noisy preferences and
        relationship to IPO, 2023, equation 3). Default 0.
    """

    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", "must lie in [0, 0.5)")
        require(
            self.label_smoothing == 0 or self.loss_type == "sigmoid",
            "label_smoothing",
            f"is for loss_type 'sigmoid', not {self.loss_type!r}; leave it out",
        )


@PREFERENCES.register("orpo")
@dataclass(frozen=True, kw_only=True)
class OrpoConfig(PreferenceConfig):
    """Odds ratio preference optimization (Hong et al., arXiv:2403.07691, equations 6 and 7).

    The cross-entropy of the chosen answers is part of the loss: `sft_weight` is 1. `beta`, lambda
    in the paper, is the weight of the odds ratio.
    """

    sft_weight: float = 1.0


@PREFERENCES.register("simpo")
@dataclass(frozen=True, kw_only=True)
class SimpoConfig(PreferenceConfig):
    """Simple preference optimization (Meng et al., arXiv:2405.14734, equation 6).

    Attributes:
      beta: scale of the rewards. Default 2, the authors' for base models (2.5 for instruct models).
      gamma: least margin of the rewards, not negative. Default 1, half of `beta`: the authors'
        ratio for the base model Llama-3-8B.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(self.gamma >= 0, "gamma", "must not be negative")


@PREFERENCES.register("kto")
@dataclass(frozen=True, kw_only=True)
class KtoConfig(ReferencedPreferenceConfig):
    """Kahneman-Tversky optimization (Ethayarajh et al., arXiv:2402.01306, equation 8).

    Its data has the schema `feedback`: single answers, labeled desirable or undesirable.

    Attributes:
      desirable_weight: weight of the desirable answers. Default 1.
      undesirable_weight: weight of the undesirable answers. Default 1. If one label is rarer,
        raise its weight, so that weight times number differ by at most a factor
        of 4/3 (section 4.2).
    """

    schema: ClassVar[PreferenceSchema] = "feedback"
    estimates_kl: ClassVar[bool] = True

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("desirable_weight", "undesirable_weight"):
            require(getattr(self, name) > 0, name, "must be above 0")

    def check_adapter(
        self, batch_size: int, start_from: str | None, new_tokens: Sequence[str]
    ) -> None:
        super().check_adapter(batch_size, start_from, new_tokens)
        require(
            batch_size > ROWS_PER_EXAMPLE,
            "batch_size",
            "'kto' estimates KL over the examples of a batch; give at least 4 rows",
        )
