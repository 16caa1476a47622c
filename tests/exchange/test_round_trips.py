"""Export and import: every leaf has the same bits, and the method is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_adapters import (
    ATTENTION,
    FFN,
    LORA,
    LORAMOE,
    MIXLORA,
    MOLA,
    SWITCH,
    TOP_P,
    random_adapter,
    require_same_bits,
)

import moe_jax
from moe_jax.checkpoints.leaves import named_leaves

BALANCE = {"load_balance": {"coefficient": 0.02, "scope": "pooled"}}
BALANCE_AND_Z = {**BALANCE, "router_z": {"coefficient": 0.003, "scope": "pooled"}}


@pytest.mark.parametrize(
    ("to", "method"),
    [
        ("peft", LORA),
        ("peft", {**LORA, "rslora": True, "alpha": 2.5, "dropout": 0.1, "init": "gaussian"}),
        ("peft", {**LORA, "dora": True, "target_modules": ["o_proj", "down_proj"]}),
        ("mixlora", {**LORA, "rslora": True, "init": "gaussian"}),
        ("mixlora", MIXLORA),
        ("mixlora", {**MIXLORA, "target_modules": FFN, "losses": BALANCE}),
        ("mixlora", {**MIXLORA, "target_modules": ["v_proj", "down_proj"], "rslora": True}),
        (
            "mixlora",
            {**MIXLORA, "expert_lora": {"rank": 2, "alpha": 3.0, "rslora": True}, "alpha": 16.0},
        ),
        ("mixlora", {**MIXLORA, "router": TOP_P, "init": "gaussian"}),
        ("mixlora", {**MIXLORA, "router": SWITCH, "losses": BALANCE_AND_Z}),
        ("mixlora", LORAMOE),
        ("mixlora", {**LORAMOE, "target_modules": FFN[:1] + ATTENTION[:1]}),
        ("mixlora", MOLA),
        ("mixlora", {**MOLA, "target_modules": ATTENTION, "rslora": True, "losses": BALANCE}),
    ],
)
def test_every_leaf_has_the_same_bits(tiny, tmp_path, to, method):
    adapter = random_adapter(method, tiny.base.config, str(tiny.folder))
    moe_jax.export_adapter(adapter, to, tmp_path / "out")
    imported = moe_jax.import_adapter(tmp_path / "out", tiny.base)
    assert imported.method == adapter.method
    assert imported.model == tiny.base.config
    assert imported.base == tiny.base.identity
    require_same_bits(imported, adapter)


@pytest.mark.parametrize("to", ["peft", "mixlora"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_round_once(tiny, tmp_path, to, dtype):
    adapter = random_adapter(LORA, tiny.base.config)
    moe_jax.export_adapter(adapter, to, tmp_path / "out", dtype=dtype)
    imported = moe_jax.import_adapter(tmp_path / "out", tiny.base)
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), adapter.tree)
    require_same_bits(imported, adapter._replace(tree=rounded))
    for path, leaf in named_leaves(adapter.tree).items():
        assert not np.array_equal(named_leaves(imported.tree)[path], leaf)


def test_training_settings_that_are_left_out_are_noted(tiny, tmp_path):
    router = {"name": "top_k", "top_k": 2, "jitter_noise": 0.1}
    losses = {"load_balance": {"coefficient": 0.1}, "router_entropy": {"coefficient": 0.1}}
    method = {**MIXLORA, "router": router, "losses": losses, "ffn_dropout": 0.1, "dropout": 0.1}
    method["expert_lora"] = {"alpha": 4.0}
    adapter = random_adapter(method, tiny.base.config)
    left_out, package = moe_jax.export_adapter(adapter, "mixlora", tmp_path / "out")
    assert left_out.removeprefix("left out, relevant for further training only: ") == (
        "ffn_dropout, dropout, router.jitter_noise, losses.load_balance.scope, "
        "losses.router_entropy"
    )
    assert package == "expert_lora is read by MoE-PEFT; the mixlora package 0.2.3 ignores it"
    require_same_bits(moe_jax.import_adapter(tmp_path / "out", tiny.base), adapter)
