"""A server in a thread of the test's process, on a free port of the loopback address."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

import moe_jax
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.serving.app import AppSettings, build_app
from moe_jax.serving.engine import Engine
from moe_jax.serving.limits import EngineLimits
from moe_jax.serving.load import load_service, open_models
from moe_jax.serving.server import bind, run_server
from moe_jax.serving.service import Service

LIMITS = EngineLimits(
    max_rows=4, max_length=96, max_queue=12, cache_tokens=256, block=16, chunks=(16,)
)


_compiled: list[threading.Thread] = []


def _note(event: str, _: float, **__: Any) -> None:
    if event.endswith("backend_compile_duration"):
        _compiled.append(threading.current_thread())


jax.monitoring.register_event_duration_secs_listener(_note)


def compiled_while_serving(engine: Engine) -> int:
    """Number of programs that XLA compiled in the thread of an engine, so not in its warm-up."""
    return sum(thread is engine._thread for thread in _compiled)


@dataclass
class RunningServer:
    """A server that listens.

    Attributes:
      url: address, such as `http://127.0.0.1:4711`.
      service: what it serves.
      folder: folder of the base.
      base: the base in memory.
      adapters: adapters by name.
      compilations: number of programs that were compiled before it listened.
      lines: lines of its log.
    """

    url: str
    service: Service
    folder: Path
    base: moe_jax.Base
    adapters: dict[str, SavedAdapter]
    compilations: int
    lines: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


def warm_service(
    folder: Path, adapters: dict[str, SavedAdapter], limits: EngineLimits = LIMITS
) -> Service:
    """A service whose programs are compiled."""
    service = load_service(open_models(folder, adapters), limits)
    service.engine.warm_up()
    return service


@contextlib.contextmanager
def running(
    service: Service, folder: Path, adapters: dict[str, SavedAdapter], **settings: Any
) -> Iterator[RunningServer]:
    """Serves while the context lasts; then completes what was begun."""
    bound = bind("127.0.0.1", 0)
    bound.listen()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    server = RunningServer(url, service, folder, moe_jax.load_base(folder), adapters, 0)
    server.compilations = service.engine.compilations
    chosen = AppSettings(**{"timeout": 3.0, **settings})
    arguments = (build_app(service, chosen), service, bound, server.lines.append, chosen.timeout)
    thread = threading.Thread(target=run_server, args=arguments)
    thread.start()
    try:
        yield server
    finally:
        service.engine.close()
        thread.join(30)
        bound.close()
        assert not thread.is_alive()
