"""Adapters that train together with different settings equal adapters that train alone."""

import numpy as np
import pytest
from one_device import one_device
from tiny_run import final_adapter, metric_lines, read_config, write_inputs
from tolerances import ROUNDING

from moe_jax.training.run.loop import train

# They differ in data, row length, batch size, steps, optimizer, schedule and seed. Dropout
# is off, and a large epsilon keeps rounding of gradients near zero small.
ADAPTERS = """

def get_config():
    top_k = lambda k: dict(name="top_k", top_k=k)
    losses = dict(load_balance=dict(coefficient=0.05))
    adapters = dict(
        lora=adapter("train", name="lora"),
        mixlora=adapter("other", name="mixlora", num_experts=4, router=top_k(2), losses=losses),
        small=adapter("held_out", name="mixlora", num_experts=3, router=top_k(1), losses=losses),
        mola=adapter("other", name="mola", num_experts=(2, 3), router=top_k(2), losses=losses),
    )
    for each in adapters.values():
        each["method"]["dropout"] = 0.0
        each["data"]["buckets"] = ()
    adapters["lora"]["optimizer"]["eps"] = 1e-3
    adapters["mixlora"] |= dict(batch_size=4, steps=3, seed=11)
    adapters["mixlora"]["data"]["max_length"] = 16
    adapters["mixlora"]["optimizer"] = dict(
        name="sgd", learning_rate=1.0, momentum=0.9, schedule=dict(kind="constant")
    )
    adapters["small"] |= dict(batch_size=3, epochs=1.5, seed=5)
    adapters["small"]["data"]["max_length"] = 20
    adapters["small"]["method"]["rank"] = 2
    adapters["small"]["optimizer"] = dict(
        learning_rate=1e-2, eps=1e-3, clip_norm=0.5, schedule=dict(kind="linear", warmup_ratio=0.5)
    )
    adapters["mola"] |= dict(batch_size=2, steps=4, seed=7)
    adapters["mola"]["data"]["max_length"] = 18
    adapters["mola"]["optimizer"] = dict(
        name="sgd", learning_rate=1.0, schedule=dict(kind="cosine", warmup_steps=1)
    )
    return dict(
        base=dict(path=str(HERE / "base"), param_dtype="float32"),
        compute=dict(dtype="float32"),
        adapters={name: adapters[name] for name in NAMES},
        training=dict(steps=5, log_every=1, eval_every=2, seed=3, max_batch_rows=15),
    )
"""
STEPS = {"lora": 5, "mixlora": 3, "small": 6, "mola": 4}  # small: 1.5 times 11 rows by threes
PAIRS = [("lora", "mixlora"), ("small", "mixlora"), ("mola", "lora")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """Function that trains a set of adapters together once, and returns the work directory."""
    runs = {}

    def run(*names):
        if names not in runs:
            config = inputs.with_name(f"{'_'.join(names)}.py")
            config.write_text(f"{inputs.read_text()}{ADAPTERS}\n\nNAMES = {names}\n")
            runs[names] = tmp_path_factory.mktemp("runs") / config.stem
            with one_device():
                train(read_config(config), runs[names], lambda line: None)
        return runs[names]

    return run


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_training_together_equals_training_alone(trained, pair):
    together = trained(*pair)
    theirs = {line["step"]: line for line in metric_lines(together) if "tokens" in line}
    for name in pair:
        alone = trained(name)
        expected, actual = final_adapter(alone, name), final_adapter(together, name)
        assert expected.keys() == actual.keys()
        for path, leaf in expected.items():
            np.testing.assert_allclose(actual[path], leaf, **ROUNDING, err_msg=f"{name}: {path}")
            # B starts at zero and moves by far more than the tolerance.
            assert np.abs(leaf).max() > 100 * ROUNDING["atol"], f"{name}: {path}"
        lines = [line for line in metric_lines(alone) if "tokens" in line]
        assert [line["step"] for line in lines] == list(range(1, STEPS[name] + 1))
        for line in lines:
            for metric in (f"{name}/loss", f"{name}/grad_norm", f"{name}/learning_rate"):
                other = theirs[line["step"]][metric]
                assert line[metric] == pytest.approx(other, rel=1e-4), (metric, line["step"])
            assert line[f"{name}/target_tokens"] == theirs[line["step"]][f"{name}/target_tokens"]
        # Different padding makes the comparison stricter.
        assert {line["step"]: line["padding_share"] for line in lines} != {
            step: line["padding_share"] for step, line in theirs.items()
        }
        losses = [
            [
                (line["step"], line[f"validation/{name}/held_out/loss"])
                for line in of
                if f"validation/{name}/held_out/loss" in line
            ]
            for of in (metric_lines(alone), metric_lines(together))
        ]
        assert losses[0] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses[1]]
