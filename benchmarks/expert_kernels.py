"""MixLoRA's experts in fused kernels against the einsum form: errors first, then seconds.

    python benchmarks/expert_kernels.py
    python benchmarks/expert_kernels.py --tokens 70 --features 130 --rounds 1  # on a CPU

One layer's expert slots, forward and backward, on random normal inputs. An error is the largest
difference from float32 products, relative to the largest value of an array, and the worst of
arrays; that of the einsum form is its rounding. `repeatable` says whether a second run gave the
same bits. `benchmarks/gpu.py` runs this before whole steps.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import seconds_of
from moe_jax.adapters.expert_slots import SlotInputs, expert_slots
from moe_jax.adapters.fused_slots import fused_expert_slots
from moe_jax.adapters.lora.low_rank import ExpertPairs

WIDTH = 8
"""Width of the model, which the slots do not see."""

FORMS: dict[str, Callable[..., Any]] = {
    "fused": fused_expert_slots,
    "einsum": expert_slots,
}


def measure(
    tokens: int, features: int, rounds: int, experts: int = 8, rank: int = 16, slots: int = 2
) -> dict[str, Any]:
    """Errors and seconds of both forms in bfloat16.

    Args:
      tokens, features: T and F.
      rounds: number of timed rounds, in turns.
      experts, rank, slots: E, R and C.
    """
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return (scale * jax.random.normal(next(keys), shape)).astype(jnp.bfloat16)

    def pair(inputs: int, outputs: int) -> ExpertPairs:
        lora_a = normal(inputs, experts, rank, scale=0.1)
        return ExpertPairs(lora_a, normal(experts, rank, outputs, scale=0.1), None, 1.0)

    wide = ("gate_proj", "up_proj")
    order = jnp.argsort(jax.random.uniform(next(keys), (tokens, experts)), axis=-1)
    dispatch = jax.nn.one_hot(order[:, :slots], experts)
    trained = {
        "products": {name: normal(tokens, features) for name in wide},
        "z": {name: normal(tokens, experts, rank) for name in wide},
        "pairs": {
            **{name: pair(WIDTH, features) for name in wide},
            "down_proj": pair(features, WIDTH),
        },
        "weights": jax.random.uniform(next(keys), (tokens, slots)),
    }
    cotangents = normal(tokens, features), normal(tokens, experts, rank)

    def step(form: str, trained: Any) -> Any:
        def results(trained: Any) -> Any:
            gate, up = (trained["products"][name] for name in wide)
            inputs = SlotInputs(gate, up, None, None, jax.nn.silu, None, None, None)
            terms = trained["pairs"], trained["z"], dispatch, trained["weights"]
            return FORMS[form](inputs, *terms, None)

        values, backward = jax.vjp(results, trained)
        given = [c.astype(v.dtype) for c, v in zip(cotangents, values, strict=True)]
        return values, backward(tuple(given))

    steps = {form: jax.jit(functools.partial(step, form)) for form in FORMS}
    with jax.default_matmul_precision("highest"):
        exact = steps["einsum"](jax.tree.map(lambda x: x.astype(jnp.float32), trained))
    figures: dict[str, Any] = {"tokens": tokens, "features": features}
    for form, function in steps.items():
        once, again = function(trained), function(trained)
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), once, again)
        figures[form] = {
            "error": max(jax.tree.leaves(jax.tree.map(_error, once, exact))),
            "repeatable": all(jax.tree.leaves(same)),
        }
    samples: dict[str, list[float]] = {form: [] for form in steps}
    for _ in range(rounds):
        for form, function in steps.items():
            run = lambda function=function: jax.block_until_ready(function(trained))
            samples[form].append(seconds_of(run))
    for form, seconds in samples.items():
        figures[form]["seconds"] = statistics.median(seconds)
    return figures


def _error(array: jax.Array, exact: jax.Array) -> float:
    difference = jnp.abs(array.astype(jnp.float32) - exact)
    return float(jnp.max(difference) / jnp.maximum(jnp.max(jnp.abs(exact)), 1e-30))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="T (%(default)s)")
    parser.add_argument("--features", type=int, default=11008, help="F (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (%(default)s)")
    args = parser.parse_args()
    print(json.dumps(measure(args.tokens, args.features, args.rounds), indent=2))


if __name__ == "__main__":
    main()
