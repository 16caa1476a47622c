"""Speed of the server, compared with requests one after another and with transformers.

    python benchmarks/serving.py --output serving.json

A random Llama with MixLoRA adapters is served in a thread of this process. 1, 4 and 16 clients, in
a process of their own, ask for continuations of random prompts over HTTP as streams, all of one
adapter or in equal parts of four. A client's next request follows its last answer. Every row has
the tokens per second of all clients together, the seconds to the first token, and the ratio to one
client of one adapter. `--base DIR` reads the base from a folder; its adapters are random too.

The same prompts are also answered by `TokenGenerator`, one after another, and by transformers'
`generate` on the base alone, which costs as much as a base with a merged LoRA. All of them take
turns, and ratios are the result. With `--llama-server PATH` and `--gguf FILE`, llama.cpp's server
answers them on those weights, beside our server's answers of the base. Processor time per token, of
the server's process, depends less on other work of the machine than seconds do.

Needs the extra `serve`, and torch and transformers unless `--alone`.
"""

import argparse
import contextlib
import functools
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.decode import KINDS, random_adapter
from benchmarks.llama_cpp import llama_server
from benchmarks.random_inputs import random_params
from benchmarks.report import (
    check_output,
    check_positive,
    check_transformers,
    machine,
    one_line,
    refuse,
    table,
    write_json,
)
from benchmarks.sizes import SIZE_HELP, hf_fields, model_of
from benchmarks.stream_clients import StreamClients
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import ConfigError, UserError
from moe_jax.hf.base_model import open_base
from moe_jax.inference.generator import Request, TokenGenerator
from moe_jax.inference.settings import SamplingConfig
from moe_jax.layers.names import PARAMS
from moe_jax.loaded.inference_model import build_model, load_params
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.serving.app import AppSettings, build_app
from moe_jax.serving.engine import Engine
from moe_jax.serving.limits import EngineLimits
from moe_jax.serving.metrics import Metrics
from moe_jax.serving.server import bind, run_server
from moe_jax.serving.service import Service
from moe_jax.serving.serving_model import ServingModel

MOE_JAX, LLAMA_CPP = "moe_jax", "llama.cpp"
ADAPTERS = ("a", "b", "c", "d")
ROWS = 16


class Load(NamedTuple):
    """Requests of one measurement.

    Attributes:
      server: who answers.
      clients: number of clients at the same time.
      adapters: number of adapters that they ask in turn; 0 is the base.
    """

    server: str
    clients: int
    adapters: int


class Answered(NamedTuple):
    """Times of a measurement.

    Attributes:
      tokens_per_second: new tokens of all clients together.
      first_tokens: seconds of each request to its first token.
      processor_seconds: processor time of this process, in which our server runs, for each token.
    """

    tokens_per_second: float
    first_tokens: list[float]
    processor_seconds: float = 0.0


class Models(NamedTuple):
    """A base and four random adapters."""

    config: ModelConfig
    params: Any
    adapters: dict[str, Any]


def load_models(args: argparse.Namespace, config: ModelConfig) -> Models:
    """The models of these flags."""
    if args.base is None:
        language_model = LlamaForCausalLM(config, ComputeConfig(dtype=args.dtype), (), args.dtype)
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        variables = jax.eval_shape(language_model.init, jax.random.key(0), tokens)
        params = random_params(nn.meta.unbox(variables)[PARAMS], None, args.dtype)
    else:
        base = open_base(args.base)
        params = load_params(base, build_model(base, args.dtype), None)
    fields = KINDS[args.kind]
    assert fields is not None
    return Models(config, params, {name: random_adapter(fields, config) for name in ADAPTERS})


def word_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
    """A tokenizer in which each token is a word, so that each has an event in a stream."""
    words = {f"w{token}": token for token in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def warm_service(args: argparse.Namespace, models: Models) -> Service:
    """A service with compiled programs, whose answers end at their length only."""
    config, params, adapters = models
    compute, length = ComputeConfig(dtype=args.dtype), args.prompt + args.new_tokens
    limits = EngineLimits(ROWS, length, max_queue=64, cache_tokens=ROWS * (length + 64))
    metrics = Metrics()
    engine = Engine(ServingModel(config, params, adapters, compute=compute), limits, metrics)
    start = time.perf_counter()
    engine.warm_up()
    print(f"compiled {engine.compilations} programs in {time.perf_counter() - start:.0f} s")
    methods = {name: method for name, (method, _) in adapters.items()}
    tokenizer = word_tokenizer(config) if args.base is None else load_tokenizer(args.base)
    return Service("base", config, methods, tokenizer, frozenset(), engine, metrics)


@contextlib.contextmanager
def listening(service: Service) -> Iterator[int]:
    """Serves in a thread; yields the port."""
    with bind("127.0.0.1", 0) as bound:
        bound.listen()
        app = build_app(service, AppSettings())
        thread = threading.Thread(target=run_server, args=(app, service, bound, print, 60.0))
        thread.start()
        try:
            yield bound.getsockname()[1]
        finally:
            service.engine.close()
            thread.join()


def ask_server(
    args: argparse.Namespace,
    load: Load,
    prompts: Sequence[Any],
    clients: StreamClients,
    ports: Mapping[str, int],
) -> Answered:
    """Answers of a server, read by clients as streams."""
    same = {"max_tokens": args.new_tokens, "temperature": 0, "stream": True}
    if load.server == LLAMA_CPP:  # which would keep prompts of the turn before
        same |= {"ignore_eos": True, "cache_prompt": False}
    models = ADAPTERS[: load.adapters] or ("base",)
    bodies = [
        {"model": models[index % len(models)], "prompt": prompt, **same}
        for index, prompt in enumerate(prompts)
    ]
    answered = clients.ask(ports[load.server], bodies, load.clients)
    return Answered(len(prompts) * args.new_tokens / answered.seconds, answered.first_tokens)


def one_after_another(
    args: argparse.Namespace, generator: TokenGenerator, prompts: Sequence[Any]
) -> Answered:
    """Answers by `TokenGenerator`, one after another."""
    start, firsts = time.perf_counter(), []
    for prompt in prompts:
        begin = time.perf_counter()
        request = Request(tuple(prompt), ADAPTERS[0])
        options: Any = {"max_new_tokens": args.new_tokens, "eos_ids": ()}
        steps = generator.stream([request], SamplingConfig(), **options)
        next(steps)
        firsts.append(time.perf_counter() - begin)
        for _ in steps:
            pass
    return Answered(len(prompts) * args.new_tokens / (time.perf_counter() - start), firsts)


def transformers_answers(
    args: argparse.Namespace, models: Models
) -> Callable[[Sequence[Any]], Answered]:
    """Returns a function that answers with transformers' `generate`, one after another."""
    import torch

    from benchmarks.torch_llama import torch_llama

    arrays = {k.replace("/", "."): np.asarray(v) for k, v in named_leaves(models.params).items()}
    device = "cpu" if jax.devices()[0].platform == "cpu" else "cuda"
    model: Any = torch_llama(hf_fields(models.config), arrays, args.dtype, device).eval()

    def answer(prompts: Sequence[Any]) -> Answered:
        start = time.perf_counter()
        for prompt in prompts:
            tokens = torch.tensor([prompt], device=device)
            model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=args.new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return Answered(len(prompts) * args.new_tokens / (time.perf_counter() - start), [])

    return answer


def measure(args: argparse.Namespace, config: ModelConfig) -> list[dict[str, Any]]:
    """Figures of all loads and of what they are compared with, measured in turns."""
    models = load_models(args, config)
    service = warm_service(args, models)
    compute, longest = ComputeConfig(dtype=args.dtype), args.prompt + args.new_tokens
    generator = TokenGenerator(*models, compute=compute, max_length=longest)
    rng = np.random.default_rng(0)
    loads = [Load(MOE_JAX, clients, own) for clients in args.clients for own in args.adapters]
    if args.llama_server is not None:
        servers = (LLAMA_CPP, MOE_JAX)
        loads += [Load(server, clients, 0) for clients in args.clients for server in servers]
    steps: dict[Load, Callable[[Sequence[Any]], Answered]] = {
        Load("TokenGenerator", 1, 1): lambda prompts: one_after_another(args, generator, prompts)
    }
    if not args.alone:
        steps[Load("transformers", 1, 0)] = transformers_answers(args, models)
    samples: dict[Load, list[Answered]] = {}
    with contextlib.ExitStack() as stack:
        ports = {MOE_JAX: stack.enter_context(listening(service))}
        if args.llama_server is not None:
            other = llama_server(args.llama_server, args.gguf, ROWS, longest + 64)
            ports[LLAMA_CPP] = stack.enter_context(other)
        clients = stack.enter_context(StreamClients())
        for load in loads:
            steps[load] = functools.partial(ask_server, args, load, clients=clients, ports=ports)
        for turn in range(-1, args.repeats):
            most = max(args.answers, *args.clients)
            prompts = rng.integers(1, config.vocab_size, (most, args.prompt)).tolist()
            for load, step in steps.items():
                count = max(args.answers, load.clients)
                before = time.process_time()
                answered = step(prompts[:count])
                seconds = (time.process_time() - before) / (count * args.new_tokens)
                answered = answered._replace(processor_seconds=seconds)
                if turn >= 0:
                    samples.setdefault(load, []).append(answered)
    return figures_of(samples, Load(MOE_JAX, args.clients[0], args.adapters[0]))


def figures_of(samples: dict[Load, list[Answered]], first: Load) -> list[dict[str, Any]]:
    """Medians over the turns, and ratios to the load `first`."""
    rows = []
    for load, answered in samples.items():
        speeds = [one.tokens_per_second for one in answered]
        references = [one.tokens_per_second for one in samples[first]]
        ratios = [speed / other for speed, other in zip(speeds, references, strict=True)]
        firsts = sorted(seconds for one in answered for seconds in one.first_tokens)
        row = {
            **load._asdict(),
            "tokens_per_second": statistics.median(speeds),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "processor_seconds_per_token": None  # llama.cpp computes in another process
            if load.server == LLAMA_CPP
            else statistics.median(one.processor_seconds for one in answered),
            "first_token_seconds": statistics.median(firsts) if firsts else None,
            "first_token_seconds_of_95": firsts[int(0.95 * len(firsts))] if firsts else None,
        }
        rows.append(row)
    return rows


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        firsts = (row["first_token_seconds"], row["first_token_seconds_of_95"])
        processor = row["processor_seconds_per_token"]
        cells.append(
            [
                row["server"],
                f"{row['clients']}",
                f"{row['adapters']}",
                f"{row['tokens_per_second']:.1f}",
                f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})",
                "" if processor is None else f"{1000 * processor:.3f} ms",
                *("" if seconds is None else f"{seconds:.3f} s" for seconds in firsts),
            ]
        )
    heads = ["server", "clients", "adapters", "tokens/s", "ratio", "CPU per token"]
    return table([*heads, "first token", "of 95%"], cells)


def check(args: argparse.Namespace) -> ModelConfig:
    """Checks the flags, parses the lists and returns the model.

    Raises:
      ConfigError: a flag is invalid.
    """
    check_output(args.output)
    check_positive(args, ("prompt", "new_tokens", "repeats", "answers"))
    for flag, most in (("clients", ROWS), ("adapters", len(ADAPTERS))):
        parts = getattr(args, flag).split(",")
        if not all(part.isdigit() and 0 < int(part) <= most for part in parts):
            raise ConfigError(f"--{flag}: expected numbers from 1 to {most}, separated by commas")
        setattr(args, flag, [int(part) for part in parts])
    if (args.llama_server is None) != (args.gguf is None):
        raise ConfigError("--llama-server and --gguf go together; give both or none")
    if args.llama_server is not None and shutil.which(args.llama_server) is None:
        raise ConfigError(f"--llama-server {args.llama_server}: no such program")
    if not args.alone:
        check_transformers()
    return model_of(args.size, args.vocab) if args.base is None else open_base(args.base).config


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--size", default="d512", help=SIZE_HELP)
    parser.add_argument("--base", type=Path, help="folder of a Llama, in place of --size")
    parser.add_argument("--vocab", type=int, help="number of tokens of the vocabulary (the size's)")
    kinds = [kind for kind, fields in KINDS.items() if fields is not None]
    parser.add_argument("--kind", default="mixlora", choices=kinds, help="method of the adapters")
    parser.add_argument("--clients", default="1,4,16", help="clients at the same time (1,4,16)")
    parser.add_argument("--adapters", default="1,4", help="adapters that they ask (1,4)")
    parser.add_argument("--answers", type=int, default=4, help="least answers of a turn (4)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt (32)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of each answer (64)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5, help="number of timed turns (5)")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's llama-server, with --gguf")
    parser.add_argument("--gguf", type=Path, help="weights for --llama-server")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    try:
        config = check(args)
        facts = machine()
        print(f"{args.base or args.size} model in {args.dtype}, {args.kind}; {one_line(facts)}")
        figures = measure(args, config)
        print(as_table(figures))
        write_json(args.output, args, benchmark="serving", machine=facts, figures=figures)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
