"""Tokens a second of greedy decoding, against transformers and against memory bandwidth.

    python benchmarks/decode.py --output decode.json

A random Llama continues random prompts, by our `Generator` and by transformers' `generate` with the
same weights, in turn in one process, so that only their ratio is quoted. Transformers decodes the
base, which is also what a LoRA merged into it costs; ours decodes the base, and rows of a LoRA and
of a MixLoRA beside it that stay unmerged. Reading the prompts and compilation are left out: the
time is that between the first new token and the last.

Each step has to read every weight that it multiplies with, and the cache. What share of a step's
time that alone would take is reported too, at the bandwidth of rewriting a large array (its bytes
read and written), measured in between. It exceeds one where weights stay in the processor's own
caches.

Needs torch and transformers, as the tests do.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from moe_jax.adapters import METHODS
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.targets import TARGET_MODULES
from moe_jax.checkpoints.base import load_base
from moe_jax.checkpoints.expected_leaves import expected_leaves
from moe_jax.checkpoints.hf_config import read_model_config
from moe_jax.checkpoints.leaves import nested
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.config.parse import parse_member
from moe_jax.inference.generator import Generator, Request
from moe_jax.inference.sampling import SamplingConfig

SIZES = {
    # width, FFN width, heads, key/value heads, layers, vocabulary
    "tiny": (64, 176, 4, 2, 2, 256),
    "small": (512, 1376, 8, 8, 8, 8192),
    "medium": (1024, 2816, 16, 4, 16, 16384),
    "1b": (2048, 5632, 32, 4, 22, 32000),
}
KINDS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "lora": {"name": "lora"},
    "mixlora": {"name": "mixlora", "num_experts": 8, "router": {"name": "top_k", "top_k": 2}},
}
COPIED_BYTES, PASSES = 2**28, 4
MEBIBYTE = 2**20


class Clock(LogitsProcessor):
    """Leaves logits as they are, and notes when they are there; streamers take one row only."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def write_model(folder: Path, size: str, length: int) -> None:
    width, ffn_width, heads, kv_heads, layers, vocab_size = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=ffn_width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        max_position_embeddings=length,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def random_adapter(fields: dict[str, Any], model: ModelConfig) -> tuple[AdapterMethod, Any]:
    fields = {**fields, "rank": 8, "alpha": 16.0, "target_modules": TARGET_MODULES}
    method = parse_member(METHODS, fields, "method")
    rng = np.random.default_rng(0)
    leaves = {
        path: jnp.asarray(0.02 * rng.standard_normal(spec.shape), spec.dtype)
        for path, spec in expected_leaves(model, method).items()
    }
    return method, nested(leaves)


def ours(generator: Generator, requests: Sequence[Request], new_tokens: int) -> float:
    """Seconds a step."""
    steps = generator.stream(requests, SamplingConfig(), max_new_tokens=new_tokens, eos_ids=())
    next(steps)
    start = time.perf_counter()
    count = sum(1 for _ in steps)
    return (time.perf_counter() - start) / count


def theirs(model: Any, requests: Sequence[Request], new_tokens: int) -> float:
    """Seconds a step."""
    clock = Clock()
    prompts = torch.tensor([request.tokens for request in requests])
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([clock]),
        eos_token_id=None,
        pad_token_id=0,
    )
    return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)


def bytes_of_a_step(generator: Generator, requests: Sequence[Request], new_tokens: int) -> int:
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


def measure(args: argparse.Namespace, generator: Generator, model: Any) -> list[dict[str, Any]]:
    bandwidth = Bandwidth()
    rng = np.random.default_rng(0)
    figures = []
    for rows in map(int, args.batches.split(",")):
        prompts = rng.integers(1, generator.model.vocab_size, (rows, args.prompt)).tolist()
        for kind in KINDS:
            name = None if KINDS[kind] is None else kind
            requests = [Request(tuple(tokens), name) for tokens in prompts]
            needed = bytes_of_a_step(generator, requests, args.new_tokens)
            ours(generator, requests, args.new_tokens)
            theirs(model, requests, 4)
            samples = []
            for _ in range(args.repeats):
                own = ours(generator, requests, args.new_tokens)
                their = theirs(model, requests, args.new_tokens)
                samples.append((own, their, needed * bandwidth.seconds_per_byte()))
            own, their, _ = map(statistics.median, zip(*samples, strict=True))
            ratios = [their / own for own, their, _ in samples]
            figures.append(
                {
                    "kind": kind,
                    "batch": rows,
                    "tokens_per_second": rows / own,
                    "transformers_tokens_per_second": rows / their,
                    "speedup": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                    "mib_per_step": needed / MEBIBYTE,
                    "share_of_bandwidth": statistics.median(
                        least / own for own, _, least in samples
                    ),
                }
            )
            print_row(figures[-1])
    return figures


def print_row(row: dict[str, Any]) -> None:
    spread = f"{row['speedup']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
    print(
        f"{row['kind']:8} {row['batch']:5}  {row['tokens_per_second']:8.1f}  "
        f"{row['transformers_tokens_per_second']:12.1f}  {spread:21}  "
        f"{row['mib_per_step']:8.1f} MiB  {row['share_of_bandwidth']:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model (small)")
    parser.add_argument("--batches", default="1,8", help="numbers of rows (1,8)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt (16)")
    parser.add_argument("--new-tokens", type=int, default=65, help="of each row (65)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs (7)")
    parser.add_argument("--output", type=Path, help="also write the figures here, as JSON")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.size, args.prompt + args.new_tokens)
        config = read_model_config(Path(folder))
        generator = Generator(
            config,
            load_base(Path(folder), config, args.dtype),
            {kind: random_adapter(fields, config) for kind, fields in KINDS.items() if fields},
            compute=ComputeConfig(dtype=args.dtype),
        )
        model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
        print(
            f"{args.size} model in {args.dtype} on {jax.devices()[0].device_kind}, jax "
            f"{jax.__version__}, torch {torch.__version__} with {torch.get_num_threads()} threads"
        )
        print(
            "kind     batch  tokens/s  transformers  ratio                  a step      of copying"
        )
        figures = measure(args, generator, model)
    if args.output:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.output.write_text(json.dumps({"settings": settings, "figures": figures}, indent=2))


if __name__ == "__main__":
    main()
