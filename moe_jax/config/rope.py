"""Rotary position embedding of the base model."""

from dataclasses import dataclass
from typing import Literal

from moe_jax.config.parse import require

_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "proportional": (),
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, with the fields of the Hugging Face `rope_parameters`.

    Only the fields of the chosen `rope_type` are read; the others stay None. The types are those of
    transformers' `modeling_rope_utils`: `default` (RoFormer, arXiv:2104.09864), `linear` (position
    interpolation, arXiv:2306.15595), `dynamic` (NTK-aware), `yarn` (arXiv:2309.00071), `llama3`,
    `longrope` (arXiv:2402.13753) and `proportional` (Gemma 4).

    Attributes:
      rope_type: type of the embedding.
      rope_theta: base of the geometric series of wavelengths.
      factor: factor by which the context is extended, for `linear`, `dynamic`, `yarn`, `llama3`.
      original_max_position_embeddings: context in tokens before the extension.
      low_freq_factor, high_freq_factor: bounds of the interpolated band, for `llama3`.
      attention_factor: factor of the rotated channels, for `yarn` and `longrope`; None derives it.
      beta_fast, beta_slow: bounds of the interpolated band, for `yarn`.
      mscale, mscale_all_dim: terms of the attention factor, for `yarn`.
      truncate: round the bounds of the band to whole channels, for `yarn`.
      short_factor, long_factor: factor of the wavelength of each rotated pair of channels, for
        `longrope`, in rows up to `original_max_position_embeddings` and in longer rows.
      partial_rotary_factor: share of a head's channels that is rotated: from the first on, or for
        `proportional` the first pairs i and i + half, with the wavelengths of whole heads.
      interleaved: rotate channels 2i and 2i + 1 together, in place of i and i + half.
      llama_4_scaling_beta: b of the factor 1 + b log(1 + floor(p / L)) of the query at position p,
        with L the `original_max_position_embeddings`; None for no factor.
    """

    rope_type: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]
    rope_theta: float
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0
    interleaved: bool = False
    llama_4_scaling_beta: float | None = None

    def __post_init__(self):
        for field in _ROPE_NEEDS[self.rope_type]:
            require(
                getattr(self, field) is not None, field, f"rope_type {self.rope_type!r} needs it"
            )
        require(self.rope_theta > 1, "rope_theta", "must be greater than 1")
        require(self.factor is None or self.factor > 0, "factor", "must be positive")
        length = self.original_max_position_embeddings
        require(
            length is None or length > 0, "original_max_position_embeddings", "must be positive"
        )
        require(
            self.rope_type != "llama3" or self.low_freq_factor != self.high_freq_factor,
            "high_freq_factor",
            "must differ from low_freq_factor",
        )
        require(
            self.llama_4_scaling_beta is None or length is not None,
            "original_max_position_embeddings",
            "llama_4_scaling_beta needs it",
        )
        require(0 < self.partial_rotary_factor <= 1, "partial_rotary_factor", "must lie in (0, 1]")

    def rotary_dim(self, head_dim: int) -> int:
        """Number of channels of the rotary tables for a head of `head_dim`."""
        if self.rope_type == "proportional":
            return head_dim
        return int(head_dim * self.partial_rotary_factor)

    def check_head_dim(self, head_dim: int) -> None:
        """Refuses, with `require`, settings that do not fit heads of this width."""
        rotated = self.rotary_dim(head_dim)
        require(
            rotated > 0 and rotated % 2 == 0,
            "partial_rotary_factor",
            f"{self.partial_rotary_factor} of head_dim {head_dim} must be an even number of "
            f"channels, got {rotated}",
        )
        for field in ("short_factor", "long_factor"):
            factors = getattr(self, field)
            require(
                factors is None or len(factors) == rotated // 2,
                field,
                f"must have {rotated // 2} numbers, one for each rotated pair of channels",
            )
            require(factors is None or all(n > 0 for n in factors), field, "must be positive")
