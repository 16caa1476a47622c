"""Architecture of the frozen base model, and settings of its computation."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from moe_jax.config.attention import (
    ATTENTIONS,
    FFN,
    GLOBAL_ATTENTION,
    LINEAR_ATTENTION,
    READERS,
    SELF_ATTENTION,
    WIDE_FFN,
    DeltaNetConfig,
    GlobalAttentionConfig,
)
from moe_jax.config.parse import field_prefix, require
from moe_jax.config.rope import RopeConfig

FloatType = Literal["float32", "bfloat16", "float16"]
StorageType = Literal["float32", "bfloat16", "float16", "int8", "fp8", "nf4", "nf4_double"]
"""Storage types of frozen parameters.

A quantized type applies to the kernels of the decoder layers' projections; the other parameters
(embedding, head, norms, biases) are then bfloat16.
"""

LayerType = Literal["full_attention", "sliding_attention", "linear_attention"]

NormalizedQK = Literal["head", "projection", "rotated_head"]

MAX_LAYERS = 10_000
"""Largest number of decoder layers, far above that of any model; one of 2**31 would fill memory."""

_WIDEST_FUSED_HEAD = 256
"""Largest `head_dim` of cuDNN's attention."""

_PLAIN: dict[str, Any] = {
    "global_attention": None,
    "num_reader_layers": 0,
    "reader_ffn_width": None,
    "layer_embedding_width": None,
}
"""Fields of a model whose layers are alike."""


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
      rms_norm_eps: term added to the mean square in norms.
      rope: rotary position embedding.
      attention_bias: all four attention projections have a bias.
      mlp_bias: all three FFN projections have a bias.
      tie_word_embeddings: the head uses the weights of the embedding.
      model_type: model family, as in `config.json`; it decides the names of the tensors.
      qkv_bias: the query, key and value projections have a bias, and the output projection does
        not.
      qk_norm: queries and keys are normalized (arXiv:2302.05442).
      qk_norm_of: what `qk_norm` normalizes: each head (`head`) or the whole projection
        (`projection`) before they are rotated, or each head after that (`rotated_head`).
      pre_norms: the inputs of attention and FFN are normalized, as in Llama.
      post_norms: the outputs of attention and FFN are normalized before they are added.
      parallel_block: the FFN reads the input of attention, and both outputs are added to it.
      norm_centered: norms subtract the mean first, which makes them layer norms without a bias
        (arXiv:1607.06450).
      norm_unit_offset: norms scale by one plus their weight.
      scale_embeddings: token embeddings are multiplied by sqrt(hidden_size).
      embedding_multiplier: another factor of token embeddings.
      residual_multiplier: factor of the outputs of attention and FFN before they are added.
      logit_scale: factor of the logits over the vocabulary, before their soft cap.
      query_pre_attn_scalar: number whose square root divides attention scores; None is `head_dim`.
      attn_logit_softcapping: c of the soft cap c tanh(s / c) of attention scores s.
      final_logit_softcapping: c of the same soft cap of the logits over the vocabulary.
      sliding_window: number of positions, including its own, that a token of a sliding layer
        attends to.
      layer_types: kind of attention of each layer; None if all layers have full attention.
      sliding_rope: rotary embedding of the sliding layers, if it differs from `rope`.
      rotated_layers: True for each layer that rotates queries and keys, False for layers without
        positions (NoPE, arXiv:2305.19466); None if all layers rotate them.
      attention_gate: the output of attention is multiplied by the sigmoid of a gate, which the
        query projection computes too (arXiv:2505.06708).
      delta_net: sizes of the layers with linear attention; None if there are none.
      global_attention: sizes of the layers with full attention if they differ from those of sliding
        layers, which `num_kv_heads` and `head_dim` then are.
      key_as_value: see `GlobalAttentionConfig`.
      value_norm: values are divided by their root mean square.
      layer_scale: the output of each layer is multiplied by a number.
      num_reader_layers: number of last layers that have no keys and values of their own, and attend
        to those of the last layer before them with the same kind of attention.
      reader_ffn_width: width of the FFN in these layers, if it differs.
      layer_embedding_width: channels of the embedding that each layer has of a token, besides that
        of the model (Gemma 3n and 4); None without them.
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
    qk_norm_of: NormalizedQK = "head"
    pre_norms: bool = True
    post_norms: bool = False
    parallel_block: bool = False
    norm_centered: bool = False
    norm_unit_offset: bool = False
    scale_embeddings: bool = False
    embedding_multiplier: float | None = None
    residual_multiplier: float | None = None
    logit_scale: float | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] | None = None
    sliding_rope: RopeConfig | None = None
    rotated_layers: tuple[bool, ...] | None = None
    attention_gate: bool = False
    delta_net: DeltaNetConfig | None = None
    global_attention: GlobalAttentionConfig | None = None
    key_as_value: bool = False
    value_norm: bool = False
    layer_scale: bool = False
    num_reader_layers: int = 0
    reader_ffn_width: int | None = None
    layer_embedding_width: int | None = None

    def __post_init__(self):
        require(self.num_layers <= MAX_LAYERS, "num_layers", f"must be at most {MAX_LAYERS:,}")
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
        require(
            not (self.scale_embeddings and self.embedding_multiplier is not None),
            "embedding_multiplier",
            "contradicts scale_embeddings",
        )
        for field in (
            "embedding_multiplier",
            "residual_multiplier",
            "logit_scale",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "sliding_window",
            "reader_ffn_width",
            "layer_embedding_width",
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
        linear = types is not None and "linear_attention" in types
        require(
            types is None or slides or linear,
            "layer_types",
            "names full attention only; leave it out",
        )
        require(
            linear == (self.delta_net is not None),
            "delta_net",
            "requires layer_types with linear attention",
        )
        require(
            not linear or set(types or ()) != {"linear_attention"},
            "layer_types",
            "names linear attention only; at least one layer must have full attention",
        )
        require(
            slides == (self.sliding_window is not None),
            "sliding_window",
            "requires layer_types with sliding layers",
        )
        rotated = self.rotated_layers
        require(
            rotated is None or len(rotated) == self.num_layers,
            "rotated_layers",
            f"must say of each of the {self.num_layers} layers whether it rotates",
        )
        self._check_global_attention()
        local = self.sliding_rope
        if local is not None:
            require(slides, "sliding_rope", "requires layer_types with sliding layers")
            with field_prefix("sliding_rope"):
                local.check_head_dim(self.head_dim)
                require(
                    self.global_attention is not None
                    or (local.rotary_dim(self.head_dim), local.interleaved)
                    == (self.rope.rotary_dim(self.head_dim), self.rope.interleaved),
                    "partial_rotary_factor",
                    "must rotate the same channels as rope",
                )

    def _check_global_attention(self) -> None:
        sizes = self.global_attention
        if sizes is None:
            for field in ("num_reader_layers", "layer_embedding_width"):
                require(not getattr(self, field), field, "requires global_attention")
            return
        types = self.layer_types or ()
        require(
            0 <= self.num_reader_layers < self.num_layers
            and set(types[: self.num_layers - self.num_reader_layers]) == set(types),
            "num_reader_layers",
            "each kind of attention must be that of an earlier layer too",
        )
        require(
            self.num_reader_layers > 0 or self.reader_ffn_width is None,
            "reader_ffn_width",
            "requires num_reader_layers",
        )
        require(
            set(self.layer_types or ()) == {"sliding_attention", "full_attention"},
            "global_attention",
            "requires layer_types with sliding and full attention",
        )
        with field_prefix("global_attention"):
            require(
                self.num_heads % sizes.num_kv_heads == 0,
                "num_kv_heads",
                f"must divide num_heads ({self.num_heads})",
            )

    @property
    def sliding_layers(self) -> tuple[bool, ...]:
        """True for each layer with sliding attention."""
        types = self.layer_types or ("full_attention",) * self.num_layers
        return tuple(kind == "sliding_attention" for kind in types)

    @property
    def has_equal_layers(self) -> bool:
        """True if all layers have the same modules."""
        return self.delta_net is None and self.global_attention is None

    def attention_module(self, layer: int) -> str:
        """Name of the module of a layer's attention."""
        kind = "full_attention" if self.layer_types is None else self.layer_types[layer]
        if kind == "linear_attention":
            return LINEAR_ATTENTION
        is_global = kind == "full_attention" and self.global_attention is not None
        name = GLOBAL_ATTENTION if is_global else SELF_ATTENTION
        return READERS[name] if layer in self.reader_layers else name

    def ffn_module(self, layer: int) -> str:
        """Name of the module of a layer's FFN."""
        is_wide = self.reader_ffn_width is not None and layer in self.reader_layers
        return WIDE_FFN if is_wide else FFN

    def layers_with(self, module: str) -> tuple[int, ...]:
        """Indices of the layers that have a module, such as `mlp`.

        Stacked variables of the module are those of these layers, in this order.
        """
        layers = range(self.num_layers)
        if module in ATTENTIONS:
            return tuple(layer for layer in layers if self.attention_module(layer) == module)
        if module in (FFN, WIDE_FFN):
            return tuple(layer for layer in layers if self.ffn_module(layer) == module)
        return tuple(layers)

    @property
    def reader_layers(self) -> range:
        """Indices of the layers that attend to keys and values of earlier layers."""
        return range(self.num_layers - self.num_reader_layers, self.num_layers)

    @property
    def has_readers(self) -> bool:
        """True if some layers attend to keys and values of earlier ones."""
        return self.num_reader_layers > 0

    @property
    def has_wide_ffn(self) -> bool:
        """True if some layers have an FFN of another width."""
        return self.reader_ffn_width is not None

    @property
    def has_layer_embeddings(self) -> bool:
        """True if each layer has an embedding of a token."""
        return self.layer_embedding_width is not None

    @property
    def global_layers(self) -> "ModelConfig":
        """The architecture as layers with `global_attn` see it: as if all layers were alike."""
        sizes = self.global_attention
        assert sizes is not None
        alike = {"layer_types": None, "sliding_window": None, "sliding_rope": None}
        return replace(self, **alike, **_PLAIN, **vars(sizes))

    @property
    def local_layers(self) -> "ModelConfig":
        """The architecture as layers with `self_attn` see it: as if all layers were alike."""
        if self.global_attention is None:
            return self
        types: tuple[LayerType, ...] = ("sliding_attention",) * self.num_layers
        rope = self.sliding_rope or self.rope
        return replace(self, layer_types=types, rope=rope, sliding_rope=None, **_PLAIN)

    @property
    def full_head_dim(self) -> int:
        """Channels of a head in layers with full attention."""
        sizes = self.global_attention
        return self.head_dim if sizes is None else sizes.head_dim

    @property
    def widest_head(self) -> int:
        """Largest number of channels of a head of softmax attention."""
        return max(self.head_dim, self.full_head_dim)

    @property
    def global_key_as_value(self) -> bool:
        """True if layers with `global_attn` have no value projection."""
        return self.global_attention is not None and self.global_attention.key_as_value


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Settings of the computation; they change results by no more than rounding.

    Attributes:
      dtype: dtype of activations and matrix products: `float32`, `bfloat16` or `float16`. Required;
        `bfloat16` on accelerators. Norms, rotary angles, routers, softmax and losses are always
        float32. Products of `float32` on accelerators round their inputs, to TF32 on NVIDIA GPUs
        and bfloat16 on TPUs, unless the environment has `JAX_DEFAULT_MATMUL_PRECISION=highest`;
        routers do not.
      attention: attention kernel. `xla` runs everywhere; `cudnn` is the fused kernel of NVIDIA GPUs
        and needs a half-precision `dtype`, heads of at most 256 channels, a multiple of 8, and a
        model that does not cap its attention scores. `auto` is `cudnn` where it can be, and `xla`
        elsewhere. The memory of both grows linearly with a row's length, except that packed rows
        take two bytes for each pair of positions with `cudnn`. Default `auto`.
      remat: values that a decoder layer keeps for its backward pass, which computes the others
        again. `none` keeps all values. `dots` keeps the outputs of matrix products with weights.
        `frozen` keeps the products of frozen projections and the low-rank activations of adapters,
        so that no large product is computed again (`benchmarks/remat.md`: half of the memory of
        `dots` for 1% more work). `narrow` is as `frozen`, without FFN-wide products. `full`
        keeps the layer's input alone. Default `frozen`; use `narrow` or `full` if a step runs out
        of memory.
      experts: computation of MixLoRA's experts. `einsum` runs everywhere and on every mesh. `fused`
        keeps the activations of a token's experts within GPU kernels, whose tiles read and write
        fewer arrays as wide as the FFN. It needs an NVIDIA GPU of compute capability 8.0, a mesh of
        one device, a router that chooses single experts (`top_k`, `switch`), and experts on all
        three projections without DoRA and `ffn_dropout`. It was compiled for GPUs and not measured
        on one yet. Default `einsum`.
    """

    dtype: FloatType
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    remat: Literal["none", "dots", "frozen", "narrow", "full"] = "frozen"
    experts: Literal["einsum", "fused"] = "einsum"

    def __post_init__(self):
        require(
            self.attention != "cudnn" or self.dtype != "float32",
            "attention",
            "'cudnn' needs compute.dtype 'bfloat16' or 'float16'",
        )

    def check_model(self, model: ModelConfig) -> None:
        """Refuses, with `require`, settings that do not support this model."""
        limit = self.fused_attention_limit(model)
        require(
            self.attention != "cudnn" or limit is None,
            "attention",
            f"'cudnn' {limit}; use 'auto' or 'xla'",
        )

    def fused_attention_limit(self, model: ModelConfig) -> str | None:
        """Why cuDNN's attention cannot compute this model in `dtype`; None if it can."""
        if self.dtype == "float32":
            return "needs compute.dtype 'bfloat16' or 'float16'"
        if model.attn_logit_softcapping is not None:
            cap = f"attn_logit_softcapping {model.attn_logit_softcapping}"
            return f"cannot cap attention scores, as this model does ({cap})"
        if model.head_dim % 8 or model.widest_head > _WIDEST_FUSED_HEAD:
            sizes = f"a multiple of 8 up to {_WIDEST_FUSED_HEAD}"
            return f"needs heads whose head_dim is {sizes}, and this model's is {model.widest_head}"
        return None
