"""Fixtures: adapters of the demo's base with random routers and experts without effect (B = 0), so
that the base in transformers gives the input of each router.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.checkpoints.adapter_files import SavedAdapter, save_adapter
from moe_jax.checkpoints.leaves import nested_dict
from moe_jax.hf.base_content import base_fingerprint
from moe_jax.hf.base_model import BaseIdentity
from moe_jax.hf.config import read_model_config
from moe_jax.inspection.routing_inspection import InspectionOptions
from moe_jax.inspection.routing_report import RoutingReport
from moe_jax.loaded.adapter_base import expected_leaves

BASE = Path(moe_jax.__file__).parent / "demo" / "base"
METHODS = {
    "mixlora": moe_jax.MixLoraConfig(
        rank=2,
        alpha=4.0,
        num_experts=4,
        target_modules=("gate_proj", "up_proj", "down_proj"),
    ),
    "mola": moe_jax.MolaConfig(
        rank=2, alpha=4.0, num_experts=(2, 4), target_modules=("q_proj", "down_proj")
    ),
    "lora": moe_jax.LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",)),
}
TEXTS = [
    "the red cat sees a dog .\nthe dog <script>window.owned = 1</script> runs .",
    "a small bird\tsings </script><!-- and sleeps \u2028 .",
]
ROWS = [{"prompt": f"count {n} :", "completion": " one two" * n} for n in range(1, 5)]


class Setting(NamedTuple):
    """`folder` is the MixLoRA adapter, `saved` all of `METHODS`, `rows` a file of completions."""

    folder: Path
    saved: dict[str, SavedAdapter]
    rows: Path
    report: RoutingReport


@pytest.fixture(scope="session")
def setting(tmp_path_factory) -> Setting:
    folder = tmp_path_factory.mktemp("inspection")
    model, rng = read_model_config(BASE), np.random.default_rng(0)
    identity = BaseIdentity(str(BASE), base_fingerprint(BASE))

    def leaf(path, spec):
        std = 0.0 if "lora_B" in path else 0.5
        return std * rng.standard_normal(spec.shape, np.float32)

    saved = {}
    for name, method in METHODS.items():
        leaves = {path: leaf(path, spec) for path, spec in expected_leaves(model, method).items()}
        saved[name] = SavedAdapter(
            method, jax.tree.map(jnp.asarray, nested_dict(leaves)), model, identity, step=0
        )
    save_adapter(folder / "mixlora", saved["mixlora"])
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    completions = {"path": str(rows), "schema": "completion"}
    report = moe_jax.inspect_routing(
        saved["mixlora"],
        {"words": TEXTS, "counts": completions},
        BASE,
        options=InspectionOptions(batch_size=4),
    )
    return Setting(folder / "mixlora", saved, rows, report)
