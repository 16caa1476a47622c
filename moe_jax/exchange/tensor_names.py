"""What PEFT and MoE-PEFT call the parts of our leaves, in both directions.

They store one matrix `[out, in]` for each layer and expert, for example

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight          LoRA
    mixlora.layers.0.mlp.gate_proj.experts.0.lora_B.weight                  an expert's pair
    mixlora.layers.0.mlp.moe_gate.weight                                    one router for the FFN
    mola.layers.0.self_attn.q_proj.moe_gate.weight                          one for each projection
    base_model.model.score.weight                                           a score head

Ours are `[in, out]`, with layers and experts stacked: `lora_A` `[L, in, R]` or `[L, in, E, R]`,
`lora_B` `[L, R, out]` or `[L, E, R, out]`, `router/kernel` `[L, in, E]`, `magnitude` `[L, out]`,
`score/kernel` `[in, out]`.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from moe_jax.adapters.tree import MOE, SCORE
from moe_jax.checkpoints.leaves import LeafSpec

PREFIXES = {
    "LORA": "base_model.model.model",
    "MIXLORA": "mixlora",
    "LORAMOE": "loramoe",
    "MOLA": "mola",
}
"""What the names of an adapter's tensors begin with, by its `peft_type`."""

_EVERY = slice(None)


class TensorPart(NamedTuple):
    """A tensor and the part of a leaf that it is.

    Attributes:
      name: the tensor's.
      path: of the leaf.
      at: `leaf[at]` is the tensor transposed.
      shape: of the tensor, as stored.
    """

    name: str
    path: str
    at: tuple[int | slice, ...]
    shape: tuple[int, ...]


def tensor_parts(leaves: Mapping[str, LeafSpec], peft_type: str) -> list[TensorPart]:
    """All tensors of an adapter with these leaves, layer by layer.

    Args:
      leaves: shapes by path.
      peft_type: a key of `PREFIXES`.

    Raises:
      ValueError: the format has no name for a leaf, which its caller should have refused.
    """
    stacked = {path: spec for path, spec in leaves.items() if not path.startswith(f"{SCORE}/")}
    num_layers = max(spec.shape[0] for spec in stacked.values())
    parts = [
        TensorPart("base_model.model.score.weight", path, (), spec.shape[::-1])
        for path, spec in leaves.items()
        if path not in stacked
    ]
    for layer in range(num_layers):
        for path, spec in stacked.items():
            root, block, *rest = path.split("/")
            # The site of experts that share a router is no module of its own there.
            names = [PREFIXES[peft_type], root, str(layer), block, *(p for p in rest if p != MOE)]
            for name, index in _parts_of_layer(names, spec.shape):
                shape = np.broadcast_to(0, spec.shape)[(layer, *index)].T.shape
                parts.append(TensorPart(name, path, (layer, *index), shape))
    return parts


def _parts_of_layer(
    names: list[str], shape: tuple[int, ...]
) -> Iterable[tuple[str, tuple[int | slice, ...]]]:
    *module, leaf = names
    ndim = len(shape)
    where = ".".join(module)
    if leaf == "kernel" and module[-1] == "router":
        yield f"{where.removesuffix('router')}moe_gate.weight", ()
    elif leaf in ("lora_A", "lora_B") and ndim == 3:
        yield f"{where}.{leaf}.weight", ()
    elif leaf in ("lora_A", "lora_B") and ndim == 4:
        for expert in range(shape[2 if leaf == "lora_A" else 1]):
            index = (_EVERY, expert) if leaf == "lora_A" else (expert,)
            yield f"{where}.experts.{expert}.{leaf}.weight", index
    elif leaf == "magnitude" and ndim == 2:
        yield f"{where}.lora_magnitude_vector", ()
    else:
        raise ValueError(f"no tensor's name stands for {'.'.join(names)}")


def to_tensors(
    leaves: Mapping[str, np.ndarray], parts: Iterable[TensorPart], dtype: np.dtype
) -> dict[str, np.ndarray]:
    """The tensors, contiguous, of leaves by path."""
    return {
        part.name: np.ascontiguousarray(leaves[part.path][part.at].T.astype(dtype))
        for part in parts
    }


def to_leaves(
    tensors: Mapping[str, np.ndarray],
    parts: Iterable[TensorPart],
    leaves: Mapping[str, LeafSpec],
) -> dict[str, np.ndarray]:
    """The leaves by path, of their own types, of tensors whose names and shapes are the parts'."""
    result = {path: np.zeros(spec.shape, spec.dtype) for path, spec in leaves.items()}
    for part in parts:
        result[part.path][part.at] = tensors[part.name].T
    return result
