"""FLOPs and memory of linear and full attention against the length of a row.

    python benchmarks/delta_rule.py --output benchmarks/delta_rule.md

The attention of one layer, with its frozen projections and without the FFN, is compiled forward and
backward to its input, without weights. FLOPs and temporary memory are read from the compiled
program and have no noise. Widths are those of Qwen3.5-4B.

Needs jax and flax only.
"""

import argparse
import functools
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.compiled_flops import compiled_flops
from benchmarks.report import check_output, refuse, say
from moe_jax.config.attention import LINEAR_ATTENTION, SELF_ATTENTION, DeltaNetConfig
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.config.rope import RopeConfig
from moe_jax.errors import ConfigError, UserError
from moe_jax.layers.delta_rule import CHUNK, CHUNKS
from moe_jax.layers.frozen import storage_of
from moe_jax.layers.rope import rotary_tables
from moe_jax.models.attention import SelfAttention
from moe_jax.models.delta_net import GatedDeltaNet
from moe_jax.models.layer_inputs import LayerSettings, TokenContext

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)

MODEL = ModelConfig(
    vocab_size=248320,
    hidden_size=2560,
    intermediate_size=9216,
    num_layers=4,
    num_heads=16,
    num_kv_heads=4,
    head_dim=256,
    hidden_act="silu",
    max_position_embeddings=262144,
    rms_norm_eps=1e-6,
    rope=RopeConfig(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25),
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    qk_norm=True,
    norm_unit_offset=True,
    attention_gate=True,
    layer_types=("linear_attention",) * 3 + ("full_attention",),
    delta_net=DeltaNetConfig(
        num_key_heads=16,
        num_value_heads=32,
        key_head_dim=128,
        value_head_dim=128,
        filter_width=4,
    ),
)


class Cost(NamedTuple):
    """Cost of one layer's attention for one row, forward and backward.

    Attributes:
      flops: FLOPs of a token.
      memory: temporary bytes of a token.
    """

    flops: float
    memory: float


def cost_of(kind: str, length: int) -> Cost:
    """Cost of `linear_attn` or `self_attn` for a row of `length` tokens, in bfloat16."""
    classes = {LINEAR_ATTENTION: GatedDeltaNet, SELF_ATTENTION: SelfAttention}
    compute = ComputeConfig(dtype="bfloat16", attention="xla")
    settings = LayerSettings(MODEL, compute, storage_of("bfloat16"), (), True)
    module = classes[kind](settings)

    def attend(params: dict, x: jax.Array) -> jax.Array:
        shape = (MODEL.head_dim, MODEL.max_position_embeddings)
        cos, sin = rotary_tables(MODEL.rope, *shape, jnp.arange(length)[None])
        context = TokenContext(cos, sin, None, jnp.ones((1, length), bool), None)
        output, _ = module.apply({"params": params}, x, context, jnp.int32(0), {})
        return output

    def both_ways(params: dict, x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        output, backward = jax.vjp(functools.partial(attend, params), x)
        return output, backward(weights)[0]

    x = jax.ShapeDtypeStruct((1, length, MODEL.hidden_size), jnp.bfloat16)
    short = jnp.zeros((1, 2, MODEL.hidden_size), jnp.bfloat16)
    table = jnp.zeros((1, 2, MODEL.rope.rotary_dim(MODEL.head_dim)))
    context = TokenContext(table, table, None, jnp.ones((1, 2), bool), None)
    init = functools.partial(module.init, context=context, layer_index=jnp.int32(0), contexts={})
    params = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), short))["params"]
    compiled = jax.jit(both_ways).lower(params, x, x).compile()
    flops = compiled_flops(compiled)
    if flops.unknown_loops:
        raise ValueError(f"{flops.unknown_loops} loops of an unknown number of iterations")
    memory = compiled.memory_analysis()
    if memory is None:
        raise ValueError("this platform does not report the memory of a program")
    return Cost(flops.total / length, memory.temp_size_in_bytes / length)


def as_markdown(costs: dict[int, dict[str, Cost]]) -> str:
    """The table, one row for each length."""
    net = MODEL.delta_net
    assert net is not None
    state_bytes = 4 * net.value_dim * net.key_head_dim / (CHUNK * CHUNKS)
    states = f"{net.num_value_heads} states of {net.key_head_dim} x {net.value_head_dim}"
    text = f"""
        The attention of one layer of Qwen3.5-4B (width {MODEL.hidden_size}; {states} against
        {MODEL.num_heads} heads of {MODEL.head_dim}), forward and backward, with the frozen
        projections and without adapters, as compiled by XLA for a CPU in bfloat16, one row. Figures
        are of a token. Written by `python benchmarks/delta_rule.py --output
        benchmarks/delta_rule.md`. Unless `compute.remat` is `none`, a layer's memory is free again
        after its backward pass. Of linear attention's memory, {state_bytes / 1e3:.0f} kB are the
        states that are kept for the backward pass, one after every {CHUNK * CHUNKS} tokens; one
        after every {CHUNK} would take {CHUNKS} times as much."""
    lines = [
        "# Linear and full attention by length",
        "",
        textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False),
        "",
        "| length | MFLOPs, linear | full | kB, linear | full |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for length, found in costs.items():
        linear, full = found[LINEAR_ATTENTION], found[SELF_ATTENTION]
        cells = [f"{length:,}", f"{linear.flops / 1e6:.1f}", f"{full.flops / 1e6:.1f}"]
        cells += [f"{linear.memory / 1e3:.0f}", f"{full.memory / 1e3:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a row (512 to 32768)"
    )
    args = parser.parse_args(argv)
    try:
        check_output(args.output)
        if min(args.lengths) < 1:
            raise ConfigError("--lengths: must be positive")
    except UserError as error:
        return refuse(error)
    costs = {}
    for length in args.lengths:
        say(f"{length} tokens")
        costs[length] = {kind: cost_of(kind, length) for kind in (LINEAR_ATTENTION, SELF_ATTENTION)}
    text = as_markdown(costs)
    print(text)
    if args.output:
        args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
