"""Routes of the server: OpenAI's API, health, metrics and the page."""

import asyncio
import copy
import hmac
import ipaddress
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_jax.serving.answer import AnswerEvent
from moe_jax.serving.answer_stream import AnswerStream, EventStreamResponse, unless_disconnected
from moe_jax.serving.fields import ApiError, error_object
from moe_jax.serving.protocol import (
    RequestSettings,
    parse_body,
    parse_chat,
    parse_completion,
)
from moe_jax.serving.responses import ResponseWriter, TokenTexts
from moe_jax.serving.service import Prepared, Service

MAX_BODY = 1 << 20
"""Largest number of bytes of a body."""

PAGE_FILES = {
    "": "serving/page/index.html",
    "page.css": "serving/page/page.css",
    "page.js": "serving/page/page.js",
    "conversation.js": "serving/page/conversation.js",
    "requests.js": "serving/page/requests.js",
    # `moe-jax inspect` writes a page with the same colors.
    "colors.js": "inspection/page/colors.js",
    "token_view.js": "inspection/page/token_view.js",
    "tokens.css": "inspection/page/tokens.css",
}
"""Files of the page in the package, by path."""

_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}

COUNTED_PATHS = (
    "/v1/models",
    "/v1/completions",
    "/v1/chat/completions",
    "/health",
    "/metrics",
    "/",
)
"""Paths that requests are counted by; all others are one."""

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class AppSettings(NamedTuple):
    """Settings of the routes.

    Attributes:
      api_key: key that requests must have; None for none.
      hosts: host names under which the server is asked; other names are refused, since a foreign
        page can make a browser take this server for its own (DNS rebinding). Addresses are not
        names and may always be used.
      origins: origins of other sites whose pages may use the server, such as `https://a.example`.
      timeout: seconds that a client has for sending its body.
    """

    api_key: str | None = None
    hosts: tuple[str, ...] = ("localhost",)
    origins: tuple[str, ...] = ()
    timeout: float = 30.0


def build_app(service: Service, settings: AppSettings) -> ASGIApp:
    """The application of a server."""
    api = Api(service, settings)
    routes = [
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        *(Route(f"/{name}", api.page) for name in PAGE_FILES),
    ]
    middleware = [Middleware(Gate, service=service, settings=settings)]
    if settings.origins:  # outside of the gate, so that pages can read its refusals too
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)
    handlers: dict[Any, Any] = {
        ApiError: _api_error,
        HTTPException: _http_error,
        Exception: _unexpected_error,
    }
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return JSONResponse(error.to_object(), error.status, headers=headers.get(error.status))


async def _unexpected_error(*_: Any) -> Response:
    """The response to a defect; Starlette raises the exception again, and uvicorn prints it."""
    return JSONResponse(error_object(500, "the server failed; its log has the reason"), 500)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problems = {404: f"{request.url.path[:80]}: no such path", 405: "wrong method for this path"}
    message = problems.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    return JSONResponse(error_object(error.status_code, message), error.status_code, headers)


class Gate:
    """Refuses requests of other sites and without the key; counts the others."""

    def __init__(self, app: ASGIApp, service: Service, settings: AppSettings):
        """Wraps an application."""
        self._app = app
        self._service = service
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, status = Request(scope), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(request)
            await self._app(scope, receive, counted)
        except ApiError as error:
            response = await _api_error(request, error)
            await response(scope, receive, counted)
        except Exception:
            status = status or 500
            raise
        finally:
            path = scope["path"] if scope["path"] in COUNTED_PATHS else "other"
            self._service.metrics.requests.labels(path, str(status or 499)).inc()

    def _check(self, request: Request) -> None:
        """Refuses a request.

        Raises:
          ApiError: its origin, its host or its key is wrong.
        """
        settings = self._settings
        host = request.headers.get("host", "")
        name = _host_name(host)
        allowed = (*settings.hosts, *(urlsplit(origin).hostname for origin in settings.origins))
        if not _is_address(name) and name not in allowed:
            raise ApiError(
                403, f"the host {name[:80]!r} is not this server's; start it with --allow-origin"
            )
        origin = request.headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", *settings.origins):
            raise ApiError(
                403,
                f"requests of pages of {origin[:80]!r} are not allowed; start the server with "
                "--allow-origin",
            )
        needs_key = request.url.path.startswith("/v1/") or request.url.path == "/metrics"
        if settings.api_key is None or not needs_key:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(key.strip().encode(), settings.api_key.encode())
        if kind.lower() != "bearer" or not is_right:
            raise ApiError(
                401, "the API key is missing or wrong; send it as a bearer token",
                code="invalid_api_key",
            )  # fmt: skip


def _host_name(host: str) -> str:
    """Name or address in a Host header; empty if there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    """True for an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Api:
    """Handlers of the routes."""

    def __init__(self, service: Service, settings: AppSettings):
        """Reads the page."""
        self._service = service
        self._settings = settings
        # Tokenizers keep state between calls: one for this thread, one for that which encodes.
        self._texts = TokenTexts(copy.deepcopy(service.tokenizer))
        self._encoding = 0
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="moe_jax encoder")
        package = resources.files("moe_jax")
        self._page = {name: (package / file).read_bytes() for name, file in PAGE_FILES.items()}

    async def models(self, _: Request) -> Response:
        """`GET /v1/models`."""
        return JSONResponse({"object": "list", "data": self._service.models()})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        return JSONResponse(self._service.model(request.path_params["name"]))

    async def health(self, _: Request) -> Response:
        """`GET /health`."""
        is_ready = not self._service.is_draining and self._service.engine.failure is None
        return JSONResponse({"status": "ok" if is_ready else "ending"}, 200 if is_ready else 503)

    async def metrics(self, _: Request) -> Response:
        """`GET /metrics`."""
        metrics, engine = self._service.metrics, self._service.engine
        metrics.queue.set(engine.waiting)
        metrics.rows.set(engine.rows_in_use)
        metrics.blocks.set(engine.blocks_in_use)
        metrics.preemptions.set(engine.preemptions)
        metrics.compilations.set(engine.compilations)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        """The files of the page."""
        name = request.url.path.removeprefix("/")
        media_type = _MEDIA_TYPES[PAGE_FILES[name].rpartition(".")[2]]
        return Response(self._page[name], media_type=media_type, headers=_PAGE_HEADERS)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        fields = parse_body(await self._body(request))
        settings = parse_completion(fields)
        prepared = await self._encoded(self._service.prepare_completion, settings)
        return await self._answer(request, settings, prepared)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        fields = parse_body(await self._body(request))
        settings = parse_chat(fields)
        prepared = await self._encoded(self._service.prepare_chat, settings)
        return await self._answer(request, settings, prepared)

    async def _encoded(self, prepare: Callable[[Any], Prepared], settings: Any) -> Prepared:
        self._service.refuse_if_full(settings, self._encoding)
        self._encoding += settings.num_answers
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._encoder, prepare, settings)
        finally:
            self._encoding -= settings.num_answers

    async def _body(self, request: Request) -> bytes:
        """The body.

        Raises:
          ApiError: it is too large, or comes too slowly.
        """
        self._service.refuse_if_draining()
        body = bytearray()
        try:
            with anyio.fail_after(self._settings.timeout):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_BODY:
                        raise ApiError(413, f"the body is larger than {MAX_BODY} bytes")
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time") from None
        except ClientDisconnect:
            raise ApiError(400, "the client has gone") from None
        return bytes(body)

    async def _answer(
        self, request: Request, settings: RequestSettings, prepared: Prepared
    ) -> Response:
        stream = AnswerStream(self._service, prepared)
        writer = ResponseWriter(settings, prepared, self._texts)
        if settings.stream:
            return EventStreamResponse(stream, writer, settings)
        found: list[list[AnswerEvent]] = [[] for _ in prepared.requests]

        async def collect() -> Response:
            async for events in stream.events():
                for index, event in events:
                    if event.error is not None:
                        raise ApiError(event.status, event.error)
                    found[index].append(event)
            return JSONResponse(writer.whole(found))

        try:
            response = await unless_disconnected(request.receive, collect)
        finally:
            stream.close()
        return Response(status_code=499) if response is None else response
