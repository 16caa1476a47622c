"""What the frozen base model is, and how it is computed."""

from dataclasses import dataclass
from typing import Literal

from moe_jax.config.parse import require, within

FloatType = Literal["float32", "bfloat16", "float16"]
StorageType = Literal["float32", "bfloat16", "float16", "int8", "fp8", "nf4", "nf4_double"]
"""How frozen parameters are kept. Quantised are the kernels of the decoder layers' projections;
what is beside them (embedding, head, norms, biases) is bfloat16 then."""

LayerType = Literal["full_attention", "sliding_attention"]

_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
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
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; the fields of the Hugging Face `rope_parameters`.

    Only the fields of the chosen `rope_type` are read; the others stay None. The types are those of
    transformers' `modeling_rope_utils`: `default` (RoFormer, arXiv:2104.09864), `linear` (position
    interpolation, arXiv:2306.15595), `dynamic` (NTK-aware), `yarn` (arXiv:2309.00071), `llama3` and
    `longrope` (arXiv:2402.13753).

    Attributes:
      short_factor, long_factor: of `longrope`, what the wavelength of each rotated pair of channels
        is multiplied by in rows up to `original_max_position_embeddings`, and in longer ones.
      partial_rotary_factor: share of a head's channels, from the first on, that is rotated.
      interleaved: channels 2i and 2i + 1 turn together, and not i and i + half.
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
        """How many channels of a head of `head_dim` are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    def check_head_dim(self, head_dim: int) -> None:
        """Refuses, with `require`, what does not fit heads of this width."""
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
    """The architecture of a decoder-only language model, as stated by its checkpoint.

    No size, constant or choice that all models have has a default here. The fields from
    `model_type` on say what only some families have; their defaults mean that it is not there.

    Attributes:
      attention_bias: all four attention projections have a bias.
      mlp_bias: all three FFN projections have a bias.
      model_type: the family, as in `config.json`; it names the checkpoint's tensors.
      qkv_bias: the query, key and value projections have a bias, and the output one has none.
      qk_norm: each query and key head is normalised before it is rotated (arXiv:2302.05442).
      post_norms: the outputs of attention and FFN are normalised too, before they are added.
      norm_unit_offset: norms scale by one plus their weight.
      scale_embeddings: token embeddings are multiplied by sqrt(hidden_size).
      query_pre_attn_scalar: attention scores are divided by its square root; None is `head_dim`.
      attn_logit_softcapping: c, where attention scores s become c tanh(s / c).
      final_logit_softcapping: the same for the logits over the vocabulary.
      sliding_window: how many positions, itself included, a token of a sliding layer sees.
      layer_types: each layer's kind of attention; None if no layer slides.
      sliding_rope: rotary embedding of the sliding layers, where it is not `rope`.
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
        with within("rope"):
            self.rope.check_head_dim(self.head_dim)
        self._check_layers()

    def _check_layers(self) -> None:
        types = self.layer_types
        require(
            types is None or len(types) == self.num_layers,
            "layer_types",
            f"must name a kind for each of the {self.num_layers} layers",
        )
        slides = types is not None and "sliding_attention" in types
        require(types is None or slides, "layer_types", "leave it out where no layer slides")
        require(
            slides == (self.sliding_window is not None),
            "sliding_window",
            "goes with layer_types that name sliding layers",
        )
        local = self.sliding_rope
        if local is not None:
            require(slides, "sliding_rope", "goes with layer_types that name sliding layers")
            with within("sliding_rope"):
                local.check_head_dim(self.head_dim)
                require(
                    (local.rotary_dim(self.head_dim), local.interleaved)
                    == (self.rope.rotary_dim(self.head_dim), self.rope.interleaved),
                    "partial_rotary_factor",
                    "must rotate the same channels as rope",
                )

    @property
    def sliding_layers(self) -> tuple[bool, ...]:
        """Whether each layer slides."""
        types = self.layer_types or ("full_attention",) * self.num_layers
        return tuple(kind == "sliding_attention" for kind in types)


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed; none of it changes what is computed beyond rounding.

    Attributes:
      dtype: type of activations and matrix products. Norms, rotary angles, routers, softmax and
        losses are float32 whatever this says.
      attention: `xla` runs everywhere; `cudnn` is the fused kernel of NVIDIA GPUs and needs a
        half-precision `dtype`. The memory of both grows with a row's length and not its square, but
        for the segment ids of packed rows, which `cudnn` wants as two bytes for each pair of
        positions.
      remat: what a decoder layer keeps for its backward pass, which computes the rest again. `none`
        keeps everything; `dots` the outputs of matrix products with weights; `frozen` the frozen
        projections' products and the adapters' rank-sized codes, which spares all large products
        (`benchmarks/remat.md`: half of `dots`' memory for 1% more work);
        `narrow` of these only what is not as wide as the FFN; `full` the layer's input alone.
      block_tokens: tokens whose experts' hidden activations the backward pass computes at a time.
        None leaves it to the platform: on a CPU what its cache holds, elsewhere all. Where no
        divisor of a device's number of tokens comes near, all of them.
    """

    dtype: FloatType
    attention: Literal["xla", "cudnn"] = "xla"
    remat: Literal["none", "dots", "frozen", "narrow", "full"] = "frozen"
    block_tokens: int | None = None

    def __post_init__(self):
        require(
            self.block_tokens is None or self.block_tokens > 0, "block_tokens", "must be positive"
        )
        require(
            self.attention != "cudnn" or self.dtype != "float32",
            "attention",
            "'cudnn' needs compute.dtype 'bfloat16' or 'float16'",
        )

    def check_model(self, model: ModelConfig) -> None:
        """Refuses, with `require`, settings that cannot compute this model."""
        require(
            self.attention != "cudnn" or model.attn_logit_softcapping is None,
            "attention",
            f"'cudnn' cannot cap attention scores, which this model does "
            f"(attn_logit_softcapping {model.attn_logit_softcapping}); use 'xla'",
        )
