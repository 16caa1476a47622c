"""What the frozen base model is, and how it is computed."""

from dataclasses import dataclass
from typing import Literal

from moe_jax.config.parse import require

FloatType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; the fields of the Hugging Face `rope_parameters`.

    Only the fields of the chosen `rope_type` are read; the others stay None. The types are those of
    transformers' `modeling_rope_utils`: `default` (RoFormer, arXiv:2104.09864), `linear` (position
    interpolation, arXiv:2306.15595), `dynamic` (NTK-aware), `yarn` (arXiv:2309.00071) and `llama3`.
    """

    rope_type: Literal["default", "linear", "dynamic", "llama3", "yarn"]
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

    def __post_init__(self):
        needed = {
            "default": (),
            "linear": ("factor",),
            "dynamic": ("factor",),
            "yarn": ("factor",),
            "llama3": (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ),
        }[self.rope_type]
        for field in needed:
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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a Llama, as stated by its checkpoint; no value has a default here."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool

    def __post_init__(self):
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            require(getattr(self, field) > 0, field, "must be positive")
        require(self.head_dim > 0 and self.head_dim % 2 == 0, "head_dim", "must be even")
        require(
            self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"must divide num_heads ({self.num_heads})",
        )


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed; none of it changes what is computed beyond rounding.

    Attributes:
      dtype: type of activations and matrix products. Norms, rotary angles, routers, softmax and
        losses are float32 whatever this says.
      attention: `xla` runs everywhere; `cudnn` is the fused kernel of NVIDIA GPUs and needs a
        half-precision `dtype`.
      remat: what the backward pass recomputes, per decoder layer: `none` keeps everything, `dots`
        keeps the outputs of matrix products with weights, `full` keeps only the layer's input.
    """

    dtype: FloatType
    attention: Literal["xla", "cudnn"] = "xla"
    remat: Literal["none", "dots", "full"] = "none"

    def __post_init__(self):
        require(
            self.attention != "cudnn" or self.dtype != "float32",
            "attention",
            "'cudnn' needs compute.dtype 'bfloat16' or 'float16'",
        )
