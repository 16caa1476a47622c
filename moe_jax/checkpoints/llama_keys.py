"""Which tensor of a Hugging Face Llama checkpoint becomes which leaf of the parameter tree."""

from dataclasses import dataclass

from moe_jax.config.model import ModelConfig


@dataclass(frozen=True)
class WeightRule:
    """One row of the key table.

    Attributes:
      key: the tensor's name; `{layer}` counts decoder layers, which are stacked in the leaf.
      path: the leaf's path in the parameter tree.
      axes: the leaf's axes, one letter of `_axis_sizes` each, without the layer axis in front.
      transposed: the tensor is stored `[out, in]` and the leaf is `[in, out]`.
      only_if: a field of `ModelConfig` and the value that it must have for the weight to exist.
    """

    key: str
    path: str
    axes: str
    transposed: bool = False
    only_if: tuple[str, bool] | None = None


_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."
_ATTENTION_BIAS, _MLP_BIAS = ("attention_bias", True), ("mlp_bias", True)

# The one table of both directions. Letters: V vocabulary, D model width, F FFN width, Q query
# channels (heads x head_dim), K key and value channels (kv heads x head_dim).
LLAMA_WEIGHTS = (
    WeightRule("model.embed_tokens.weight", "embed_tokens/embedding", "VD"),
    WeightRule(_LAYER + "input_layernorm.weight", "layers/input_layernorm/scale", "D"),
    WeightRule(_ATTENTION + "q_proj.weight", "layers/self_attn/q_proj/kernel", "DQ", True),
    WeightRule(_ATTENTION + "k_proj.weight", "layers/self_attn/k_proj/kernel", "DK", True),
    WeightRule(_ATTENTION + "v_proj.weight", "layers/self_attn/v_proj/kernel", "DK", True),
    WeightRule(_ATTENTION + "o_proj.weight", "layers/self_attn/o_proj/kernel", "QD", True),
    WeightRule(
        _ATTENTION + "q_proj.bias", "layers/self_attn/q_proj/bias", "Q", only_if=_ATTENTION_BIAS
    ),
    WeightRule(
        _ATTENTION + "k_proj.bias", "layers/self_attn/k_proj/bias", "K", only_if=_ATTENTION_BIAS
    ),
    WeightRule(
        _ATTENTION + "v_proj.bias", "layers/self_attn/v_proj/bias", "K", only_if=_ATTENTION_BIAS
    ),
    WeightRule(
        _ATTENTION + "o_proj.bias", "layers/self_attn/o_proj/bias", "D", only_if=_ATTENTION_BIAS
    ),
    WeightRule(
        _LAYER + "post_attention_layernorm.weight", "layers/post_attention_layernorm/scale", "D"
    ),
    WeightRule(_MLP + "gate_proj.weight", "layers/mlp/gate_proj/kernel", "DF", True),
    WeightRule(_MLP + "up_proj.weight", "layers/mlp/up_proj/kernel", "DF", True),
    WeightRule(_MLP + "down_proj.weight", "layers/mlp/down_proj/kernel", "FD", True),
    WeightRule(_MLP + "gate_proj.bias", "layers/mlp/gate_proj/bias", "F", only_if=_MLP_BIAS),
    WeightRule(_MLP + "up_proj.bias", "layers/mlp/up_proj/bias", "F", only_if=_MLP_BIAS),
    WeightRule(_MLP + "down_proj.bias", "layers/mlp/down_proj/bias", "D", only_if=_MLP_BIAS),
    WeightRule("model.norm.weight", "norm/scale", "D"),
    WeightRule(
        "lm_head.weight", "lm_head/kernel", "DV", True, only_if=("tie_word_embeddings", False)
    ),
)

EMBEDDING_KEY = "model.embed_tokens.weight"
HEAD_KEY = "lm_head.weight"

# Constants that follow from config.json and that old versions of transformers stored as tensors.
NOT_WEIGHTS = ("model.rotary_emb.inv_freq", _ATTENTION + "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree and the tensors that it is made of.

    Attributes:
      path: names from the tree's root to the leaf.
      shape: the whole leaf, layers in front where it is `stacked`.
      keys: the tensors, one a layer where it is `stacked`, else one.
      stacked: tensor i is `leaf[i]`.
      transposed: each tensor is stored with its two axes swapped.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    stacked: bool
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of the tensors, as stored."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def _axis_sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "Q": config.num_heads * config.head_dim,
        "K": config.num_kv_heads * config.head_dim,
    }


def exists(rule: WeightRule, config: ModelConfig) -> bool:
    """Whether a model of this configuration has the weight."""
    return rule.only_if is None or getattr(config, rule.only_if[0]) == rule.only_if[1]


def keys_of(pattern: str, config: ModelConfig) -> tuple[str, ...]:
    """The tensor names that a name with or without `{layer}` stands for."""
    if "{layer}" not in pattern:
        return (pattern,)
    return tuple(pattern.format(layer=layer) for layer in range(config.num_layers))


def llama_leaves(config: ModelConfig) -> list[Leaf]:
    """All leaves of the parameter tree of a model of this configuration."""
    sizes = _axis_sizes(config)
    leaves = []
    for rule in LLAMA_WEIGHTS:
        if not exists(rule, config):
            continue
        stacked = "{layer}" in rule.key
        shape = tuple(sizes[axis] for axis in rule.axes)
        leaves.append(
            Leaf(
                path=tuple(rule.path.split("/")),
                shape=(config.num_layers, *shape) if stacked else shape,
                keys=keys_of(rule.key, config),
                stacked=stacked,
                transposed=rule.transposed,
            )
        )
    return leaves


def why_unexpected(key: str, config: ModelConfig) -> str:
    """What in the configuration leaves no place for `key`: text for a message, perhaps empty."""
    for rule in LLAMA_WEIGHTS:
        if rule.only_if is None or exists(rule, config):
            continue
        if key in keys_of(rule.key, config):
            return f"config.json says {rule.only_if[0]} {str(not rule.only_if[1]).lower()}"
    if key.startswith(_LAYER.split("{", maxsplit=1)[0]):
        return f"config.json says num_hidden_layers {config.num_layers}"
    return ""
