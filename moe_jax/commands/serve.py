"""`moe-jax serve`."""

import argparse
import os
import sys
import time
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from moe_jax.commands import Run
from moe_jax.commands.arguments import (
    LESS_MEMORY_FLAGS,
    add_adapters,
    add_base,
    add_dtype,
    add_mesh,
    base_path,
    mesh_config,
    named_folders,
)
from moe_jax.errors import ConfigError, memory_errors
from moe_jax.terminal import print_shown

if TYPE_CHECKING:
    from moe_jax.serving.engine import Engine

KEY_VARIABLE = "MOE_JAX_API_KEY"

EPILOG = """\
The requests are those of OpenAI's API: GET /v1/models, POST /v1/completions and
POST /v1/chat/completions. The model of a request is the base (the last part of its path) or an
adapter, by name. GET /health and GET /metrics (Prometheus) describe the server; / is a page to try
the models. docs/guide/serve.md has the fields and the clients.

Before it listens, the server compiles every program that a request can need, and says how many.

examples:
  moe-jax serve --base models/llama --adapter a=runs/a --adapter b=runs/b
  MOE_JAX_API_KEY=secret moe-jax serve --base models/llama --host 0.0.0.0 --max-rows 32
"""


def add(parser: argparse.ArgumentParser) -> Run:
    """Serve a base and adapters on it over HTTP, with the requests of OpenAI's API."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_base(parser)
    add_adapters(parser)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: %(default)s, which only this machine reaches)",
    )
    network.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port (default: %(default)s; 0: free)"
    )
    network.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key that requests must have (default: the variable {KEY_VARIABLE}; none: no key)",
    )
    network.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="another site whose pages may use the server, such as https://a.example, or the name "
        "under which this server is reached; may be given several times",
    )
    network.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="longest time to wait for a client that sends or reads slowly (default: %(default)s)",
    )
    computation = parser.add_argument_group("computation")
    computation.add_argument(
        "--max-rows",
        type=int,
        default=16,
        metavar="N",
        help="answers computed side by side (default: %(default)s)",
    )
    computation.add_argument(
        "--max-length",
        type=int,
        metavar="S",
        help="largest number of tokens of a prompt and its answer (default: 2048, or the context)",
    )
    computation.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="answers that may wait for a row; more get status 429 (default: %(default)s)",
    )
    computation.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="tokens that the cache holds, of all rows together "
        "(default: --max-length, or 512 times --max-rows if that is more)",
    )
    add_dtype(computation)
    add_mesh(computation)
    parser.set_defaults(flags={"max_length": "--max-length"})
    return _run


def _run(arguments: argparse.Namespace) -> None:
    advice = f"a smaller --cache-tokens or --max-rows, {LESS_MEMORY_FLAGS}"
    with memory_errors(advice):
        serve(arguments)


def serve(arguments: argparse.Namespace) -> None:
    """Loads the models and serves until a signal. Flags are checked before weights are read."""
    try:
        from moe_jax.serving.app import AppSettings, build_app
        from moe_jax.serving.server import bind, run_server
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in (
            "prometheus_client",
            "starlette",
            "uvicorn",
        ):
            raise
        raise ConfigError(f"{error.name} is not installed; pip install 'moe-jax[serve]'") from error
    from moe_jax.serving.load import load_service, open_models

    key = os.environ.get(KEY_VARIABLE) if arguments.api_key is None else arguments.api_key
    _check_flags(arguments, key)
    adapters = named_folders(arguments.adapter)
    bound = bind(arguments.host, arguments.port)
    with bound:
        models = open_models(
            base_path(arguments.base, adapters, arguments.revision),
            adapters,
            revision=arguments.revision,
            dtype=arguments.dtype,
            mesh=mesh_config(arguments.mesh),
        )
        limits = models.limits(
            max_rows=arguments.max_rows,
            max_length=arguments.max_length,
            max_queue=arguments.max_queue,
            cache_tokens=arguments.cache_tokens,
        )
        for note in models.notes(limits):
            _say(note)
        service = load_service(models, limits)
        _warm_up(service.engine)
        bound.listen()  # clients that read the next line may connect
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        names = ", ".join(model["id"] for model in service.models())
        _say(f"serving {names} on http://{shown}:{port}")
        if not ip_address(host).is_loopback:
            protection = "with the API key" if key else "without an API key"
            _say(f"other machines can reach it, {protection}")
        settings = AppSettings(
            api_key=key,
            hosts=("localhost", arguments.host),
            origins=tuple(arguments.allow_origin),
            timeout=arguments.timeout,
        )
        run_server(build_app(service, settings), service, bound, _say, arguments.timeout)


def _warm_up(engine: "Engine") -> None:
    start = time.perf_counter()
    engine.warm_up()
    seconds = time.perf_counter() - start
    _say(f"compiled {engine.compilations} programs in {seconds:.1f} s; requests compile none")


def _check_flags(arguments: argparse.Namespace, key: str | None) -> None:
    if not 0 <= arguments.port < 2**16:
        raise ConfigError(f"--port: must be between 0 and {2**16 - 1}, got {arguments.port}")
    if not 0.1 <= arguments.timeout <= 3600:
        raise ConfigError(f"--timeout: must be between 0.1 and 3600, got {arguments.timeout:g}")
    # What a header can carry.
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        source = KEY_VARIABLE if arguments.api_key is None else "--api-key"
        raise ConfigError(f"{source}: must be printable ASCII characters without spaces")
    for origin in arguments.allow_origin:
        parts = urlsplit(origin)
        is_origin = parts.scheme in ("http", "https") and parts.hostname
        if not is_origin or parts.path or parts.query or parts.fragment:
            raise ConfigError(
                f"--allow-origin {origin}: must be a scheme and a host, such as https://a.example"
            )


def _say(line: str) -> None:
    print_shown(line, file=sys.stderr)
    sys.stderr.flush()
