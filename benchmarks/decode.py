"""Tokens a second of greedy decoding, against transformers and against memory bandwidth.

    python benchmarks/decode.py --output decode.json

A random Llama continues random prompts, by our `TokenGenerator` and by transformers' `generate`
with the same weights, in turn in one process, so that only their ratio is quoted. Transformers
decodes the base, which is also what a LoRA merged into it costs; ours decodes the base, and rows of
a LoRA and of a MixLoRA beside it that stay unmerged. Reading the prompts and compilation are left
out: the time is that between the first new token and the last.

Each step has to read every weight that it multiplies with, and the cache. What share of a step's
time that alone would take is reported too, at the bandwidth of rewriting a large array (its bytes
read and written), measured in between. It exceeds one where weights stay in the processor's own
caches.

Needs torch and transformers, as the tests do; with `--alone`, which measures ours by itself, jax,
flax, optax and numpy.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_inputs import random_params
from benchmarks.report import MEBIBYTE, check_output, machine, one_line, refuse, write_json
from benchmarks.sizes import SIZE_HELP, hf_fields, model_of
from benchmarks.timing import OUT_OF_MEMORY
from moe_jax.adapters import METHODS
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.tree import TARGET_MODULES
from moe_jax.checkpoints.leaves import named_leaves, nested_dict
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.config.parse import parse_member
from moe_jax.errors import ConfigError, UserError, is_out_of_memory
from moe_jax.inference.generator import Request, TokenGenerator
from moe_jax.inference.settings import SamplingConfig
from moe_jax.layers.names import PARAMS
from moe_jax.loaded.adapter_base import expected_leaves
from moe_jax.models.causal_lm import LlamaForCausalLM

KINDS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "lora": {"name": "lora"},
    "mixlora": {"name": "mixlora", "num_experts": 8, "router": {"name": "top_k", "top_k": 2}},
}
COPIED_BYTES, PASSES = 2**28, 4


def random_adapter(fields: dict[str, Any], model: ModelConfig) -> tuple[AdapterMethod, Any]:
    fields = {**fields, "rank": 8, "alpha": 16.0, "target_modules": TARGET_MODULES}
    method = parse_member(METHODS, fields, "method")
    rng = np.random.default_rng(0)
    leaves = {
        path: jnp.asarray(0.02 * rng.standard_normal(spec.shape), spec.dtype)
        for path, spec in expected_leaves(model, method).items()
    }
    return method, nested_dict(leaves)


def ours(generator: TokenGenerator, requests: Sequence[Request], new_tokens: int) -> float:
    """Seconds a step."""
    steps = generator.stream(requests, SamplingConfig(), max_new_tokens=new_tokens, eos_ids=())
    next(steps)
    start = time.perf_counter()
    count = sum(1 for _ in steps)
    return (time.perf_counter() - start) / count


def bytes_of_a_step(generator: TokenGenerator, requests: Sequence[Request], new_tokens: int) -> int:
    """Weights and cache that a step multiplies with; of the embedding, only a row a token."""
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
    """Seconds that a byte takes on its way to or from memory, measured again at each call.

    The array is rewritten in place: a fresh one's pages would have to be made first.
    """

    def __init__(self):
        def rewrite(array: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, PASSES, lambda _, array: array + 1, array)

        self._rewrite = jax.jit(rewrite, donate_argnums=0)
        self._array = jnp.zeros(COPIED_BYTES // 4, jnp.float32)
        self.seconds_per_byte()  # compiles

    def seconds_per_byte(self) -> float:
        start = time.perf_counter()
        self._array = self._rewrite(self._array).block_until_ready()
        return (time.perf_counter() - start) / (2 * PASSES * COPIED_BYTES)


def decoder(args: argparse.Namespace, model: ModelConfig) -> TokenGenerator:
    """A random base and random adapters on it."""
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
    """A function that decodes with the same base in transformers; gives seconds a step."""
    from benchmarks.torch_generation import seconds_a_step
    from benchmarks.torch_llama import torch_llama

    leaves = named_leaves(generator.params)
    arrays = {path.replace("/", "."): np.asarray(leaf) for path, leaf in leaves.items()}
    device = "cpu" if jax.devices()[0].platform == "cpu" else "cuda"
    model = torch_llama(hf_fields(generator.model), arrays, args.dtype, device).eval()
    return lambda requests, new_tokens: seconds_a_step(
        model, [request.tokens for request in requests], new_tokens
    )


def measure(
    args: argparse.Namespace,
    generator: TokenGenerator,
    theirs: Callable[[Sequence[Request], int], float] | None,
) -> list[dict[str, Any]]:
    """The figures of every kind at every batch size; one that does not fit says so."""
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
                row |= one_kind(args, generator, requests, theirs, bandwidth)
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
    theirs: Callable[[Sequence[Request], int], float] | None,
    bandwidth: "Bandwidth",
) -> dict[str, Any]:
    """The figures of one kind of requests, by as many pairs of runs as `--repeats` says."""
    needed = bytes_of_a_step(generator, requests, args.new_tokens)
    ours(generator, requests, args.new_tokens)
    if theirs is not None:
        theirs(requests, 4)
    samples, their_samples = [], []
    for _ in range(args.repeats):
        own = ours(generator, requests, args.new_tokens)
        if theirs is not None:
            their_samples.append(theirs(requests, args.new_tokens))
        samples.append((own, needed * bandwidth.seconds_per_byte()))
    seconds = [own for own, _ in samples]
    row = {
        "tokens_per_second": len(requests) / statistics.median(seconds),
        "mib_per_step": needed / MEBIBYTE,
        "share_of_bandwidth": statistics.median(least / own for own, least in samples),
        "transformers_tokens_per_second": None,
        "speedup": None,
    }
    if theirs is not None:
        ratios = [their / own for own, their in zip(seconds, their_samples, strict=True)]
        row |= {
            "transformers_tokens_per_second": len(requests) / statistics.median(their_samples),
            "speedup": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return row


def print_row(row: dict[str, Any]) -> None:
    if row["error"]:
        print(f"{row['kind']:8} {row['batch']:5}  {row['error']}", flush=True)
        return
    their, spread = "-", "-"
    if row["speedup"] is not None:
        their = f"{row['transformers_tokens_per_second']:.1f}"
        spread = f"{row['speedup']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
    print(
        f"{row['kind']:8} {row['batch']:5}  {row['tokens_per_second']:8.1f}  {their:>12}  "
        f"{spread:21}  {row['mib_per_step']:8.1f} MiB  {row['share_of_bandwidth']:.2f}",
        flush=True,
    )


def check(args: argparse.Namespace) -> ModelConfig:
    """The model and the batch sizes; checks the flags first."""
    check_output(args.output)
    for flag in ("prompt", "new_tokens", "repeats"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')}: must be positive")
    if args.new_tokens < 5:
        raise ConfigError("--new-tokens: must be at least 5, of which all but one are timed")
    sizes = args.batches.split(",")
    if not all(size.isdigit() and int(size) for size in sizes):
        raise ConfigError(f"--batches {args.batches}: expected N,... with whole numbers")
    args.batches = [int(size) for size in sizes]
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing and not args.alone:
        raise ConfigError(
            f"{' and '.join(missing)} are not installed: pip install -e '.[test]' brings them, and "
            "--alone does without"
        )
    return model_of(args.size, args.vocab)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", default="d512", help=SIZE_HELP)
    parser.add_argument("--vocab", type=int, help="tokens, if not as many as the size has")
    parser.add_argument("--batches", default="1,8", help="numbers of rows (1,8)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt (16)")
    parser.add_argument("--new-tokens", type=int, default=65, help="of each row (65)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs (7)")
    parser.add_argument("--alone", action="store_true", help="leave transformers out")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args(argv)
    try:
        model = check(args)
        facts = machine()
        generator = decoder(args, model)
        theirs = None if args.alone else transformers_step(args, generator)
        print(f"{args.size} model in {args.dtype}; {one_line(facts)}")
        print(
            "kind     batch  tokens/s  transformers  ratio                  a step      of copying"
        )
        figures = measure(args, generator, theirs)
        write_json(args.output, args, benchmark="decode", machine=facts, figures=figures)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
