"""Start of this process as one of the processes of a run, through `jax.distributed`."""

import contextlib
import ctypes
import functools
import math
import os
import re
import socket
from collections.abc import Callable, Iterator

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv

from moe_jax.errors import ConfigError
from moe_jax.processes.peers import Peers
from moe_jax.processes.stop import release
from moe_jax.terminal import value_text

_LONG = 3600
"""Seconds of waiting in jax, where `Peers` detects what has ended."""


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    wait_seconds: float,
    say: Callable[[str], None],
) -> Iterator[None]:
    """Context in which this process is one of several; must be entered before jax has devices.

    An error in the context ends all processes: each other process prints one line with the reason
    and exits with the same status. On leaving, each waits until all have come to their end, and
    jax is shut down.

    Args:
      coordinator: address of process 0, `HOST:PORT`; None on a cluster that jax recognizes.
      num_processes: number of processes; None as above.
      process_id: index of this process; None as above.
      wait_seconds: time for which to wait for the other processes to start.
      say: prints a line.

    Raises:
      ConfigError: an argument is missing or invalid, or not all processes have started in time.
    """
    if not 0.0 < wait_seconds < math.inf:
        raise ConfigError(f"--wait: is {wait_seconds}, must be a positive number of seconds")
    address = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
        address, num_processes, process_id, None, None, int(wait_seconds)
    )
    given = {"coordinator": address, "num-processes": count, "process-id": index}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if address is None or count is None or index is None:
        raise ConfigError(
            f"--distributed: jax recognizes no cluster here; give {' and '.join(missing)}"
        )
    if count < 1:
        raise ConfigError(f"--num-processes: is {count}, must be positive")
    if not 0 <= index < count:
        raise ConfigError(
            f"--process-id: is {index}, must be from 0 to {count - 1} with {count} processes"
        )
    host, colon, port = address.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator: is {value_text(address)}, expected HOST:PORT")
    host, peers = host.strip("[]"), Peers(index, count)
    try:
        if index == 0:
            peers.connect(host, int(port), wait_seconds, say)
            with socket.create_server(("", 0)) as free:
                jax_port = free.getsockname()[1]
            peers.start({"jax_port": jax_port})
        else:
            jax_port = peers.connect(host, int(port), wait_seconds, say)["jax_port"]
        bracketed = f"[{host}]" if ":" in host else host
        jax.config.update("jax_enable_preemption_service", False)  # see `stop.heed_sigterm`
        with _native_failure_handler(peers.end_after_native_failure):
            jax.distributed.initialize(
                f"{bracketed}:{jax_port}",
                count,
                index,
                devices,
                "deactivate",
                coordinator_bind_address=f"[::]:{jax_port}",
                heartbeat_timeout_seconds=_LONG,
                shutdown_timeout_seconds=_LONG,
            )
        yield
        peers.finish()
        release()
        jax.distributed.shutdown()  # here, where the end of another process is still reported
        peers.leave()
    except BaseException as error:
        peers.end(error)
        raise


@contextlib.contextmanager
def _native_failure_handler(action: Callable[[], None]) -> Iterator[None]:
    """Calls `action` when the jax client that is created in the context loses process 0.

    By default the client then aborts its process. jaxlib can call a Python function instead, but
    fails to convert its argument to Python, and ends in C++'s `std::terminate`. Its handler is
    called without a message or a stack trace, also for other errors of native code. `action` must
    not return.
    """

    def handle(*_: object) -> None:
        action()

    with contextlib.suppress(OSError, AttributeError):  # another C++ library: it prints two lines
        handler = ctypes.CFUNCTYPE(None)(handle)
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(handler)
        _handlers.append(handler)
    runtime = distributed._jax
    create = runtime.get_distributed_runtime_client
    runtime.get_distributed_runtime_client = functools.partial(
        create, missed_heartbeat_callback=handle
    )
    try:
        yield
    finally:
        runtime.get_distributed_runtime_client = create


_handlers: list[object] = []
"""Handlers that C++ may call, which must stay in memory."""
