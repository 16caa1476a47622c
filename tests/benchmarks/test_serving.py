"""The clients of the serving benchmark, against a server with known answers."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import serving_steps
from benchmarks.stream_clients import ask_all


class Answers(BaseHTTPRequestHandler):
    """Streams the body of a request back, line by line."""

    def do_POST(self):
        lines = self.rfile.read(int(self.headers["Content-Length"])).decode().strip('"').split("|")
        self.send_response(int(lines[0]))
        self.end_headers()
        self.wfile.write("".join(f"data: {line}\n\n" for line in lines[1:]).encode())

    def log_message(self, *_):
        """Prints nothing."""


@pytest.fixture(scope="module")
def port():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_every_answer_is_timed(port):
    streamed = ask_all(port, 7 * ["200|{}|{}|[DONE]"], 3)
    assert len(streamed.first_tokens) == 7
    assert all(0 < seconds <= streamed.seconds for seconds in streamed.first_tokens)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("429|{}", "the server answered 429"),
        ("200|{}|{}", "did not come to its end"),
        ("200|{}|{error}", "did not come to its end: b'data: {error}'"),
        ("200", "did not come to its end"),
    ],
)
def test_an_answer_that_is_cut_is_no_measurement(port, answer, message):
    with pytest.raises(RuntimeError, match=message):
        ask_all(port, ["200|{}|[DONE]", answer], 2)


def test_rows_of_estimated_steps_are_checked(capsys):
    assert serving_steps.main(["--rows", "6"]) == 2
    assert capsys.readouterr().err == (
        "error: --rows: expected multiples of 4, separated by commas\n"
    )
