"""The events of a request's answers in the event loop, as a stream that a client reads."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moe_jax.serving.answer import AnswerEvent, OngoingAnswer
from moe_jax.serving.fields import error_object
from moe_jax.serving.protocol import RequestSettings
from moe_jax.serving.responses import ResponseWriter
from moe_jax.serving.service import Prepared, Service


class AnswerStream:
    """The events of a request's answers, from the engine's thread into the event loop."""

    def __init__(self, service: Service, prepared: Prepared):
        """Queues the answers; errors as in `Service.submit`."""
        self._service = service
        self._new: deque[tuple[int, AnswerEvent]] = deque()
        self._has_new = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._left = len(prepared.requests)
        self._answers: Sequence[OngoingAnswer] = service.submit(prepared, self._receive)

    async def events(self) -> AsyncIterator[list[tuple[int, AnswerEvent]]]:
        """Yields new events, each with the index of its answer, until all answers have ended."""
        while self._left:
            await self._has_new.wait()
            self._has_new.clear()
            events = []
            while self._new:
                events.append(self._new.popleft())
            self._left -= sum(event.is_last for _, event in events)
            if events:
                yield events

    def close(self) -> None:
        """Frees the rows of answers that have not ended."""
        if self._left:
            for answer in self._answers:
                answer.cancel()
            self._service.engine.wake()

    def _receive(self, index: int, event: AnswerEvent) -> None:
        self._new.append((index, event))
        self._service.set_after_step(self._loop, self._has_new)


class EventStreamResponse(Response):
    """Server-sent events of a request's answers. A client that goes away frees its rows."""

    def __init__(self, stream: AnswerStream, writer: ResponseWriter, settings: RequestSettings):
        """Sends nothing yet."""
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._stream = stream
        self._writer = writer
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_all() -> None:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for piece in self._pieces():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_disconnected(receive, send_all)
        finally:
            self._stream.close()

    async def _pieces(self) -> AsyncIterator[bytes]:
        """Server-sent events; those that are known at the same time are one piece."""
        async for events in self._stream.events():
            piece = b""
            for index, event in events:
                if event.error is not None:
                    yield piece + _event(error_object(event.status, event.error))
                    return
                piece += _event(self._writer.chunk(index, event))
            yield piece
        if self._settings.include_usage:
            yield _event(self._writer.usage_chunk())
        yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


async def unless_disconnected(receive: Receive, work: Callable[[], Awaitable[Any]]) -> Any:
    """The result of `work`; None if the client goes away before it."""
    result, failure = None, None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            result = await work()
        except Exception as error:  # noqa: BLE001  raised below, outside of the group
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result
