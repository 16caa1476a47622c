"""Clients that are slow, stop reading or go away, and what they leave behind."""

import asyncio
import contextlib
import json
import socket
import time

import pytest
import uvicorn
from serving.raw_requests import BODY, call, send
from uvicorn.server import ServerState

from moe_jax.serving.app import AppSettings, build_app
from moe_jax.serving.server import timed_protocol


def protocols(server, timeout, max_connections):
    """Function that makes the protocol of a connection."""
    config = uvicorn.Config(build_app(server.service, AppSettings()), log_config=None)
    state = ServerState()
    return lambda: timed_protocol(timeout, max_connections)(config, state, {})


def test_a_body_that_does_not_arrive(served):
    async def nothing():
        await asyncio.sleep(60)

    app = build_app(served.service, AppSettings(timeout=0.1))
    status, body = call(app, receive=nothing)
    assert status == 408
    assert "did not arrive in time" in json.loads(body)["error"]["message"]


def test_connections_without_a_request_are_closed(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/comp")
        assert connection.recv(100) == b""


def test_a_connection_in_use_lasts(served):
    """Many short requests on one connection, which is closed once it waits for half a head."""
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"

    async def run():
        make = protocols(served, 0.5, 9)
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for _ in range(12):
            writer.write(head + b"\r\n")
            assert b" 200 " in await reader.readline()
            await reader.readuntil(b"}")
            await asyncio.sleep(0.1)
        writer.write(head)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
        server.close()

    asyncio.run(run())


def test_too_many_connections(served):
    async def run():
        make = protocols(served, 9, 1)
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        streams = [await asyncio.open_connection(*address) for _ in range(2)]
        for _, writer in streams:
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in await streams[0][0].readline()
        head, _, body = (await streams[1][0].read()).partition(b"\r\n\r\n")
        assert b" 503 " in head
        assert "too many connections" in json.loads(body)["error"]["message"]
        for _, writer in streams:
            writer.close()
        server.close()

    asyncio.run(run())


class _Transport:
    """Stand-in for a transport whose client does not read."""

    def __init__(self):
        self.aborted = asyncio.Event()

    def abort(self):
        self.aborted.set()

    def get_extra_info(self, name, default=None):
        return default

    def is_closing(self):
        return False


def test_a_client_that_does_not_read_is_cut_off(served):
    async def run():
        protocol = protocols(served, 0.2, 9)()
        transport = _Transport()
        protocol.connection_made(transport)
        protocol.pause_writing()
        protocol.resume_writing()
        protocol.pause_writing()
        await asyncio.wait_for(transport.aborted.wait(), 10)
        protocol.connection_lost(OSError())

    asyncio.run(run())


def connect(server, body, receive_buffer=None):
    """A connection that has sent a request."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    return connection


def test_a_reader_that_stops_loses_no_row(served):
    """Rows go on whatever their client reads."""
    body = {**BODY, "prompt": ["A"] * 4, "n": 3, "max_tokens": 90, "stream": True, "logprobs": 20}
    with connect(served, {**body, "moe_jax": {"routing": True}}, receive_buffer=2048) as connection:
        assert connection.recv(10)
        wait_until(lambda: served.service.engine.rows_in_use == served.service.engine.waiting == 0)
        assert send(served, "POST", "/v1/completions", BODY)[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_half_closed_connection_loses_no_row(served, stream):
    """It may be answered or not, as its client will read no more or goes on to read."""
    with connect(served, {**BODY, "n": 4, "max_tokens": 80, "stream": stream}) as connection:
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
        wait_until(lambda: served.service.engine.rows_in_use == 0)
    assert send(served, "POST", "/v1/completions", BODY)[0] == 200


def test_a_body_byte_by_byte_is_refused_in_time(served):
    """Three seconds are the time limit of the tests' server, however often a byte comes."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
        )
        connection.setblocking(False)
        for _ in range(90):
            connection.send(b" ")
            time.sleep(0.1)
            with contextlib.suppress(BlockingIOError):
                answer = connection.recv(1000)
                break
        assert b" 408 " in answer
    assert served.service.engine.rows_in_use == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_its_answers(served, monkeypatch, stream):
    taken, submit = [], served.service.submit
    monkeypatch.setattr(served.service, "submit", lambda *a: taken.extend(submit(*a)) or taken)
    asked = iter([{**BODY, "max_tokens": 80, "n": 4, "stream": stream}])

    async def receive():
        for body in asked:
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        return {"type": "http.disconnect"}

    call(build_app(served.service, AppSettings()), receive=receive)
    assert len(taken) == 4
    assert all(answer.is_cancelled for answer in taken)
    wait_until(lambda: served.service.engine.rows_in_use == 0)
    assert served.service.engine.blocks_in_use == 0


def wait_until(is_true, seconds=30):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)
