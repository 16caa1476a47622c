"""Records the format of adapter folders, for `checkpoints/test_adapter_format.py`.

    python tests/record_adapter_format.py

writes `tests/data/adapter_format/<version>/`: `layout.json`, and one small adapter as that version
saves it. Run it after raising `FORMAT_VERSION` in `moe_jax/checkpoints/adapter_files.py`, and after
adding a method or router to `METHOD_CONFIGS`: these are then added to the recorded version. What a
version has recorded is never changed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import FORMAT_VERSION, SavedAdapter, save_adapter
from moe_jax.checkpoints.leaves import LeafSpec, nested_dict
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import parse_member, to_plain
from moe_jax.config.rope import RopeConfig
from moe_jax.hf.base_model import BaseIdentity
from moe_jax.loaded.adapter_base import expected_leaves

ROOT = Path(__file__).resolve().parent / "data" / "adapter_format"

MODEL = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    hidden_act="silu",
    max_position_embeddings=16,
    rms_norm_eps=1e-5,
    rope=RopeConfig(rope_type="default", rope_theta=10000.0),
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
)
BASE = BaseIdentity("some/base", "0" * 64)
STEP = 30

_PAIR = {
    "rank": 2,
    "alpha": 4.0,
    "target_modules": ["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"],
}
_LOSSES = {"load_balance": {"coefficient": 0.01}, "router_z": {"coefficient": 0.001}}
METHOD_CONFIGS = {
    "lora": {"name": "lora", **_PAIR},
    "new_tokens": {"name": "lora", **_PAIR, "new_tokens": ["<a>", "</a>"], "new_token_id": 9},
    "dora": {"name": "lora", **_PAIR, "dora": True},
    "mixlora": {
        "name": "mixlora",
        **_PAIR,
        "num_experts": 3,
        "router": {"name": "top_k", "top_k": 2},
        "expert_lora": {"rank": 3},
        "losses": _LOSSES,
    },
    "mixdora": {"name": "mixlora", **_PAIR, "num_experts": 3, "dora": True},
    "top_p": {
        "name": "mixlora",
        **_PAIR,
        "num_experts": 3,
        "router": {"name": "top_p", "top_p": 0.8},
    },
    "switch": {
        "name": "mixlora",
        **_PAIR,
        "num_experts": 3,
        "router": {"name": "switch", "capacity": 4},
    },
    "loramoe": {"name": "loramoe", **_PAIR, "num_experts": 3},
    "mola": {"name": "mola", **_PAIR, "num_experts": [2, 3], "losses": _LOSSES},
}
STORED = "mixlora"
"""The one that is recorded with its weights."""


def example_adapter(name: str) -> SavedAdapter:
    """An adapter whose weights follow from their place."""
    method = parse_member(METHODS, METHOD_CONFIGS[name], "method")

    def values(spec: LeafSpec) -> jax.Array:
        count = jnp.arange(jnp.prod(jnp.array(spec.shape)), dtype=spec.dtype)
        return count.reshape(spec.shape) / 16 - 1

    leaves = {path: values(spec) for path, spec in expected_leaves(MODEL, method).items()}
    return SavedAdapter(method, nested_dict(leaves), MODEL, BASE, STEP)


def layout(folder: Path) -> dict[str, Any]:
    """The format that this release writes, for the adapter stored in `folder`."""
    description = json.loads((folder / "adapter.json").read_text())
    methods = {}
    for name, config in METHOD_CONFIGS.items():
        method = parse_member(METHODS, config, name)
        leaves = {p: [list(s.shape), s.dtype] for p, s in expected_leaves(MODEL, method).items()}
        methods[name] = {"method": to_plain(method), "leaves": leaves}
    return {
        "files": sorted(path.name for path in folder.iterdir()),
        "description": {field: kind(value) for field, value in description.items()},
        "base": description["base"],
        "model": description["model"],
        "methods": methods,
    }


def add_missing_methods(recorded: dict[str, Any], written: dict[str, Any]) -> list[str]:
    """Adds methods of `written` that `recorded` lacks; returns their names."""
    missing = [name for name in written["methods"] if name not in recorded["methods"]]
    recorded["methods"] |= {name: written["methods"][name] for name in missing}
    return missing


def kind(value: Any) -> Any:
    """The type of a JSON value; of a group, that of its values if it is the same."""
    if isinstance(value, dict):
        kinds = {json.dumps(kind(item)) for item in value.values()}
        return {"*": json.loads(kinds.pop())} if len(kinds) == 1 else "dict"
    if isinstance(value, list):
        return [kind(value[0]), "..."] if len({type(v) for v in value}) == 1 else ["mixed"]
    return type(value).__name__


def record() -> None:
    """Writes the folder of `FORMAT_VERSION`, or adds new methods to the recorded one."""
    target = ROOT / str(FORMAT_VERSION)
    if target.exists():
        file = target / "layout.json"
        recorded = json.loads(file.read_text())
        if not add_missing_methods(recorded, layout(target / STORED)):
            sys.exit(f"{target}: all methods are recorded; raise FORMAT_VERSION for a new format")
        file.write_text(json.dumps(recorded, indent=1) + "\n")
        return
    save_adapter(target / STORED, example_adapter(STORED))
    for note in target.rglob("commit_success.txt"):
        note.write_text("")  # names a folder of this machine and is not read
    text = json.dumps(layout(target / STORED), indent=1)
    (target / "layout.json").write_text(text + "\n")


if __name__ == "__main__":
    record()
