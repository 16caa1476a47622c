"""Every file in configs/ parses, and describes the model in its name."""

import math
from pathlib import Path

import jax
import pytest

from moe_jax.adapters import METHODS
from moe_jax.config.command_line import load_config_file
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.hf.config import model_config_from_hf
from moe_jax.loaded.adapter_base import expected_leaves
from moe_jax.loaded.rank_match import match_ranks
from moe_jax.training.step.program import build_program

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))


def _config(name: str) -> RunConfig:
    return parse_run_config(load_config_file(f"{CONFIGS / name}.py"), METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_parses_and_opens_with_its_command(name):
    adapters = _config(name).adapters
    # 3 learning rates times 2 ranks; 2 methods times 3 seeds; 2 methods, 3 rates, 2 seeds; on a
    # real model, 2 methods times 3 seeds, or 4 rates.
    # The README's commands name the single adapter of the other files.
    several = {"tiny_sweep": 6, "tiny_comparison": 6, "tiny_comparison_rates": 12}
    several |= {"tiny_multitask": 1, "llama7b_mixlora_multitask": 1}
    several |= {"smollm2_tasks": 6, "smollm2_tasks_rates": 10}
    assert list(adapters) == ["default"] or len(adapters) == several[name]
    text = (CONFIGS / f"{name}.py").read_text()
    assert f"python train.py --config configs/{name}.py" in text


def _mixlora_layer(
    width: int, kv_width: int, ffn_width: int, query_width: int | None = None
) -> int:
    """Rank 16: pairs on q and o, on k and v, 8 experts of three pairs, and a router."""
    attention = 2 * 16 * (width + (query_width or width)) + 2 * 16 * (width + kv_width)
    return attention + 8 * 3 * 16 * (width + ffn_width) + width * 8


def _qwen3_5_4b() -> int:
    """Rank 16: FFNs of 8 experts in 32 layers, pairs on full attention in 8 and linear in 24."""
    ffn = 8 * 3 * 16 * (2560 + 9216) + 2560 * 8
    # Queries with gates are 8192 channels, keys and values 1024.
    full = 16 * ((2560 + 8192) + 2 * (2560 + 1024) + (4096 + 2560))
    # 2048 channels of queries and keys each and 4096 of values, a gate and the output.
    linear = 16 * ((2560 + 8192) + (2560 + 4096) + (4096 + 2560))
    return 32 * ffn + 8 * full + 24 * linear


def _gemma4_e4b() -> int:
    """Rank 16: of 24 layers with keys every sixth is full, of 18 without them too."""
    ffn = 8 * 3 * 16 * (2560 + 10240) + 2560 * 8
    queries = 2 * 16 * (35 * (2560 + 8 * 256) + 7 * (2560 + 8 * 512))  # and the output
    keys = 2 * 16 * (20 * (2560 + 2 * 256) + 4 * (2560 + 2 * 512))  # and values
    return 42 * ffn + queries + keys


def test_compared_methods_have_equal_numbers_of_parameters():
    config = _config("smollm2_tasks")
    model = model_config_from_hf(config.base.hf_config, "smollm2_tasks")
    sizes = {
        name: sum(math.prod(shape) for shape, _ in expected_leaves(model, method).values())
        for name, method in config.methods.items()
    }
    # A unit of rank has 10,176 weights a layer; an expert's has 6,336, and the router 576 x 8.
    assert sizes["lora-0"] == 30 * 43 * 10176
    assert sizes["mixlora-0"] == 30 * (8 * (3840 + 8 * 6336) + 4608)


@pytest.mark.parametrize(
    ("name", "lora", "mixlora", "rank"),
    [
        ("smollm2_tasks", "lora-0", "mixlora-0", 43),
        ("llama7b_mixlora_multitask", "lora", "mixlora", 81),
    ],
)
def test_ranks_worked_out_by_hand_are_those_of_a_match(name, lora, mixlora, rank):
    """They are numbers in the files so that each adapter can be trained without the other."""
    raw = {**load_config_file(f"{CONFIGS / name}.py"), "train_only": (lora, mixlora)}
    method = raw["adapters"][lora]["method"]
    assert method["rank"] == rank
    method["rank"] = f"match:{mixlora}"
    config = parse_run_config(raw, METHODS)
    model = model_config_from_hf(config.base.hf_config, name)
    assert match_ranks(config.methods, model).methods[lora].rank == rank


# Parameters of the checkpoints, from their model cards and safetensors indices.
@pytest.mark.parametrize(
    ("name", "base", "trainable"),
    [
        ("llama7b_mixlora", 6_738_415_616, 32 * _mixlora_layer(4096, 4096, 11008)),
        ("llama7b_lora", 6_738_415_616, 32 * 80 * (4 * (4096 + 4096) + 3 * (4096 + 11008))),
        ("llama3_8b_mixlora", 8_030_261_248, 32 * _mixlora_layer(4096, 1024, 14336)),
        ("llama3_1_8b_mixlora", 8_030_261_248, 32 * _mixlora_layer(4096, 1024, 14336)),
        ("llama3_2_1b_mixlora", 1_235_814_400, 16 * _mixlora_layer(2048, 512, 8192)),
        ("llama3_2_3b_mixlora", 3_212_749_824, 28 * _mixlora_layer(3072, 1024, 8192)),
        ("mistral_7b_mixlora", 7_248_023_552, 32 * _mixlora_layer(4096, 1024, 14336)),
        ("phi4_mini_mixlora", 3_836_021_760, 32 * _mixlora_layer(3072, 1024, 8192)),
        ("phi4_mixlora", 14_659_507_200, 40 * _mixlora_layer(5120, 1280, 17920)),
        ("smollm3_3b_mixlora", 3_075_098_624, 36 * _mixlora_layer(2048, 512, 11008)),
        ("qwen3_1_7b_mixlora", 1_720_574_976, 28 * _mixlora_layer(2048, 1024, 6144)),
        # The queries of the others are as wide as the model.
        ("qwen3_4b_mixlora", 4_022_468_096, 36 * _mixlora_layer(2560, 1024, 9728, 4096)),
        ("qwen3_8b_mixlora", 8_190_735_360, 36 * _mixlora_layer(4096, 1024, 12288)),
        ("qwen3_5_4b_mixlora", 4_205_751_296, _qwen3_5_4b()),
        ("gemma3_1b_mixlora", 999_885_952, 26 * _mixlora_layer(1152, 256, 6912, 1024)),
        ("gemma3_4b_mixlora", 3_880_263_168, 34 * _mixlora_layer(2560, 1024, 10240, 2048)),
        # The sum over the shapes of transformers' modules.
        ("gemma4_e4b_mixlora", 7_463_013_418, _gemma4_e4b()),
        ("smollm2_135m_mixlora", 134_515_008, 30 * _mixlora_layer(576, 192, 1536)),
        ("smollm2_1_7b_mixlora", 1_711_376_384, 24 * _mixlora_layer(2048, 2048, 8192)),
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
