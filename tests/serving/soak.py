"""Many mixed requests at once: good and wrong ones, wrong keys, clients that are slow or go away.

    python tests/serving/soak.py 2000

Every accepted answer has to equal the one to the same request alone, and memory, threads, file
descriptors, rows and blocks have to end where they began.
"""

import contextlib
import gc
import http.client
import itertools
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import conftest  # noqa: F401  the machine of the tests

from serving.running_server import RunningServer

WORKERS = 8
CHAT = [{"role": "user", "content": "What is it?"}]
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("completions", {"model": "tiny", "prompt": "The fox", "max_tokens": 20, "temperature": 0}),
    ("completions", {"model": "mix", "prompt": "A", "max_tokens": 33, "temperature": 0}),
    ("completions", {"model": "plain", "prompt": ["One", "Two"], "max_tokens": 9, "seed": 1}),
    ("completions", {"model": "louder", "prompt": "A crow", "max_tokens": 12, "n": 3, "seed": 2}),
    ("completions", {"model": "mix", "prompt": "x " * 30, "max_tokens": 5, "top_k": 1}),
    ("completions", {"model": "mix", "prompt": "The", "stop": ["e"], "top_p": 0.5, "seed": 4}),
    ("completions", {"model": "louder", "prompt": "So", "frequency_penalty": 1.0, "seed": 5}),
    ("completions", {"model": "mix", "prompt": "An owl", "echo": True, "logprobs": 2, "seed": 3}),
    ("completions", {"model": "louder", "prompt": "A", "moe_jax": {"routing": True}, "seed": 9}),
    ("chat/completions", {"model": "plain", "messages": CHAT, "max_tokens": 15, "temperature": 0}),
    ("chat/completions", {"model": "mix", "messages": CHAT, "max_tokens": 15, "seed": 6}),
]  # fmt: skip
BAD: list[tuple[bytes, int]] = [
    (b"{nonsense", 400),
    (b'{"model": "nobody", "prompt": "a"}', 404),
    (b'{"model": "mix", "prompt": "a", "max_tokens": -5}', 400),
    (b'{"model": "mix", "prompt": "a", "max_tokens": 100000}', 400),
    (b'{"model": "mix", "prompt": [1, 99999]}', 400),
    (b'{"model": "mix", "prompt": "a", "stop": ' + json.dumps(["x"] * 3000).encode() + b"}", 400),
    (b"[" * 3000, 400),
    (b" " * 10**7, 413),
]


class Resources(NamedTuple):
    """Memory and other resources of a process and of the server in it."""

    memory_mib: float
    threads: int
    descriptors: int
    rows: int
    blocks: int
    waiting: int


class Outcome(NamedTuple):
    """Numbers of a run, with the kinds of requests counted."""

    counts: Counter[str]
    before: Resources
    after: Resources
    seconds: float


def resources(server: RunningServer) -> Resources:
    """Resources of this process and of the server in it, now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    engine = server.service.engine
    return Resources(
        pages * 4096 / 2**20,
        threading.active_count(),
        descriptors,
        engine.rows_in_use,
        engine.blocks_in_use,
        engine.waiting,
    )


def post(server: RunningServer, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    """Status and body of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        # The server answers before it has read a body that is too large.
        with contextlib.suppress(ConnectionError):
            connection.request("POST", f"/v1/{path}", body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def texts_of(body: bytes) -> list[str]:
    """Texts of the answers of a response, streamed or whole."""
    if not body.startswith(b"data: "):
        choices = json.loads(body)["choices"]
        return [c["text"] if "text" in c else c["message"]["content"] for c in choices]
    texts: dict[int, str] = {}
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        for choice in json.loads(line)["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"]["content"]
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return [texts[index] for index in sorted(texts)]


def request_bytes(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """A whole request."""
    fields = {"Host": "localhost", "Content-Length": str(len(body)), **headers}
    lines = [f"POST /v1/{path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def leave(server: RunningServer, draw: random.Random, data: bytes) -> None:
    """Sends a request, or a part of one, and goes away."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        if draw.random() < 0.3:
            connection.sendall(data[: draw.randrange(1, len(data))])
        else:
            connection.sendall(data)
            connection.recv(1)
        if draw.random() < 0.3:
            connection.shutdown(socket.SHUT_WR)


def ask_slowly(server: RunningServer, draw: random.Random, data: bytes) -> tuple[int, bytes]:
    """Sends a request and reads its response in small parts with pauses; a small buffer."""
    with socket.socket() as connection:
        connection.settimeout(120)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        cuts = sorted(draw.sample(range(1, len(data)), 4))
        for begin, end in itertools.pairwise((0, *cuts, len(data))):
            connection.sendall(data[begin:end])
            time.sleep(0.05)
        response = http.client.HTTPResponse(connection)
        response.begin()
        parts = []
        while part := response.read(400):
            parts.append(part)
            time.sleep(0.01)
        return response.status, b"".join(parts)


def stop_sending(server: RunningServer, data: bytes) -> None:
    """Sends all of a request but its last byte; the server has to close the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(data[:-1])
        received = b""
        while part := connection.recv(4096):
            received += part
        assert b" 408 " in received.partition(b"\r\n")[0], received[:200]


def soak(
    server: RunningServer, requests: int, seconds: float, seed: int = 0, key: str | None = None
) -> Outcome:
    """Sends requests from several threads, until there were enough or the time is over.

    With the `key` of the server, some requests have a wrong one.
    """
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    expected = [
        texts_of(post(server, path, json.dumps(body).encode(), **headers)[1]) for path, body in GOOD
    ]
    counts, lock, failures = Counter[str](), threading.Lock(), list[BaseException]()
    end = time.monotonic() + seconds

    def refused(draw: random.Random, path: str, body: bytes) -> None:
        kind = draw.random()
        if kind < 0.25:
            foreign = {**headers, "Origin": "http://evil.example"}
            assert post(server, path, body, **foreign)[0] == 403
        elif kind < 0.5 and key is not None:
            wrong = draw.choice([{}, {"Authorization": "Bearer wrong"}])
            assert post(server, path, body, **wrong)[0] == 401
        else:
            bad, status = draw.choice(BAD)
            chosen = path if status == 400 else "completions"
            assert post(server, chosen, bad, **headers)[0] == status

    def one(draw: random.Random) -> str:
        number = draw.randrange(len(GOOD))
        path, fields = GOOD[number]
        body = json.dumps({**fields, "stream": draw.random() < 0.5}).encode()
        kind = draw.random()
        if kind < 0.2:
            refused(draw, path, body)
            return "refused"
        if kind < 0.4:
            streamed = json.dumps({**fields, "stream": True}).encode()
            leave(server, draw, request_bytes(path, streamed, headers))
            return "left"
        if kind < 0.41:
            stop_sending(server, request_bytes(path, body, headers))
            return "stopped sending"
        is_slow = kind < 0.5
        if is_slow:
            status, answer = ask_slowly(server, draw, request_bytes(path, body, headers))
        else:
            status, answer = post(server, path, body, **headers)
        if status == 429:
            return "queue full"
        assert status == 200, answer
        assert texts_of(answer) == expected[number]
        return "answered slowly" if is_slow else "answered"

    def work(worker: int) -> None:
        draw = random.Random(f"{seed} {worker}")
        try:
            for _ in range(requests // WORKERS):
                if time.monotonic() > end or failures:
                    return
                kind = one(draw)
                with lock:
                    counts[kind] += 1
        except BaseException as error:  # noqa: BLE001  raised by the main thread
            failures.append(error)

    before, start = settled(server, None), time.perf_counter()
    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Outcome(counts, before, settled(server, before), time.perf_counter() - start)


def check(server: RunningServer, outcome: Outcome) -> None:
    """Everything ends where it began."""
    before, after = outcome.before, outcome.after
    assert (after.rows, after.blocks, after.waiting) == (0, 0, 0)
    assert after.threads <= before.threads
    assert after.descriptors <= before.descriptors
    assert after.memory_mib < before.memory_mib + 24
    assert server.service.engine.compilations == server.compilations
    least = min(outcome.counts[kind] for kind in ("answered", "refused", "left"))
    assert least > outcome.counts.total() / 20, outcome.counts


def settled(server: RunningServer, before: Resources | None) -> Resources:
    """Resources once all connections are closed, at most 20 seconds later."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        now = resources(server)
        is_idle = now.rows == now.blocks == now.waiting == 0
        if is_idle and (before is None or now.descriptors <= before.descriptors):
            return now
        time.sleep(0.05)
    return resources(server)


def main() -> None:
    from serving.conftest import random_adapters, save_base
    from serving.running_server import LIMITS, running, warm_service

    with tempfile.TemporaryDirectory() as temporary:
        folder = save_base(Path(temporary) / "tiny")
        adapters = random_adapters(folder)
        # Rows have to give way to one another.
        service = warm_service(folder, adapters, LIMITS._replace(cache_tokens=96))
        with running(service, folder, adapters, api_key="secret") as server:
            soak(server, 200, 600, seed=1, key="secret")
            outcome = soak(server, int(sys.argv[1]), 3600, key="secret")
            print(dict(outcome.counts), f"{outcome.seconds:.0f} s")
            print(f"{service.engine.preemptions} rows gave way to others")
            print("before:", outcome.before)
            print("after: ", outcome.after)
            check(server, outcome)


if __name__ == "__main__":
    main()
