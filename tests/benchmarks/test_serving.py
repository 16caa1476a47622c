"""The serving benchmark: clients against a server with known answers, and estimated steps."""

import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from benchmarks import serving_steps
from benchmarks.sizes import model_of
from benchmarks.stream_clients import StreamClients, ask_all
from moe_jax.config.model import ComputeConfig
from moe_jax.models.adapted import abstract_params
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.serving import model_calls, serving_model
from moe_jax.serving.adapter_slots import layouts
from moe_jax.serving.call_rows import call_rows
from moe_jax.serving.row_table import RowTable


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


def test_clients_in_a_process_of_their_own(port):
    with StreamClients() as clients:
        streamed = clients.ask(port, 5 * ["200|{}|{}|[DONE]"], 2)
        assert len(streamed.first_tokens) == 5
        assert all(0 < seconds <= streamed.seconds for seconds in streamed.first_tokens)
        with pytest.raises(RuntimeError, match="the server answered 429"):
            clients.ask(port, ["429|{}"], 1)


class Given(Exception):
    """Ends the tracing of a decoding step; has what the step was given."""


def _given(run):
    """What `run` gives to the decoding step: adapter rows, scan, and shapes of the arrays."""

    def decode(model, vocab_size, *arrays):
        shapes = jax.tree.map(lambda array: (array.shape, str(array.dtype)), arrays)
        raise Given(model.adapter_rows, model.scan_layers, vocab_size, shapes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_calls, "decode", decode)
        with pytest.raises(Given) as given:
            run()
    return given.value.args


def _zeros(shapes):
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


@pytest.mark.parametrize("adapters", [0, 1, 4])
def test_the_estimated_step_is_that_of_the_server(adapters, monkeypatch):
    rows, length, block, config = 8, 70, 4, model_of("tiny")
    group = serving_model.BLOCKS_AT_ONCE
    args = Namespace(length=length, rank=4, block=block, group=group, dtype="bfloat16")
    layout = serving_steps.layout_of(args, config, rows, adapters)
    lower = lambda: serving_steps.lowered_step(args, config, layout, jax.devices()[0])
    chosen, computed, _ = lower().out_info
    assert chosen.tokens.shape == (rows,)
    assert len(computed.routing) == adapters

    # The server on a GPU, with a cache that is just large enough.
    monkeypatch.setattr(serving_model, "platform_of", lambda *_: "gpu")
    language_model = LlamaForCausalLM(config, ComputeConfig(dtype=args.dtype), (), args.dtype)
    params = _zeros(nn.meta.unbox(abstract_params(language_model)))
    method, tree = serving_steps.adapter_of(args, config)
    loaded = {f"adapter{index}": (method, _zeros(tree)) for index in range(adapters)}
    model = serving_model.ServingModel(config, params, loaded, compute=language_model.compute)
    assert layout in layouts(rows, model.methods)
    blocks = rows * 3 * group  # three groups of 8 blocks of 4 tokens hold 70
    model.allocate(rows, blocks, block)
    table = RowTable(rows, blocks, block, length, model.blocks_at_once)
    call = call_rows(model, table, [layout], [])
    decode = lambda: model.decode(call.slots, call.decoding_call(), call.settings)
    assert _given(lower) == _given(decode)


def test_rows_of_estimated_steps_are_checked(capsys):
    assert serving_steps.main(["--rows", "6"]) == 2
    assert capsys.readouterr().err == (
        "error: --rows: expected multiples of 4, separated by commas\n"
    )
