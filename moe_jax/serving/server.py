"""The server's sockets, signals and time limits, on uvicorn."""

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from moe_jax.errors import ConfigError
from moe_jax.serving.fields import error_object
from moe_jax.serving.service import Service

SPARE_CONNECTIONS = 256
"""Number of connections, besides those of answers, from which on others are answered with 503."""

MAX_HEADER = 64 * 1024
"""Largest number of bytes of a request's head."""


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address, before the model is loaded.

    Raises:
      ConfigError: the address is not this machine's, or another process has the port.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({reason.lower()}); give another"
        ) from None
    return bound


def run_server(
    app: ASGIApp, service: Service, bound: socket.socket, say: Callable[[str], None], timeout: float
) -> None:
    """Serves until SIGINT or SIGTERM; then completes what was begun and refuses new requests.

    A second signal ends at once.

    Args:
      app: the application.
      service: its service, whose engine is not started yet.
      bound: socket to listen on.
      say: prints a line.
      timeout: seconds until a connection without a whole request is closed.

    Raises:
      BaseException: the exception that ended the engine.
    """
    limits = service.engine.limits
    config = uvicorn.Config(
        app,
        http=timed_protocol(timeout, limits.max_rows + limits.max_queue + SPARE_CONNECTIONS),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER,
        timeout_keep_alive=math.ceil(timeout),
        timeout_graceful_shutdown=math.ceil(timeout),
    )
    server = _Server(config)
    try:
        # uvloop where it is installed
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(server, service, bound, say))
    finally:
        service.engine.stop()
        service.engine.join()
    if service.engine.failure is not None:
        raise service.engine.failure


async def _serve(
    server: "_Server", service: Service, bound: socket.socket, say: Callable[[str], None]
) -> None:
    loop = asyncio.get_running_loop()
    engine = service.engine

    def end() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(setattr, server, "should_exit", True)

    def stop() -> None:
        if service.is_draining:
            engine.stop()
            server.should_exit = server.force_exit = True
            return
        service.is_draining = True
        engine.close()
        if engine.rows_in_use or engine.waiting:
            say("completing the answers that were begun; a second signal ends at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
            loop.add_signal_handler(number, stop)
    # The thread ends when it fails, and after `close` when all answers have ended.
    service.start(end)
    try:
        await server.serve(sockets=[bound])
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError, RuntimeError):
                loop.remove_signal_handler(number)


class _Server(uvicorn.Server):
    """A server whose signals are handled by `_serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _unavailable(scope: Scope, receive: Receive, send: Send) -> None:
    error = error_object(503, "the server has too many connections; try again later")
    await JSONResponse(error, 503, {"Connection": "close"})(scope, receive, send)


def timed_protocol(timeout: float, max_connections: int) -> type[H11Protocol]:
    """Uvicorn's protocol with time limits for the head of a request and for reading a response.

    Args:
      timeout: seconds.
      max_connections: largest number of connections; further ones are answered with 503.
    """

    class TimedProtocol(H11Protocol):
        """Closes connections that wait for the client: for its request, or for it to read."""

        _waiting: asyncio.TimerHandle | None = None
        _writing: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self.app = _unavailable
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_waiting()
            self._end_writing()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:  # the head of a request is complete
                self._end_waiting()

        def on_response_complete(self) -> None:
            self._wait()  # before the next request, which may have come already
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing = self.loop.call_later(timeout, self.transport.abort)

        def resume_writing(self) -> None:
            self._end_writing()
            super().resume_writing()

        def _wait(self) -> None:
            self._end_waiting()
            self._waiting = self.loop.call_later(timeout, self._close)

        def _close(self) -> None:
            if self.transport.is_closing():
                self.transport.abort()  # `close` waits until all is sent
                return
            self.transport.close()
            self._wait()

        def _end_waiting(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()

        def _end_writing(self) -> None:
            if self._writing is not None:
                self._writing.cancel()

    return TimedProtocol
