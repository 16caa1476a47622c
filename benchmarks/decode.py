"""Speed of greedy decoding, compared with transformers and with memory bandwidth.

    python benchmarks/decode.py --output decode.json

A random Llama continues random prompts with `TokenGenerator` and with transformers' `generate` on
the same weights. Both are timed alternately in one process and compared by their ratio.
Transformers decodes the base, which costs as much as a base with a merged LoRA. `TokenGenerator`
decodes the base, an unmerged LoRA and an unmerged MixLoRA. The time between the first new token and
the last is measured, without compilation and the prompts.

Each step reads the cache and every weight of a product. The last column is the share of a step's
time that these reads alone would take, at the bandwidth of rewriting a large array (bytes read and
written), measured between the steps. It exceeds one if the weights stay in the processor's caches.

Needs torch and transformers, as the tests do; with `--alone` (without transformers) only jax, flax,
optax and numpy.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_inputs import random_like, random_params
from benchmarks.report import (
    MEBIBYTE,
    check_output,
    check_positive,
    check_transformers,
    machine,
    one_line,
    refuse,
    write_json,
)
from benchmarks.sizes import SIZE_HELP, hf_fields, model_of
from benchmarks.timing import OUT_OF_MEMORY
from moe_jax.adapters import METHODS
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.tree import TARGET_MODULES
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.config.parse import parse_member
from moe_jax.errors import ConfigError, UserError, is_out_of_memory
from moe_jax.inference.generator import Request, TokenGenerator
from moe_jax.inference.settings import SamplingConfig
from moe_jax.layers.names import PARAMS
from moe_jax.models.adapted import abstract_params, untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM

KINDS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "lora": {"name": "lora"},
    "mixlora": {"name": "mixlora", "num_experts": 8, "router": {"name": "top_k", "top_k": 2}},
}
COPIED_BYTES, PASSES = 2**28, 4


def random_adapter(fields: dict[str, Any], model: ModelConfig) -> tuple[AdapterMethod, Any]:
    """Returns the method of these fields and random weights of an adapter."""
    method, shapes = adapter_shapes(fields, model)
    return method, random_like(shapes)


def adapter_shapes(fields: dict[str, Any], model: ModelConfig) -> tuple[AdapterMethod, Any]:
    """Returns the method of these fields and the shapes of an adapter."""
    fields = {"rank": 8, "alpha": 16.0, "target_modules": TARGET_MODULES, **fields}
    method = parse_member(METHODS, fields, "method")
    language_model = LlamaForCausalLM(model, ComputeConfig(dtype="float32"))
    params = nn.meta.unbox(abstract_params(language_model))
    init = functools.partial(untrained_adapter, language_model, method)
    return method, nn.meta.unbox(jax.eval_shape(init, params, jax.random.key(0)))


def seconds_per_step(
    generator: TokenGenerator, requests: Sequence[Request], new_tokens: int
) -> float:
    """Seconds of a decoding step of `TokenGenerator`."""
    steps = generator.stream(requests, SamplingConfig(), max_new_tokens=new_tokens, eos_ids=())
    next(steps)
    start = time.perf_counter()
    count = sum(1 for _ in steps)
    return (time.perf_counter() - start) / count


def bytes_of_a_step(generator: TokenGenerator, requests: Sequence[Request], new_tokens: int) -> int:
    """Bytes of the weights and the cache that a step reads; an untied embedding is not counted."""
    model, params = generator.model, dict(generator.params)
    if not model.tie_word_embeddings:
        del params["embed_tokens"]
    used = {request.adapter for request in requests}
    weights = [params, *(tree for name, tree in generator.adapters.items() if name in used)]
    count = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    slots = generator.cache_length(max(len(r.tokens) for r in requests), new_tokens)
    heads = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return count + len(requests) * slots * heads * jnp.dtype(generator.dtype).itemsize


class Bandwidth:
    """Measures the bandwidth of memory.

    The array is rewritten in place, since the pages of a new one would be allocated first.
    """

    def __init__(self):
        def rewrite(array: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, PASSES, lambda _, array: array + 1, array)

        self._rewrite = jax.jit(rewrite, donate_argnums=0)
        self._array = jnp.zeros(COPIED_BYTES // 4, jnp.float32)
        self.seconds_per_byte()  # compiles

    def seconds_per_byte(self) -> float:
        """Seconds to read or write a byte, measured at each call."""
        start = time.perf_counter()
        self._array = self._rewrite(self._array).block_until_ready()
        return (time.perf_counter() - start) / (2 * PASSES * COPIED_BYTES)


def decoder(args: argparse.Namespace, model: ModelConfig) -> TokenGenerator:
    """Creates a generator with a random base and random adapters."""
    language_model = LlamaForCausalLM(model, ComputeConfig(dtype=args.dtype), (), args.dtype)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    variables = jax.eval_shape(language_model.init, jax.random.key(0), tokens)
    params = random_params(nn.meta.unbox(variables)[PARAMS], None, args.dtype)
    adapters = {kind: random_adapter(fields, model) for kind, fields in KINDS.items() if fields}
    compute = ComputeConfig(dtype=args.dtype)
    longest = args.prompt + args.new_tokens
    return TokenGenerator(model, params, adapters, compute=compute, max_length=longest)


def transformers_step(
    args: argparse.Namespace, generator: TokenGenerator
) -> Callable[[Sequence[Request], int], float]:
    """Returns a function that measures transformers' seconds per step on the same base."""
    from benchmarks.torch_generation import generate_seconds_per_step
    from benchmarks.torch_llama import torch_llama

    leaves = named_leaves(generator.params)
    arrays = {path.replace("/", "."): np.asarray(leaf) for path, leaf in leaves.items()}
    device = "cpu" if jax.devices()[0].platform == "cpu" else "cuda"
    model = torch_llama(hf_fields(generator.model), arrays, args.dtype, device).eval()
    return lambda requests, new_tokens: generate_seconds_per_step(
        model, [request.tokens for request in requests], new_tokens
    )


def measure(
    args: argparse.Namespace,
    generator: TokenGenerator,
    reference: Callable[[Sequence[Request], int], float] | None,
) -> list[dict[str, Any]]:
    """Figures of every kind at every batch size, with an error if it ran out of memory."""
    bandwidth = Bandwidth()
    rng = np.random.default_rng(0)
    figures = []
    for rows in args.batches:
        prompts = rng.integers(1, generator.model.vocab_size, (rows, args.prompt)).tolist()
        for kind in KINDS:
            name = None if KINDS[kind] is None else kind
            requests = [Request(tuple(tokens), name) for tokens in prompts]
            row: dict[str, Any] = {"kind": kind, "batch": rows, "error": None}
            try:
                row |= one_kind(args, generator, requests, reference, bandwidth)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                row["error"] = OUT_OF_MEMORY
            figures.append(row)
            print_row(row)
    return figures


def one_kind(
    args: argparse.Namespace,
    generator: TokenGenerator,
    requests: Sequence[Request],
    reference: Callable[[Sequence[Request], int], float] | None,
    bandwidth: Bandwidth,
) -> dict[str, Any]:
    """Figures of one kind of requests, from `--repeats` pairs of runs."""
    needed = bytes_of_a_step(generator, requests, args.new_tokens)
    seconds_per_step(generator, requests, args.new_tokens)
    if reference is not None:
        reference(requests, 4)
    samples, reference_samples = [], []
    for _ in range(args.repeats):
        duration = seconds_per_step(generator, requests, args.new_tokens)
        if reference is not None:
            reference_samples.append(reference(requests, args.new_tokens))
        samples.append((duration, needed * bandwidth.seconds_per_byte()))
    seconds = [duration for duration, _ in samples]
    row = {
        "tokens_per_second": len(requests) / statistics.median(seconds),
        "mib_per_step": needed / MEBIBYTE,
        "share_of_bandwidth": statistics.median(least / duration for duration, least in samples),
        "transformers_tokens_per_second": None,
        "speedup": None,
    }
    if reference is not None:
        ratios = [
            other / duration for duration, other in zip(seconds, reference_samples, strict=True)
        ]
        row |= {
            "transformers_tokens_per_second": len(requests) / statistics.median(reference_samples),
            "speedup": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return row


def print_row(row: dict[str, Any]) -> None:
    if row["error"]:
        print(f"{row['kind']:8} {row['batch']:5}  {row['error']}", flush=True)
        return
    reference, spread = "-", "-"
    if row["speedup"] is not None:
        reference = f"{row['transformers_tokens_per_second']:.1f}"
        spread = f"{row['speedup']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
    print(
        f"{row['kind']:8} {row['batch']:5}  {row['tokens_per_second']:8.1f}  {reference:>12}  "
        f"{spread:21}  {row['mib_per_step']:8.1f} MiB  {row['share_of_bandwidth']:.2f}",
        flush=True,
    )


def check(args: argparse.Namespace) -> ModelConfig:
    """Checks the flags, parses the batch sizes and returns the model.

    Raises:
      ConfigError: a flag is invalid.
    """
    check_output(args.output)
    check_positive(args, ("prompt", "new_tokens", "repeats"))
    if args.new_tokens < 5:
        raise ConfigError("--new-tokens: must be at least 5; all but the first are timed")
    sizes = args.batches.split(",")
    if not all(size.isdigit() and int(size) for size in sizes):
        raise ConfigError(f"--batches {args.batches}: expected whole numbers, separated by commas")
    args.batches = [int(size) for size in sizes]
    if not args.alone:
        check_transformers()
    return model_of(args.size, args.vocab)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", default="d512", help=SIZE_HELP)
    parser.add_argument("--vocab", type=int, help="number of tokens of the vocabulary (the size's)")
    parser.add_argument("--batches", default="1,8", help="batch sizes (1,8)")
    parser.add_argument(
        "--prompt", type=int, default=16, help="number of tokens of each prompt (16)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=65, help="number of new tokens of each row (65)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7, help="number of timed pairs (7)")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    try:
        model = check(args)
        facts = machine()
        generator = decoder(args, model)
        reference = None if args.alone else transformers_step(args, generator)
        print(f"{args.size} model in {args.dtype}; {one_line(facts)}")
        print(
            "kind     batch  tokens/s  transformers  ratio                  per step    bandwidth"
        )
        figures = measure(args, generator, reference)
        write_json(args.output, args, benchmark="decode", machine=facts, figures=figures)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
