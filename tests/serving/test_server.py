"""Responses of the routes: errors, the page, the queue and the numbers for Prometheus."""

import re
import socket
import threading

from serving.raw_requests import BODY, error_of, numbers, send

from moe_jax.serving.app import PAGE_FILES


def test_unknown_paths_and_methods(served):
    for path in (
        "/v1/nothing",
        "/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//x",
        "/page.js/..",
    ):
        status, error = error_of(send(served, "GET", path))
        assert status == 404 and "no such path" in error["message"]
    status, error = error_of(send(served, "GET", "/v1/completions"))
    assert status == 405 and error["type"] == "invalid_request_error"


def test_bodies(served):
    post = lambda body: error_of(send(served, "POST", "/v1/completions", body))
    assert post(b"{nonsense")[0] == 400
    assert post({**BODY, "temperature": -1})[1]["param"] == "temperature"
    assert post({**BODY, "prompt": [3, 9999]})[1]["param"] == "prompt"
    assert "unpaired surrogate" in post({**BODY, "prompt": "\ud800"})[1]["message"]
    # The server answers before the whole body has come, so that the client may not read it.
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**7}\r\n\r\n"
        )
        connection.sendall(head.encode() + b" " * (2 << 20))
        assert b" 413 " in connection.recv(100)
    assert send(served, "POST", "/v1/completions", BODY)[0] == 200


def test_the_page_and_its_headers(served):
    status, headers, body = send(served, "GET", "/")
    assert status == 200 and b"<html" in body
    linked = re.findall(r'(?:src|href)="([^":]+)"', body.decode())
    types = {name: send(served, "GET", f"/{name}")[1]["content-type"] for name in linked}
    assert set(types) == set(PAGE_FILES) - {""}
    for name, media_type in types.items():
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        assert media_type.startswith(kind)
    assert headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_a_defect_is_answered_with_an_error_object(served, monkeypatch):
    monkeypatch.setattr(served.service, "models", lambda: 1 / 0)
    before = numbers(served)
    status, error = error_of(send(served, "GET", "/v1/models"))
    assert status == 500 and error["type"] == "server_error"
    name = 'moe_jax_requests_total{path="/v1/models",status="500"}'
    assert numbers(served)[name] == before.get(name, 0) + 1


def test_an_engine_that_stops_is_not_the_requests_fault(served, monkeypatch):
    engine = served.service.engine

    def stopped(answers):
        for answer in answers:
            answer.fail("the server is shutting down", status=503)
        engine._on_step()

    monkeypatch.setattr(engine, "submit", stopped)
    status, error = error_of(send(served, "POST", "/v1/completions", BODY))
    assert status == 503 and error["message"] == "the server is shutting down"


def test_requests_that_cannot_be_answered_are_not_tokenized(served, monkeypatch):
    monkeypatch.setattr("moe_jax.serving.service.encode_prompt", None)
    post = lambda **fields: error_of(send(served, "POST", "/v1/completions", {**BODY, **fields}))
    status, error = post(prompt="a " * 100_000)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    status, error = post(prompt=["a"] * 13)
    assert (status, error["param"]) == (400, "prompt")
    monkeypatch.setattr(type(served.service.engine), "waiting", 12)
    assert post()[0] == 429


def test_a_full_queue(served):
    """Twelve answers may wait; a request for more than that can never be accepted."""
    status, error = error_of(send(served, "POST", "/v1/completions", {**BODY, "n": 13}))
    assert status == 400 and "at most 12 answers, got 13" in error["message"]
    results = []
    ask = lambda: results.append(
        send(served, "POST", "/v1/completions", {**BODY, "n": 12, "max_tokens": 60})
    )
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    statuses = sorted(status for status, *_ in results)
    assert statuses[0] == 200 and statuses[-1] == 429
    refused = next(result for result in results if result[0] == 429)
    assert refused[1]["retry-after"] == "1"
    assert error_of(refused)[1]["code"] == "rate_limit_exceeded"


def test_numbers_for_prometheus(served):
    send(served, "POST", "/v1/completions", {**BODY, "prompt": [5, 6, 7]})
    send(served, "POST", "/v1/completions", {**BODY, "prompt": []})
    before = numbers(served)
    send(served, "POST", "/v1/completions", {**BODY, "prompt": [5, 6, 7]})
    send(served, "POST", "/v1/completions", {**BODY, "prompt": []})
    send(served, "GET", "/nowhere")
    after = numbers(served)
    change = lambda name: after[name] - before.get(name, 0)
    assert change("moe_jax_prompt_tokens_total") == 3
    assert change("moe_jax_generated_tokens_total") == 3
    assert change('moe_jax_requests_total{path="/v1/completions",status="200"}') == 1
    assert change('moe_jax_requests_total{path="/v1/completions",status="400"}') == 1
    assert change('moe_jax_requests_total{path="other",status="404"}') == 1
    assert change("moe_jax_time_to_first_token_seconds_count") == 1
    assert change("moe_jax_time_per_token_seconds_count") == 2
    assert after["moe_jax_rows_in_use"] == after["moe_jax_queue_answers"] == 0
    assert after["moe_jax_compilations"] == served.compilations


def test_a_server_that_ends_refuses_requests(served, monkeypatch):
    monkeypatch.setattr(served.service, "is_draining", True)
    status, error = error_of(send(served, "POST", "/v1/completions", BODY))
    assert status == 503 and error["type"] == "server_error"
    assert send(served, "GET", "/health")[0] == 503
