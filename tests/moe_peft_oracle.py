"""Figures recorded from MoE-PEFT 2.0.2 (PyTorch), and its key names mapped to our adapter tree.

The figures, how they were made and what is known to be wrong with them: data/moe_peft/README.md.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent / "data" / "moe_peft"
BASE = ROOT / "base"  # the frozen model, as transformers saves it
CASES = ("lora", "dora", "mixlora", "mixlora-dynamic", "mixlora-switch", "loramoe", "mola")

# The order in which the reference concatenates the router logits of one layer.
ROUTER_SITES = {
    "mixlora": ("mlp/moe",),
    "loramoe": ("mlp/gate_proj", "mlp/down_proj", "mlp/up_proj"),
    "mola": (
        *(f"self_attn/{name}_proj" for name in "qkvo"),
        *("mlp/gate_proj", "mlp/down_proj", "mlp/up_proj"),
    ),
}

_KEY = re.compile(
    r"(?:(?P<method>mixlora|loramoe|mola|base_model\.model\.model)\.)?"
    r"layers\.(?P<layer>\d+)\.(?P<block>self_attn|mlp)\."
    r"(?:(?P<proj>[a-z]+_proj)\.)?(?:experts\.(?P<expert>\d+)\.)?"
    r"(?P<leaf>lora_A\.weight|lora_B\.weight|moe_gate\.weight|magnitude)"
)
_LEAVES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "magnitude": "magnitude"}


@dataclass(frozen=True)
class OracleCase:
    """One adapter and what the reference computed with it.

    `case["full/logits"]` is one array; `case.group("full/grad")` all that lie below a prefix.
    """

    name: str
    config: dict
    weights: dict  # the adapter as saved, and DoRA's magnitudes; `as_tree` takes it
    arrays: dict

    def __getitem__(self, key):
        return self.arrays[key]

    def __contains__(self, key):
        return key in self.arrays

    def group(self, prefix):
        """{key below prefix: array}; raises where there is none."""
        found = {
            key.removeprefix(f"{prefix}/"): value
            for key, value in self.arrays.items()
            if key.startswith(f"{prefix}/")
        }
        if not found:
            raise KeyError(f"{self.name} has nothing below {prefix!r}")
        return found

    def router_logits(self):
        """{"mlp/moe" or "<block>/<projection>": [L, B, S, E]}, of the `full` batch."""
        sites = ROUTER_SITES[self.config["peft_type"].lower()]
        logits, tokens = self["full/router_logits"], self["full/tokens"]
        logits = logits.reshape(-1, len(sites), *tokens.shape, logits.shape[-1])
        return {site: logits[:, index] for index, site in enumerate(sites)}


def load_case(name):
    """One of `CASES`."""
    with np.load(ROOT / f"{name}.npz", allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    config = json.loads(str(arrays.pop("config_json")))
    weights = {}
    for key in [key for key in arrays if key.startswith(("w/", "mag/"))]:
        kind, _, rest = key.partition("/")
        weights[rest if kind == "w" else f"{rest}.magnitude"] = arrays.pop(key)
    return OracleCase(name, config, weights, arrays)


def locate(key):
    """(path in our tree, layer, expert or None) of a reference key."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"not a key of a reference adapter: {key!r}")
    method, block, proj = match["method"], match["block"], match["proj"]
    is_router, routed = match["leaf"] == "moe_gate.weight", match["expert"] is not None
    if (is_router and routed) or (proj is None and not (is_router and method == "mixlora")):
        raise ValueError(f"not a key of a reference adapter: {key!r}")
    path = ["layers", block]
    if method == "mixlora" and (routed or is_router):
        path.append("moe")  # one router for the whole FFN
    if proj is not None:
        path.append(proj)
    path += ["router", "kernel"] if is_router else [_LEAVES[match["leaf"]]]
    return tuple(path), int(match["layer"]), int(match["expert"]) if routed else None


def as_tree(mapping):
    """Weights or gradients by reference key, as the nested dict of our adapters.

    Matrices are transposed to [in, out], experts stacked ([in, E, R] and [E, R, out]), and layers
    stacked in front. Raises on a key it does not know and on a layer or an expert left out.
    """
    parts, located = {}, {key: locate(key) for key in mapping}
    num_layers = 1 + max(layer for _, layer, _ in located.values())
    num_experts = 1 + max((expert or 0) for _, _, expert in located.values())
    for key, (path, layer, expert) in located.items():
        parts.setdefault(path, {}).setdefault(layer, {})[expert] = np.asarray(mapping[key]).T
    tree = {}
    for path, layers in parts.items():
        expect(range(num_layers), layers, path)
        axis = 1 if path[-1] == "lora_A" else 0
        stacked = []
        for _, experts in sorted(layers.items()):
            if set(experts) == {None}:
                stacked.append(experts[None])
            else:
                expect(range(num_experts), experts, path)
                stacked.append(np.stack([experts[e] for e in range(num_experts)], axis=axis))
        *parents, leaf = path
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = np.stack(stacked)
    return tree


def expect(wanted, found, path):
    if set(found) != set(wanted):
        raise ValueError(f"{'/'.join(path)}: has {list(found)}, not {list(wanted)}")
