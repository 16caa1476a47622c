"""Names and trees of the adapters' variables.

Inside the model, the variables of the adapter `x` on `q_proj` are at
`layers/self_attn/q_proj/adapter_x/...`, beside the base parameters' own paths. Outside, where
adapters are optimized, saved and exchanged one by one, the tree is keyed by adapter first:

    {"x": {"layers": {"self_attn": {"q_proj": {"lora_A": [L, D, R], "lora_B": [L, R, H Q]}},
                      "mlp": {"moe": {"router": {"kernel": [L, D, E]},
                                      "gate_proj": {"lora_A": [L, D, E, R], ...}, ...}}}}}

L counts the layers that have the module, see `ModelConfig.layers_with`.

`to_collection` and `split_by_adapter` convert between the two.
"""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from moe_jax.layers.names import MODULE_PREFIX

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Names of the attention projections that adapters can target."""

MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
"""Names of the FFN projections that adapters can target."""

TARGET_MODULES = ATTENTION_MODULES + MLP_MODULES
"""Names of the projections that adapters can target in models of every family."""

DELTA_NET_MODULES = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
"""Names of the projections of linear attention that adapters can target."""

LAYER_EMBEDDING_MODULES = ("per_layer_input_gate", "per_layer_projection")
"""Names of the projections of embeddings of each layer that adapters can target."""

ALL_MODULES = TARGET_MODULES + DELTA_NET_MODULES + LAYER_EMBEDDING_MODULES
"""Names of all projections that adapters can target in some model."""

MOE = "moe"
"""Site, inside `mlp`, of adapters that replace the FFN as a whole."""

SCORE = "score"
"""Site, after the final norm, of the score heads of classification adapters."""

NEW_TOKENS = "new_tokens"
"""Site, beside the layers, of the rows that adapters add to the embedding and the head."""

SITES = frozenset({*ALL_MODULES, MOE, SCORE, NEW_TOKENS})
"""Names of all sites that adapters attach to."""


def expert_name(adapter: str, index: int | str) -> str:
    """External name of an expert, in reports and in other programs."""
    return f"moe.{adapter}.experts.{index}"


def split_by_adapter(collection: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a Linen collection to `{adapter: tree}`; leaves are not touched."""
    result: dict[str, dict[tuple[str, ...], Any]] = {}
    for path, leaf in flatten_dict(collection).items():
        (marker,) = [part for part in path if part.startswith(MODULE_PREFIX)]
        rest = tuple(part for part in path if part != marker)
        result.setdefault(marker.removeprefix(MODULE_PREFIX), {})[rest] = leaf
    return {name: unflatten_dict(flat) for name, flat in result.items()}


def to_collection(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Converts `{adapter: tree}` to a Linen collection."""
    result = {}
    for name, tree in adapters.items():
        for path, leaf in flatten_dict(tree).items():
            # The first site on the path is the outer one: `moe` before the `gate_proj` inside it.
            site = next(i for i, part in enumerate(path) if part in SITES) + 1
            result[(*path[:site], MODULE_PREFIX + name, *path[site:])] = leaf
    return unflatten_dict(result)
