"""Every file in configs/ parses, and describes the model in its name."""

import importlib
from pathlib import Path

import jax
import pytest

from moe_jax.adapters import METHODS
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.hf.config import model_config_from_hf
from moe_jax.training.step.program import build_program

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.py"))


def _config(name: str) -> RunConfig:
    raw = importlib.import_module(f"configs.{name}").get_config()
    return parse_run_config(raw.to_dict(), METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_parses_and_opens_with_its_command(name):
    adapters = _config(name).adapters
    # 3 learning rates times 2 ranks; 2 methods times 3 seeds; 2 methods, 3 rates, 2 seeds.
    # The README's commands name the single adapter of the other files.
    several = {"tiny_sweep": 6, "tiny_comparison": 6, "tiny_comparison_rates": 12}
    several |= {"tiny_multitask": 1, "llama7b_mixlora_multitask": 1}
    assert list(adapters) == ["default"] or len(adapters) == several[name]
    text = (Path(__file__).parents[2] / "configs" / f"{name}.py").read_text()
    assert f"python train.py --config configs/{name}.py" in text


def _mixlora_layer(width: int, kv_width: int, ffn_width: int) -> int:
    """Rank 16: pairs on q and o, on k and v, 8 experts of three pairs, and a router."""
    attention = 2 * 16 * (width + width) + 2 * 16 * (width + kv_width)
    return attention + 8 * 3 * 16 * (width + ffn_width) + width * 8


# Parameters of the checkpoints, from their model cards and safetensors indices.
@pytest.mark.parametrize(
    ("name", "base", "trainable"),
    [
        ("llama7b_mixlora", 6_738_415_616, 32 * _mixlora_layer(4096, 4096, 11008)),
        ("llama7b_lora", 6_738_415_616, 32 * 80 * (4 * (4096 + 4096) + 3 * (4096 + 11008))),
        ("llama3_8b_mixlora", 8_030_261_248, 32 * _mixlora_layer(4096, 1024, 14336)),
        ("tinyllama_mixlora", 1_100_048_384, 22 * _mixlora_layer(2048, 256, 5632)),
    ],
)
def test_config_describes_the_checkpoint_in_its_name(name, base, trainable):
    program, size = _sizes(name)
    assert sum(leaf.size for leaf in jax.tree.leaves(program.abstract_params)) == base
    assert size == trainable


def test_the_baseline_trains_as_many_parameters_as_mixlora():
    _, lora = _sizes("llama7b_lora")
    _, mixlora = _sizes("llama7b_mixlora")
    assert 0.98 < lora / mixlora <= 1.0


def _sizes(name: str):
    config = _config(name)
    model = model_config_from_hf(config.base.hf_config, name)
    program = build_program(config, model, total_steps=10)
    return program, sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.adapters))
