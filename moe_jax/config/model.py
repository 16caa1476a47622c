"""Architecture of the frozen base model, and settings of its computation."""

from dataclasses import dataclass
from typing import Literal

from moe_jax.config.parse import field_prefix, require

FloatType = Literal["float32", "bfloat16", "float16"]
StorageType = Literal["float32", "bfloat16", "float16", "int8", "fp8", "nf4", "nf4_double"]
"""Storage types of frozen parameters.

A quantized type applies to the kernels of the decoder layers' projections; the other parameters
(embedding, head, norms, biases) are then bfloat16.
"""

LayerType = Literal["full_attention", "sliding_attention"]

_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, with the fields of the Hugging Face `rope_parameters`.

    Only the fields of the chosen `rope_type` are read; the others stay None. The types are those of
    transformers' `modeling_rope_utils`: `default` (RoFormer, arXiv:2104.09864), `linear` (position
    interpolation, arXiv:2306.15595), `dynamic` (NTK-aware), `yarn` (arXiv:2309.00071), `llama3` and
    `longrope` (arXiv:2402.13753).

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
      partial_rotary_factor: share of a head's channels, from the first on, that is rotated.
      interleaved: rotate channels 2i and 2i + 1 together, in place of i and i + half.
    """

    rope_type: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
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
        require(0 < self.partial_rotary_factor <= 1, "partial_rotary_factor", "must lie in (0, 1]")

    def rotary_dim(self, head_dim: int) -> int:
        """Number of rotated channels of a head of `head_dim`."""
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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder-only language model, read from its checkpoint.

    Sizes and constants that all models have are required. The fields from `model_type` on exist in
    some families only; their defaults mean that the model does not have the feature.

    Attributes:
      vocab_size: number of token ids.
      hidden_size: width of the model, D.
      intermediate_size: width of the FFN, F.
      num_layers: number of decoder layers.
      num_heads: number of query heads.
      num_kv_heads: number of key and value heads.
      head_dim: channels of a head.
      hidden_act: activation of the FFN.
      max_position_embeddings: context in tokens.
      rms_norm_eps: term added to the mean square in RMS norms.
      rope: rotary position embedding.
      attention_bias: all four attention projections have a bias.
      mlp_bias: all three FFN projections have a bias.
      tie_word_embeddings: the head uses the weights of the embedding.
      model_type: model family, as in `config.json`; it decides the names of the tensors.
      qkv_bias: the query, key and value projections have a bias, and the output projection does
        not.
      qk_norm: query and key heads are normalized before they are rotated (arXiv:2302.05442).
      post_norms: the outputs of attention and FFN are normalized before they are added.
      norm_unit_offset: norms scale by one plus their weight.
      scale_embeddings: token embeddings are multiplied by sqrt(hidden_size).
      query_pre_attn_scalar: number whose square root divides attention scores; None is `head_dim`.
      attn_logit_softcapping: c of the soft cap c tanh(s / c) of attention scores s.
      final_logit_softcapping: c of the same soft cap of the logits over the vocabulary.
      sliding_window: number of positions, including its own, that a token of a sliding layer
        attends to.
      layer_types: kind of attention of each layer; None if no layer slides.
      sliding_rope: rotary embedding of the sliding layers, if it differs from `rope`.
    """

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
    model_type: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_unit_offset: bool = False
    scale_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] | None = None
    sliding_rope: RopeConfig | None = None

    def __post_init__(self):
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            require(getattr(self, field) > 0, field, "must be positive")
        require(self.head_dim > 0 and self.head_dim % 2 == 0, "head_dim", "must be even")
        require(
            self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"must divide num_heads ({self.num_heads})",
        )
        require(
            not (self.attention_bias and self.qkv_bias), "qkv_bias", "is part of attention_bias"
        )
        for field in (
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "sliding_window",
        ):
            value = getattr(self, field)
            require(value is None or value > 0, field, "must be positive")
        with field_prefix("rope"):
            self.rope.check_head_dim(self.head_dim)
        self._check_layers()

    def _check_layers(self) -> None:
        types = self.layer_types
        require(
            types is None or len(types) == self.num_layers,
            "layer_types",
            f"must name the kind of attention of each of the {self.num_layers} layers",
        )
        slides = types is not None and "sliding_attention" in types
        require(types is None or slides, "layer_types", "names no sliding layer; leave it out")
        require(
            slides == (self.sliding_window is not None),
            "sliding_window",
            "requires layer_types with sliding layers",
        )
        local = self.sliding_rope
        if local is not None:
            require(slides, "sliding_rope", "requires layer_types with sliding layers")
            with field_prefix("sliding_rope"):
                local.check_head_dim(self.head_dim)
                require(
                    (local.rotary_dim(self.head_dim), local.interleaved)
                    == (self.rope.rotary_dim(self.head_dim), self.rope.interleaved),
                    "partial_rotary_factor",
                    "must rotate the same channels as rope",
                )

    @property
    def sliding_layers(self) -> tuple[bool, ...]:
        """True for each layer with sliding attention."""
        types = self.layer_types or ("full_attention",) * self.num_layers
        return tuple(kind == "sliding_attention" for kind in types)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Settings of the computation; they change results by no more than rounding.

    Attributes:
      dtype: dtype of activations and matrix products: `float32`, `bfloat16` or `float16`. Required;
        `bfloat16` on accelerators. Norms, rotary angles, routers, softmax and losses are always
        float32.
      attention: attention kernel. `xla` runs everywhere; `cudnn` is the fused kernel of NVIDIA GPUs
        and needs a half-precision `dtype`. The memory of both grows linearly with a row's length,
        except that packed rows take two bytes for each pair of positions with `cudnn`. Default
        `xla`.
      remat: values that a decoder layer keeps for its backward pass, which computes the others
        again. `none` keeps all values. `dots` keeps the outputs of matrix products with weights.
        `frozen` keeps the products of frozen projections and the low-rank activations of adapters,
        so that no large product is computed again (`benchmarks/remat.md`: half of the memory of
        `dots` for 1% more work). `narrow` is as `frozen`, without FFN-wide products. `full`
        keeps the layer's input alone. Default `frozen`; use `narrow` or `full` if a step runs out
        of memory.
    """

    dtype: FloatType
    attention: Literal["xla", "cudnn"] = "xla"
    remat: Literal["none", "dots", "frozen", "narrow", "full"] = "frozen"

    def __post_init__(self):
        require(
            self.attention != "cudnn" or self.dtype != "float32",
            "attention",
            "'cudnn' needs compute.dtype 'bfloat16' or 'float16'",
        )

    def check_model(self, model: ModelConfig) -> None:
        """Refuses, with `require`, settings that do not support this model."""
        require(
            self.attention != "cudnn" or model.attn_logit_softcapping is None,
            "attention",
            "'cudnn' cannot cap attention scores, as this model does "
            f"(attn_logit_softcapping {model.attn_logit_softcapping}); use 'xla'",
        )
