"""Every method with every router: trained, saved, and evaluated in a fresh process.

All of them train at once, in one run on one base; the fresh process knows their folders only.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_run
from tolerances import ROUNDING
from xla_flags import xla_flags

from moe_jax.checkpoints.adapter_files import load_adapter

ROUTERS = {
    "top_k": dict(name="top_k", top_k=2),
    "top_p": dict(name="top_p", top_p=0.6),
    "switch": dict(name="switch", capacity_factor=1.25, overflow="frozen"),
    "soft": dict(name="soft"),
}
LOSSES = dict(load_balance=dict(coefficient=0.01), router_z=dict(coefficient=0.001))
METHODS = {
    "lora": dict(name="lora"),
    "lora_plus": dict(name="lora"),  # see `CONFIG`
    "rslora": dict(name="lora", rslora=True),
    "dora": dict(name="lora", dora=True),
    **{
        f"mixlora-{router}": dict(name="mixlora", num_experts=4, router=fields, losses=LOSSES)
        for router, fields in ROUTERS.items()
    },
    **{
        f"mixdora-{router}": dict(name="mixlora", num_experts=4, router=fields, dora=True)
        for router, fields in ROUTERS.items()
    },
    "loramoe-dora": dict(name="loramoe", num_experts=4, dora=True),
    "mola-dora": dict(name="mola", num_experts=(2, 4), dora=True),
    # These two do not support routers with a capacity.
    **{
        f"loramoe-{router}": dict(name="loramoe", num_experts=4, router=ROUTERS[router])
        for router in ("top_k", "top_p", "soft")
    },
    **{
        f"mola-{router}": dict(name="mola", num_experts=(2, 4), router=ROUTERS[router])
        for router in ("top_k", "top_p", "soft")
    },
}
STEPS = 24

CONFIG = f"""
from tiny_run_config import adapter, get_config as one_adapter

METHODS = {METHODS!r}


def get_config():
    config = one_adapter()
    config["adapters"] = {{name: adapter("train", **method) for name, method in METHODS.items()}}
    for adapter_config in config["adapters"].values():
        adapter_config["method"]["target_modules"] = ("q_proj", "gate_proj", "down_proj")
        adapter_config["batch_size"] = 4
        adapter_config["optimizer"]["learning_rate"] = 2e-2  # because of the few steps
        adapter_config["data"]["buckets"] = ()
    config["adapters"]["lora_plus"]["optimizer"]["lora_plus_ratio"] = 4.0
    config["training"] = dict(steps={STEPS}, log_every=4)
    config["checkpoints"] = dict(every=100, keep=1)
    return config
"""

FRESH_PROCESS = """
import json, sys
from pathlib import Path

import numpy as np

import moe_jax
from moe_jax.data.pipeline import load_validation_data
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError

config_file, workdir = map(Path, sys.argv[1:])
settings = json.loads((workdir / "config.json").read_text())
base = moe_jax.load_base(settings["base"]["path"])
config = moe_jax.parse_config(settings)
data = next(iter(config.adapters.values())).data
batches = list(load_validation_data(data, load_tokenizer(base.folder), 16)["held_out"])


def mean_loss(model, name):
    total = count = 0.0
    for batch in batches:
        logits = np.asarray(model(batch.tokens, name, batch.segment_ids), np.float64)[:, :-1]
        shifted = logits - logits.max(axis=-1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        right = np.take_along_axis(log_probs, batch.tokens[:, 1:, None], axis=-1)[..., 0]
        mask = batch.loss_mask[:, 1:]
        total, count = total - right[mask].sum(), count + mask.sum()
    return total / count


model = moe_jax.AdaptedModel(
    base, {name: moe_jax.load_adapter(workdir / "adapters" / name) for name in config.adapters}
)
losses = {name: mean_loss(model, name) for name in config.adapters}
print(json.dumps({"base": mean_loss(model, None), **losses}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Work directory of the run, its last validation losses, and the losses in a fresh process."""
    folder = tmp_path_factory.mktemp("every_method")
    tiny_run.write_inputs(folder).rename(folder / "tiny_run_config.py")
    config, workdir = folder / "config.py", folder / "run"
    config.write_text(f"import sys\nsys.path.insert(0, {str(folder)!r})\n{CONFIG}")
    trained = tiny_run.Run(config, workdir)
    # A program with this many adapters takes long to compile.
    assert trained.join(600) == 0, trained.log.read_text()
    reported = {}
    for line in tiny_run.metric_lines(workdir):
        for name, value in line.items():
            if name.startswith("validation/"):
                reported[name.split("/")[1]] = value
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, config, workdir],
        env={**os.environ, "XLA_FLAGS": xla_flags(1)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert fresh.returncode == 0, fresh.stderr
    return workdir, reported, json.loads(fresh.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", METHODS)
def test_losses_in_a_fresh_process_equal_those_of_the_run(run, name):
    workdir, reported, fresh = run
    np.testing.assert_allclose(fresh[name], reported[name], **ROUNDING)
    assert fresh[name] < fresh["base"] - 0.05
    saved = load_adapter(workdir / "adapters" / name)
    assert saved.step == STEPS
    leaves = tiny_run.final_adapter(workdir, name)
    for path, leaf in leaves.items():
        # An expert that no token has reached may still be zero; a projection may not.
        assert leaf.any() and np.isfinite(leaf).all(), path
    has_router = any(path.endswith("router/kernel") for path in leaves)
    assert has_router == (saved.method.routes is True)
    assert any(path.endswith("magnitude") for path in leaves) == ("dora" in name)


def test_all_adapters_differ(run):
    _, _, fresh = run
    assert len({round(loss, 6) for loss in fresh.values()}) == len(METHODS) + 1
