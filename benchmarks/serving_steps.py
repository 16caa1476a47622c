"""Estimated time of the server's decoding step on a GPU, of programs compiled for it.

    python benchmarks/serving_steps.py
    python benchmarks/serving_steps.py --size 8b --rows 16,64 --length 1024 --output FILE.json

The program that computes the next token of each row, with rows of one adapter and of four in equal
parts, is compiled from shapes for a chip that need not be present, and `moe_jax.compiled.roofline`
models its time kernel by kernel. Nothing runs on the chip. The rows have `--length` tokens each,
which is a constant here, so that the rounds of the loop over their blocks are counted. The server's
own program checks on the host after each round whether it is the last, which is not counted, and
neither is the program that writes the new keys and values to the cache.

Columns: number of rows and of adapters; estimated milliseconds of a step, also as a ratio to one
adapter; tokens a second; kernel launches; GB that kernels read and write; GiB of the arguments
(weights, cache) and of the temporaries.

Needs Linux and jax with its CUDA plugin (`pip install 'jax[cuda13]'`); no accelerator.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.decode import KINDS, adapter_shapes
from benchmarks.report import (
    check_output,
    check_positive,
    machine,
    one_line,
    refuse,
    say,
    table,
    without_compilation_cache,
    write_json,
)
from benchmarks.sizes import SIZE_HELP, model_of
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.row_window import RowWindow
from moe_jax.compiled.chips import chip_named
from moe_jax.compiled.estimate import estimate
from moe_jax.compiled.target import compiler_version, target_devices
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.errors import ConfigError, UserError
from moe_jax.layers.block_cache import BlockPool
from moe_jax.models.adapted import abstract_params, pairs_in_dtype
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.serving import model_calls
from moe_jax.serving.adapter_slots import SLOTS, SlotLayout, slot_name
from moe_jax.serving.call_rows import row_settings
from moe_jax.serving.limits import EngineLimits
from moe_jax.serving.model_calls import Cache, Call, SlotAdapter, method_key
from moe_jax.serving.row_sampling import TokenHistory
from moe_jax.serving.serving_model import BLOCKS_AT_ONCE
from moe_jax.sharding.compiler_options import compiler_options


def adapter_of(args: argparse.Namespace, config: ModelConfig) -> tuple[AdapterMethod, Any]:
    """The method of the adapters, and the shapes of one."""
    fields = KINDS["mixlora"]
    assert fields is not None
    return adapter_shapes({**fields, "rank": args.rank}, config)


def layout_of(
    args: argparse.Namespace, config: ModelConfig, rows: int, adapters: int
) -> SlotLayout:
    """The server's layout for rows of `adapters` adapters in equal parts; 0 is the base."""
    if not adapters:
        return SlotLayout(rows)
    method, _ = adapter_of(args, config)
    return SlotLayout(rows, (method,) * adapters, rows // adapters)


def step_shapes(
    args: argparse.Namespace, config: ModelConfig, layout: SlotLayout
) -> tuple[Any, ...]:
    """Shapes of a decoding step's arguments."""
    rows, groups = layout.size, -(-args.length // (args.block * args.group))
    entries = groups * args.group
    dtype = jnp.dtype(args.dtype)
    language_model = LlamaForCausalLM(config, ComputeConfig(dtype=args.dtype), (), args.dtype)
    _, tree = adapter_of(args, config)
    tree = jax.eval_shape(lambda tree: pairs_in_dtype(dtype, tree), tree)
    adapters = {slot_name(index): SlotAdapter(tree, {}) for index in range(len(layout.methods))}
    shape: Any = jax.ShapeDtypeStruct
    pool = shape(
        (config.num_layers, rows * entries + 1, config.num_kv_heads, args.block, config.head_dim),
        dtype,
    )
    history = TokenHistory(
        shape((rows + 1, config.vocab_size), jnp.int32),
        shape((rows + 1, config.vocab_size), jnp.bool_),
    )
    integers = np.zeros(rows, np.int32)
    window = RowWindow(np.int32(0), np.ones(layout.window, bool))
    call = Call(
        tokens=integers,
        token_mask=np.ones((rows, 1), bool),
        slots=integers,
        tables=np.zeros((rows, groups, args.group), np.int32),
        lengths=None,
        prompt_length=integers,
        windows=dict.fromkeys(adapters, window),
    )
    settings = row_settings([], rows, config.vocab_size)
    params = nn.meta.unbox(abstract_params(language_model))
    row_values: Any = {method_key(method): {} for method in layout.methods}  # MixLoRA has none
    return params, adapters, Cache(BlockPool(pool, pool), row_values), history, call, settings


def lowered_step(
    args: argparse.Namespace, config: ModelConfig, layout: SlotLayout, device: Any
) -> jax.stages.Lowered:
    """Traces a decoding step of rows of `--length` tokens."""
    compute = ComputeConfig(dtype=args.dtype, attention="xla", remat="none")
    model = LlamaForCausalLM(config, compute, layout.adapter_rows, args.dtype)

    def step(params: Any, adapters: Any, cache: Any, history: Any, call: Any, settings: Any) -> Any:
        call = call._replace(lengths=np.full(layout.size, args.length - 1, np.int32))
        return model_calls.decode(
            model, config.vocab_size, params, adapters, cache, history, call, settings
        )

    shapes = step_shapes(args, config, layout)
    sharding = SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
    )
    return jax.jit(step, donate_argnums=3).lower(*placed)


def figures_of(
    args: argparse.Namespace, config: ModelConfig, rows: int, adapters: int, device: Any
) -> dict[str, Any]:
    """Figures of a step of `rows` rows; see `layout_of`."""
    layout = layout_of(args, config, rows, adapters)
    lowered = lowered_step(args, config, layout, device)
    compiled = lowered.compile(compiler_options=compiler_options(device))
    program = estimate(compiled, chip_named(args.compile_for), args.dtype)
    total = program.model.total
    return {
        "rows": rows,
        "adapters": adapters,
        "modeled_seconds": total.seconds,
        "tokens_per_second": rows / total.seconds,
        "kernels": total.kernels,
        "moved_bytes": total.moved,
        "argument_bytes": program.memory.arguments,
        "temporary_bytes": program.memory.temporary,
        "loops_of_unknown_length": program.model.unknown_loops,
    }


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    one = {row["rows"]: row["modeled_seconds"] for row in rows if row["adapters"] == 1}
    cells = [
        [
            f"{row['rows']}",
            f"{row['adapters']}",
            f"{row['modeled_seconds'] * 1e3:.2f}",
            f"{row['modeled_seconds'] / one[row['rows']]:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['kernels']}",
            f"{row['moved_bytes'] / 1e9:.1f}",
            f"{row['argument_bytes'] / 2**30:.2f}",
            f"{row['temporary_bytes'] / 2**30:.2f}",
        ]
        for row in rows
    ]
    heads = ["rows", "adapters", "model ms", "/ one adapter", "tokens/s", "kernels", "GB moved"]
    return table([*heads, "arg. GiB", "temp. GiB"], cells)


def check(args: argparse.Namespace) -> None:
    """Checks the flags, and parses the numbers of rows.

    Raises:
      ConfigError: a flag is invalid.
    """
    check_output(args.output)
    check_positive(args, ("length", "rank", "block", "group"))
    parts = args.rows.split(",")
    if not all(part.isdigit() and int(part) > 0 and int(part) % SLOTS == 0 for part in parts):
        raise ConfigError(f"--rows: expected multiples of {SLOTS}, separated by commas")
    args.rows = [int(part) for part in parts]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--size", default="7b", help=SIZE_HELP)
    add("--rows", default="16", help="numbers of rows that decode side by side (16)")
    add("--length", type=int, default=1024, help="tokens of each row (1024)")
    add("--rank", type=int, default=16, help="rank on attention and of each expert (16)")
    add("--block", type=int, default=EngineLimits().block, help="tokens of a block (%(default)s)")
    add(
        "--group",
        type=int,
        default=BLOCKS_AT_ONCE,
        help="blocks that attention reads at once (%(default)s)",
    )
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    add("--compile-for", default="h200", metavar="CHIP", help="as of gpu_step.py (h200)")
    add("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    try:
        check(args)
        (device,) = target_devices(args.compile_for)
        config, rows = model_of(args.size, None), []
        with without_compilation_cache():
            for count in args.rows:
                for adapters in (0, 1, SLOTS):
                    say(f"{count} rows, {adapters} adapters: compiling")
                    rows.append(figures_of(args, config, count, adapters, device))
        facts = machine()
        plugin = compiler_version(chip_named(args.compile_for).platform)
        print(
            f"estimate for {device.device_kind}, compiled by {plugin}, nothing was run: "
            f"{args.size} in {args.dtype}, rows of {args.length} tokens; {one_line(facts)}"
        )
        print(as_table(rows))
        write_json(
            args.output, args, benchmark="serving_steps", is_estimate=True, machine=facts, rows=rows
        )
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
