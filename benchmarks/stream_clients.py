"""Clients that read a server's answers as streams and time them; `benchmarks/serving.py` uses it.

`StreamClients` runs them in a process of its own, as clients of a server are: in the server's
process they would wait for its interpreter lock, and it for them.
"""

import concurrent.futures
import http.client
import json
import multiprocessing
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Self


class Streamed(NamedTuple):
    """Times of some streamed answers.

    Attributes:
      seconds: from the first request to the end of the last answer.
      first_tokens: seconds of each request to its first token.
    """

    seconds: float
    first_tokens: list[float]


class StreamClients:
    """A process that sends requests; a context manager that ends it."""

    def __init__(self):
        """Prepares the process, which starts with the first request and imports the main module."""
        context = multiprocessing.get_context("spawn")
        self._process = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()

    def ask(self, port: int, bodies: Sequence[dict[str, Any]], clients: int) -> Streamed:
        """Sends requests to `/v1/completions` from a number of clients; see `ask_all`."""
        return self._process.submit(ask_all, port, bodies, clients).result()


def ask_all(port: int, bodies: Sequence[dict[str, Any]], clients: int) -> Streamed:
    """Sends all requests; each client sends its next one when it has its last answer.

    Args:
      port: port of the server on this machine.
      bodies: the requests.
      clients: number of clients at the same time.

    Raises:
      RuntimeError: the server refused a request, or an answer did not come to its end.
    """
    left = list(bodies)
    first_tokens, failures, lock = list[float](), list[Exception](), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                if not left or failures:
                    return
                body = left.pop(0)
            try:
                first_tokens.append(seconds_to_first_token(port, body))
            except Exception as error:  # noqa: BLE001  raised by the caller's thread
                failures.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if failures:
        raise RuntimeError(f"a client failed: {failures[0]}") from failures[0]
    return Streamed(seconds, first_tokens)


def seconds_to_first_token(port: int, body: dict[str, Any]) -> float:
    """Reads an answer as a stream; returns the seconds to its first token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start, first = time.perf_counter(), None
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {response.read(200)!r}")
    last = b""
    for line in response:
        if line.startswith(b"data: ") and first is None:
            first = time.perf_counter() - start
        last = line.strip() or last
    connection.close()
    if first is None or last != b"data: [DONE]":
        raise RuntimeError(f"an answer did not come to its end: {last!r}")
    return first
