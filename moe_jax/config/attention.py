"""Sizes of attention in layers that differ from the others of a model, and names of modules."""

from dataclasses import dataclass

from moe_jax.config.parse import require


@dataclass(frozen=True, kw_only=True)
class DeltaNetConfig:
    """Sizes of the linear attention of a Gated DeltaNet (arXiv:2412.06464).

    Attributes:
      num_key_heads: number of key heads; each serves as many value heads as the others.
      num_value_heads: number of value heads, each with a state.
      key_head_dim: channels of a query or key.
      value_head_dim: channels of a value.
      filter_width: number of tokens that the short convolution sees, the token itself included.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    filter_width: int

    def __post_init__(self):
        for field, value in vars(self).items():
            require(value > 0, field, "must be positive")
        require(
            self.num_value_heads % self.num_key_heads == 0,
            "num_key_heads",
            f"must divide num_value_heads ({self.num_value_heads})",
        )

    @property
    def key_dim(self) -> int:
        """Channels of all keys."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Channels of all values."""
        return self.num_value_heads * self.value_head_dim

    @property
    def mixed_dim(self) -> int:
        """Channels of all queries, keys and values, which one projection computes."""
        return 2 * self.key_dim + self.value_dim


@dataclass(frozen=True, kw_only=True)
class GlobalAttentionConfig:
    """Sizes of the layers with full attention, where sliding layers have others (Gemma 4).

    Attributes:
      num_kv_heads: number of key and value heads.
      head_dim: channels of a head.
      key_as_value: values are the products of the key projection, before they are normalized.
    """

    num_kv_heads: int
    head_dim: int
    key_as_value: bool

    def __post_init__(self):
        require(self.num_kv_heads > 0, "num_kv_heads", "must be positive")
        require(self.head_dim > 0 and self.head_dim % 2 == 0, "head_dim", "must be even")


SELF_ATTENTION, LINEAR_ATTENTION, GLOBAL_ATTENTION = "self_attn", "linear_attn", "global_attn"
"""Names of the modules of a layer's attention, of which each layer has one.

`global_attn` is that of full layers if they have other sizes than sliding ones.
"""

READERS = {SELF_ATTENTION: "self_attn_reader", GLOBAL_ATTENTION: "global_attn_reader"}
"""Names of the modules that attend to the keys and values of an earlier layer, by its module."""

ATTENTIONS = (SELF_ATTENTION, LINEAR_ATTENTION, GLOBAL_ATTENTION, *READERS.values())

FFN, WIDE_FFN = "mlp", "wide_mlp"
"""Names of the modules of a layer's FFN; `wide_mlp` is that of layers whose FFN is wider."""

LAYER_EMBEDDING = "layer_embedding"
"""Name of the module of a layer that adds its embeddings of the tokens."""
