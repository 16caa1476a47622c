"""The benchmark of the training step: its figures agree with each other and with counts by hand."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import COMPILED_COUNTS, FEW_OPERATIONS_GRADIENT, OF_RANDOM_NUMBERS

from benchmarks import step_comparison, train_step
from benchmarks.compiled_flops import compiled_flops
from benchmarks.peak_memory import PeakMemory
from benchmarks.random_inputs import random_params
from benchmarks.sizes import SIZES, model_of
from benchmarks.timing import interleaved
from benchmarks.training_steps import needed_of_frozen
from moe_jax.compiled import matrix_rate
from moe_jax.config.model import ComputeConfig
from moe_jax.layers.quantized import dense_kernel
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.records.plan import parameter_count

ROOT = Path(__file__).parents[2]
ROWS, LENGTH = 4, 16

# What is installed with the package, but not with jax, flax, optax and numpy; flax brings orbax.
_BLOCKED = """
import sys

class Blocked:
    names = {"datasets", "grain", "huggingface_hub", "jinja2", "matplotlib", "ml_collections",
             "orbax", "peft", "pyarrow", "safetensors", "tokenizers", "torch", "tqdm",
             "transformers"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocked())
import benchmarks.decode
from benchmarks.train_step import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Figures of a run with jax, flax, optax and numpy only, except in the process of peft."""
    output = tmp_path_factory.mktemp("benchmark") / "figures.json"
    flags = f"--size tiny --rows {ROWS} --length {LENGTH} --rounds 2 --no-peak --peft".split()
    command = [sys.executable, "-c", _BLOCKED, *flags, "--output", output]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for method in ("frozen", "lora", "mixlora", "peft", "matrix product"):
        assert f"\n{method}" in done.stdout
    return json.loads(output.read_text())


@pytest.fixture
def rows(figures):
    return {row["method"]: row for row in figures["rows"]}


def test_the_report_has_all_methods_and_the_machine(figures, rows):
    assert list(rows) == ["frozen", "lora", "mixlora", "peft"]
    assert {row["error"] for row in rows.values()} == {None}
    machine = figures["machine"]
    assert machine["versions"]["jax"] == jax.__version__
    assert {"date", "command", "processor", "cores", "load_average", "devices"} <= set(machine)
    assert figures["settings"]["size"] == "tiny"


def test_as_many_weights_are_trained(rows):
    # Four pairs of rank 8 on attention, of K and V half as wide; three of rank 64 on the FFN.
    layer = 8 * (2 * (64 + 64) + 2 * (64 + 32)) + 64 * 3 * (64 + 176)
    trained = {name: row["trainable_parameters"] for name, row in rows.items()}
    assert trained["frozen"] == 0
    assert trained["lora"] == trained["peft"] == 2 * layer
    assert trained["lora"] < trained["mixlora"] <= 1.02 * trained["lora"]


def test_the_weights_and_the_step_are_those_of_peft(rows):
    # The first loss is of the base, as B is zero; the second comes after one step of the optimizer.
    losses, expected = rows["lora"]["losses"], rows["peft"]["losses"]
    np.testing.assert_allclose(losses, expected, **FEW_OPERATIONS_GRADIENT)
    assert abs(losses[1] - losses[0]) > 1e-3
    assert rows["frozen"]["losses"][0] == pytest.approx(
        losses[0], rel=FEW_OPERATIONS_GRADIENT["rtol"]
    )


def test_operations_grow_with_what_is_done(figures, rows):
    flops = {name: rows[name]["compiled_flops"] for name in ("frozen", "lora", "mixlora")}
    assert figures["needed_flops"] < flops["frozen"] < flops["lora"] < flops["mixlora"]
    # Of the frozen model, all matrix products and the whole square of attention, plus what is
    # elementwise, which so narrow a model feels.
    assert flops["frozen"] < 1.35 * figures["needed_flops"]
    assert {rows[name]["loops_of_unknown_length"] for name in flops} == {0}


def test_speeds_follow_from_seconds(figures, rows):
    rate = figures["matrix_product"]["flops_per_second"]["median"]
    for row in rows.values():
        seconds = row["seconds"]["median"]
        assert row["seconds"]["lowest"] <= seconds <= row["seconds"]["highest"]
        assert len(row["samples"]) == 2
        assert row["tokens_per_second"] == pytest.approx(ROWS * LENGTH / seconds)
        needed = figures["needed_flops"] / seconds
        assert row["needed_flops_per_second"] == pytest.approx(needed)
        assert row["needed_share_of_product"] == pytest.approx(needed / rate)
        if row["method"] != "peft":
            assert row["flops_per_second"] == pytest.approx(row["compiled_flops"] / seconds)
            assert row["compile_seconds"] > 0
            assert row["temporary_bytes"] > 0
    assert rows["lora"]["ratio_to_lora"] == {"median": 1.0, "lowest": 1.0, "highest": 1.0}


# The papers' and model cards' numbers of parameters.
PUBLISHED = {
    "160m": 162_417_408,
    "1.1b": 1_100_048_384,
    "3b": 3_212_749_824,
    "7b": 6_738_415_616,
    "8b": 8_030_261_248,
    "13b": 13_015_864_320,
}


def _abstract_params(size, param_dtype="float32"):
    model = LlamaForCausalLM(SIZES[size], ComputeConfig(dtype="float32"), (), param_dtype)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return jax.tree.map(
        lambda box: box.unbox(), variables["params"], is_leaf=lambda n: hasattr(n, "unbox")
    )


@pytest.mark.parametrize("size", PUBLISHED)
def test_named_sizes_are_the_published_ones(size):
    assert parameter_count(_abstract_params(size)) == PUBLISHED[size]


def test_random_weights_are_of_the_given_type_and_size():
    params = random_params(_abstract_params("tiny", "nf4"), None, "nf4")
    kernel = dense_kernel(params["layers"]["mlp"]["up_proj"]["kernel"]).astype(jnp.float32)
    assert kernel.shape == (2, 64, 176)
    assert float(jnp.std(kernel)) == pytest.approx(0.02, rel=OF_RANDOM_NUMBERS)
    assert float(jnp.max(jnp.abs(kernel[0] - kernel[1]))) > 0.01
    assert params["embed_tokens"]["embedding"].dtype == jnp.bfloat16
    assert set(np.asarray(params["norm"]["scale"], np.float32)) == {1.0}


def test_needed_operations_of_llama_2_7b():
    # Without the embedding and the norms 6,607,077,376 weights, 4 operations each; and 32 layers of
    # attention with 4096 query channels, of which each has 12 for each of (S + 1) / 2 positions.
    token = 4 * 6_607_077_376 + 32 * 6 * 2049 * 4096
    assert needed_of_frozen(model_of("7b"), rows=2, length=2048) == 2 * 2048 * token


def test_loops_are_counted_as_often_as_they_run():
    def nested(x, weights):
        def inner(x, _):
            return x @ weights, None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=3)[0] @ weights, None

        return jax.lax.scan(outer, x, length=5)[0] @ weights

    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    compiled = jax.jit(nested).lower(x, x).compile()
    flops = compiled_flops(compiled)
    products = 5 * (3 + 1) + 1
    # Besides the products there are the loops' own counters.
    assert flops.total == pytest.approx(products * 2 * 16**3, rel=COMPILED_COUNTS)
    assert flops.unknown_loops == 0
    costs = compiled.cost_analysis()
    assert costs["flops"] < 0.2 * flops.total


def test_loops_whose_length_is_not_written_are_as_long_as_their_condition_says():
    def rounds(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x)

    compiled = jax.jit(rounds).lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile()
    text = compiled.as_text()
    # As the compiler for TPUs prints it, which names the cores that run a computation.
    other = text.replace("known_trip_count", "not_known").replace(
        "\n}\n", '\n}, execution_thread="sparsecore"\n'
    )
    assert "known_trip_count" in text
    assert 'thread="sparsecore"' in other
    printed = SimpleNamespace(as_text=lambda: other)
    known = compiled_flops(compiled)
    assert compiled_flops(printed, fixed_loops=True) == known
    once = compiled_flops(printed)
    assert once.unknown_loops == 1
    assert once.total < 0.3 * known.total


def test_rounds_take_turns_and_leave_out_what_does_not_fit():
    order = []

    def step(name):
        order.append(name)
        if name == "b":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return 1.0

    samples, failed = interleaved({name: lambda name=name: step(name) for name in "abc"}, 3)
    assert samples == {"a": [1.0] * 3, "b": [], "c": [1.0] * 3}
    assert failed == {"b": "out of memory"}
    assert order == ["a", "b", "c", "c", "a", "c", "a"]

    order.clear()
    samples, failed = interleaved({name: lambda name=name: step(name) for name in "ab"}, 2, 1)
    assert (samples, failed) == ({"a": [1.0] * 2, "b": []}, {"b": "out of memory"})
    assert order.count("b") == 1, "it has failed while it warmed up, and is left out since"


def test_a_method_out_of_memory_is_reported_and_the_run_continues(monkeypatch, tmp_path, capsys):
    def refuse(name, args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(step_comparison, "compiled_step", refuse)
    monkeypatch.setitem(matrix_rate._WIDTHS, "cpu", 256)
    output = tmp_path / "figures.json"
    assert train_step.main(["--size", "tiny", "--no-peak", "--rounds=1", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    errors = {row["method"]: row["error"] for row in json.loads(output.read_text())["rows"]}
    assert errors == dict.fromkeys(("frozen", "lora", "mixlora"), "out of memory")
    assert "mixlora: out of memory\n" in printed


def test_peak_memory_is_of_what_comes_later():
    peak = PeakMemory(jax.devices()[:1])
    np.ones(2**26, np.uint8)
    taken = peak.bytes()
    assert taken is not None
    # The kernel counts pages that were touched lately with a delay.
    assert 0.95 * 2**26 <= taken < 1.5 * 2**26


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size", "tny"], "--size: no size is called 'tny'; did you mean 'tiny'?"),
        (["--methods", "mixlra"], "--methods: no method is called 'mixlra'; did you mean"),
        (["--methods", "mixlora", "--top-k", "9"], "--methods mixlora.router.top_k: 9 experts"),
        (["--remat", "fulll"], "--remat: 'fulll' is not one of"),
        (["--mesh", "fsdp=x"], "--mesh fsdp=x: expected AXIS=N,... with whole numbers"),
        (["--peft", "--methods", "frozen"], "--peft: is compared with 'lora'; name it"),
        (["--peft", "--peft-python", "nowhere/python"], "--peft-python nowhere/python: cannot"),
        (["--output", "nowhere/figures.json"], "--output nowhere/figures.json: there is no folder"),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, words):
    assert train_step.main(flags) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {words}")
    assert printed.err.count("\n") == 1


def test_an_interpreter_without_torch_names_the_extra(tmp_path, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho torch peft\n")
    python.chmod(0o755)
    assert train_step.main(["--peft", f"--peft-python={python}"]) == 2
    assert (
        f"--peft: {python} lacks torch, peft; pip install -e '.[test]'" in capsys.readouterr().err
    )


def test_a_kernel_of_gpus_is_refused_elsewhere(monkeypatch, capsys):
    monkeypatch.setitem(matrix_rate._WIDTHS, "cpu", 256)
    flags = ["--size=tiny", "--no-peak", "--dtype=bfloat16", "--attention=cudnn"]
    assert train_step.main(flags) == 2
    words = "'cudnn' needs an NVIDIA GPU, and jax runs on a cpu; use 'auto' or 'xla'"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: --attention: {words}"
