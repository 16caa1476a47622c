"""Requests to a server without a client library: over a socket, or to the application itself."""

import asyncio
import http.client
import json

from serving.running_server import RunningServer

BODY = {"model": "mix", "prompt": "The fox", "max_tokens": 3, "temperature": 0}


def send(server: RunningServer, method, path, body=None, **headers):
    """Status, headers and body of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, path, data, {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def error_of(response):
    status, _, body = response
    return status, json.loads(body)["error"]


def call(app, method="POST", path="/v1/completions", headers=(), receive=None, sent=None):
    """Status and body of a request that no socket carries; its messages come into `sent`."""
    sent = [] if sent is None else sent

    async def run():
        bodies = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

        async def body():
            return bodies.pop() if bodies else await asyncio.Future()

        async def collect(message):
            sent.append(message)

        given = [(b"host", b"localhost:1"), *headers]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [*dict(given).items()],
            "http_version": "1.1",
            "scheme": "http",
        }
        await app(scope, receive or body, collect)

    asyncio.run(run())
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def numbers(server):
    lines = send(server, "GET", "/metrics")[2].decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}
