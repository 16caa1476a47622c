"""float16 values that overflow: the step is skipped, which is said, and no weight changes."""

import json

import numpy as np
import pytest
from one_device import one_device
from safetensors.numpy import load_file, save_file
from tiny_run import CONFIG, final_adapter, metric_lines, read_config, write_inputs

from moe_jax.checkpoints.store import read_metadata
from moe_jax.errors import TrainingError
from moe_jax.training.run import session
from moe_jax.training.run.loop import train

LARGE = 299
"""Token whose embedding is beyond float16. No row has it."""

SHORT_AND_LONG = """

def get_config():
    adapters = {"short": adapter("train", name="lora"), "long": adapter("other", name="lora")}
    for each in adapters.values():
        each["data"]["buckets"] = ()
        each["method"]["target_modules"] = ("q_proj", "up_proj")
    adapters["short"]["steps"] = 4
    return dict(
        base=dict(path=str(HERE / "base"), param_dtype="float32"),
        compute=dict(dtype="float16", remat="none"),
        adapters=adapters,
        training=dict(steps=6, log_every=1, seed=3, initial_loss_scale=1024.0),
        checkpoints=dict(every=1, keep=10),
    )
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = write_inputs(tmp_path_factory.mktemp("inputs"))
    file.write_text(CONFIG + SHORT_AND_LONG)
    weights, settings = (
        file.parent / "base" / name for name in ("model.safetensors", "config.json")
    )
    tensors = load_file(weights)
    head = tensors["model.embed_tokens.weight"].copy()
    tensors["model.embed_tokens.weight"][LARGE] = 1e6
    save_file({**tensors, "lm_head.weight": head}, weights, metadata={"format": "pt"})
    untied = {**json.loads(settings.read_text()), "tie_word_embeddings": False}
    settings.write_text(json.dumps(untied))
    return file


def run(config, workdir, large_from=None, large_to=None):
    """Trains; all rows of `short`, the first ones, are of the large token in some steps."""
    lines, steps = [], iter(range(1, 100))

    def join(parts):
        batch = join_rows(parts)
        if large_from is not None and large_from <= next(steps) <= large_to:
            batch.tokens[:8] = LARGE
        return batch

    with one_device() as patch:
        join_rows = session.join_rows
        patch.setattr(session, "join_rows", join)
        train(read_config(config), workdir, lines.append)
    return lines


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    lines = run(config, workdir)
    assert not any("skipped" in line for line in lines)
    return workdir


def checksums(workdir, step, adapter):
    """Checksums of the leaves of an adapter in the state after a step."""
    sums = read_metadata(workdir / "checkpoints", step)["checksums"]["adapters"]
    return {path: value for path, value in sums.items() if path.split("/")[0] == adapter}


def test_in_the_last_step_of_an_adapter(config, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    lines = run(config, workdir, 4, 4)
    (end,) = [line for line in lines if line.startswith("adapter 'short' finished")]
    assert end == (
        f"adapter 'short' finished at step 4; it is in {workdir / 'adapters' / 'short'}; steps "
        "skipped, as gradients were not finite: 1"
    )
    assert f"adapter 'long' finished at step 6; it is in {workdir / 'adapters' / 'long'}" in lines
    # It keeps the weights of the step before, and the other adapter does not notice.
    assert checksums(workdir, 4, "short") == checksums(workdir, 3, "short")
    assert checksums(undisturbed, 4, "short") != checksums(undisturbed, 3, "short")
    assert checksums(workdir, 4, "long") != checksums(workdir, 3, "long")
    for path, leaf in final_adapter(undisturbed, "long").items():
        np.testing.assert_array_equal(final_adapter(workdir, "long")[path], leaf, err_msg=path)
    short = final_adapter(workdir, "short")
    assert all(np.isfinite(leaf).all() for leaf in short.values())
    assert any(np.any(leaf != 0) for path, leaf in short.items() if "lora_B" in path)
    (last,) = [line for line in metric_lines(workdir) if line["step"] == 4 and "short/loss" in line]
    assert last["short/loss"] is None
    assert (last["short/skipped_total"], last["long/skipped_total"]) == (1, 0)
    assert last["short/loss_scale"] == 512.0


def test_in_every_step(config, tmp_path):
    with pytest.raises(TrainingError) as error:
        run(config, tmp_path / "run", 1, 6)
    assert str(error.value) == (
        "adapter 'short': the last 4 gradients, up to step 4, were not finite; try a lower "
        "config.adapters.short.optimizer.learning_rate, a clip_norm, a lower "
        "training.initial_loss_scale, or compute.dtype 'bfloat16' or 'float32'; the state at step "
        "3 is kept"
    )
    assert not (tmp_path / "run" / "adapters").exists()
