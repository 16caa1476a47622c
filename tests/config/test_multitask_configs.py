"""Multi-task configurations: MixLoRA, and on demand a LoRA of equal size beside it."""

from pathlib import Path

import jax
import pytest

from moe_jax.adapters import METHODS
from moe_jax.config.command_line import load_config_file
from moe_jax.config.run import parse_run_config
from moe_jax.errors import ConfigError
from moe_jax.hf.config import model_config_from_hf, read_model_config
from moe_jax.training.step.program import build_program

NAMES = ("llama7b_mixlora_multitask", "tiny_multitask")


def _config(name, **fields):
    raw = load_config_file(str(Path(__file__).parents[2] / "configs" / f"{name}.py"))
    return parse_run_config({**raw, **fields}, METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_one_override_adds_lora(name):
    alone, both = _config(name).adapters, _config(name, train_only=None).adapters
    assert list(alone) == ["mixlora"]
    assert set(both) == {"mixlora", "lora"}
    assert list(_config(name, train_only="lora").adapters) == ["lora"]
    assert both["mixlora"] == alone["mixlora"]
    # Only the method differs.
    assert both["lora"].method != both["mixlora"].method
    for field in ("data", "optimizer", "batch_size", "seed", "evaluation"):
        assert getattr(both["lora"], field) == getattr(both["mixlora"], field)
    trained = [source.task for source in alone["mixlora"].data.train.values()]
    assert set(alone["mixlora"].evaluation.tasks) == set(trained)


# Weights of all layers for each unit of LoRA's rank, by the widths in the configurations.
@pytest.mark.parametrize(
    ("name", "layers", "unit"),
    [
        ("llama7b_mixlora_multitask", 32, 4 * (4096 + 4096) + 3 * (4096 + 11008)),
        ("tiny_multitask", 4, 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 352)),
    ],
)
def test_lora_has_as_many_parameters_as_mixlora(name, layers, unit):
    config = _config(name, train_only=None)
    stated = config.base.hf_config
    model = model_config_from_hf(stated, name) if stated else read_model_config(config.base.path)
    program = build_program(config, model, total_steps=100)
    sizes = {
        adapter: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for adapter, tree in program.abstract_state.adapters.items()
    }
    assert sizes["lora"] == layers * unit * config.adapters["lora"].method.rank
    # No integer rank is nearer.
    assert abs(sizes["lora"] - sizes["mixlora"]) <= layers * unit / 2
    assert sizes["lora"] <= sizes["mixlora"]


@pytest.mark.parametrize(
    ("train_only", "message"),
    [
        ("lra", "config.train_only: unknown adapter 'lra'; did you mean 'lora'?"),
        ((), r"config.train_only: expected names of adapters, or None, got \(\)"),
        (3, "config.train_only: expected names of adapters, or None, got 3"),
    ],
)
def test_unknown_adapters_are_refused(train_only, message):
    with pytest.raises(ConfigError, match=message):
        _config("tiny_multitask", train_only=train_only)
