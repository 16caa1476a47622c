"""The engine alone: rows that join and leave, prompts in parts, ends and failures."""

import queue
import threading

import jax
import numpy as np
import pytest
from foreign_adapters import LORA, MIXLORA, SWITCH
from serving.engines import COMPUTE, PROMPT, SMALL, TOKENIZER, Collector, end, started
from serving.running_server import compiled_while_serving
from whole_models import adapter_of

import moe_jax
from moe_jax.config.run import MeshConfig
from moe_jax.errors import ConfigError
from moe_jax.hf.base_model import open_base
from moe_jax.inference.generator import Request, TokenGenerator
from moe_jax.inference.settings import SamplingConfig
from moe_jax.loaded.inference_model import build_model, load_adapters, load_params
from moe_jax.serving.answer import AnswerRequest, OngoingAnswer
from moe_jax.serving.engine import ClosedError, Engine, QueueFullError
from moe_jax.serving.serving_model import ServingModel
from moe_jax.sharding.mesh import make_mesh

METHODS = {
    "switch": {**MIXLORA, "router": SWITCH},
    # Of 23 tokens, an expert serves 6; of the first 8, it would serve 2.
    "share": {**MIXLORA, "router": {"name": "switch", "capacity_factor": 1.0}},
    "dora": {**LORA, "dora": True},
}


@pytest.fixture(scope="module")
def base(folder):
    return moe_jax.load_base(folder)


@pytest.fixture(scope="module")
def engine(base):
    engine = started(base, {})
    yield engine
    end(engine)


def test_values_that_adapters_keep_of_rows(base):
    """Capacities count the whole prompt and the row's own tokens, whoever had the row before."""
    adapters = {name: adapter_of(base, method) for name, method in METHODS.items()}
    loaded = {name: (one.method, one.tree) for name, one in adapters.items()}
    generator = TokenGenerator(base.config, base.params, loaded, compute=COMPUTE)
    expected = []
    for name in adapters:
        request = [Request(PROMPT, name)]
        steps = generator.stream(request, SamplingConfig(), max_new_tokens=8, eos_ids=())
        expected.append([token for (token,) in steps])
    assert len(set(map(tuple, expected))) == 3
    engine = started(base, adapters, SMALL._replace(max_rows=1))
    collector = Collector()
    for _ in range(2):
        for name in adapters:
            engine.submit([collector.answer(adapter=name)])
            assert not collector.wait(1)
    assert [answer.generated for answer in collector.answers] == 2 * expected
    end(engine)


def test_an_answer_does_not_depend_on_who_shares_its_batch(engine):
    prompts = [PROMPT[:3], PROMPT, PROMPT[4:9], PROMPT[2:17], PROMPT[9:]]
    settings = [{}, {"temperature": 1.2, "seed": 3}, {"repetition_penalty": 1.5}, {}, {"top_k": 4}]
    collector = Collector()
    for tokens, fields in zip(prompts, settings, strict=True):
        engine.submit([collector.answer(tokens, max_tokens=9, **fields)])
        collector.wait(1)
    alone = [answer.generated for answer in collector.answers]
    collector = Collector()
    together = [
        collector.answer(tokens, max_tokens=9, **fields)
        for tokens, fields in zip(prompts, settings, strict=True)
    ]
    engine.submit(together)
    collector.wait(5)
    assert [answer.generated for answer in together] == alone
    assert len(set(map(tuple, alone))) == 5


def test_the_queue_has_a_bound_and_cancelled_answers_leave_it(engine):
    began, goes_on = threading.Event(), threading.Event()

    def hold(event):
        began.set()
        assert goes_on.wait(60)

    held = OngoingAnswer(
        AnswerRequest(tokens=PROMPT[:3], max_tokens=9, logprobs=0), TOKENIZER, hold
    )
    engine.submit([held])
    assert began.wait(60)  # the engine's thread now waits, and so do all other answers
    collector = Collector()
    many = [collector.answer(max_tokens=17) for _ in range(6)]
    with pytest.raises(QueueFullError):
        engine.submit(many)
    engine.submit(many[:5])
    with pytest.raises(QueueFullError):
        engine.submit(many[5:])
    assert engine.waiting == 5
    for answer in (held, *many[:4]):
        answer.cancel()
    engine.submit(many[5:])
    assert engine.waiting == 2
    goes_on.set()
    assert not collector.wait(2)
    assert many[4].generated == many[5].generated
    assert [len(answer.generated) for answer in (held, *many)] == [1, 0, 0, 0, 0, 17, 17]


def test_rows_wait_for_the_blocks_of_their_prompts(engine):
    """Six blocks: the prompts and first tokens of two rows have four each."""
    collector = Collector()
    long = [collector.answer(PROMPT + PROMPT[:4], max_tokens=3, logprobs=0) for _ in range(2)]
    engine.submit(long)
    senders = [collector.events.get(timeout=60)[0] for _ in range(6)]
    assert senders == [0] * 3 + [1] * 3
    assert long[0].generated == long[1].generated


@pytest.mark.parametrize(("length", "max_tokens"), [(len(PROMPT), 17), (6, 34)])
def test_rows_that_give_way_lose_and_repeat_nothing(engine, length, max_tokens):
    """Six blocks, and rows that grow to five: one gives way in its prompt, or after many tokens."""
    settings = [
        {},
        {"temperature": 1.3, "seed": 4, "frequency_penalty": 0.7},
        {"scores_prompt": True, "temperature": 1.0, "seed": 5},
    ]
    answer = lambda collector, fields: collector.answer(
        PROMPT[:length], max_tokens=max_tokens, logprobs=0, **fields
    )
    collector, ends, alone = Collector(), [], []
    for fields in settings:
        engine.submit([answer(collector, fields)])
        ends.append([])
        while not ends[-1] or not ends[-1][-1].is_last:
            ends[-1].append(collector.events.get(timeout=60)[1])
        alone.append(collector.answers[-1].generated)
    before, collector = engine.preemptions, Collector()
    engine.submit([answer(collector, fields) for fields in settings])
    events = [[] for _ in settings]
    while not all(own and own[-1].is_last for own in events):
        number, event = collector.events.get(timeout=60)
        events[number].append(event)
    assert engine.preemptions > before
    assert [answer.generated for answer in collector.answers] == alone
    flat = lambda own: [token for event in own for token in (*event.prompt, *event.tokens)]
    for own, expected in zip(events, ends, strict=True):
        assert [t.id for t in flat(own)] == [t.id for t in flat(expected)]
        assert "".join(e.text for e in own) == "".join(e.text for e in expected)


def test_penalties_count_the_tokens_that_were_sent(engine, monkeypatch):
    """A row that computes an answer again may choose other tokens, by rounding."""
    fields = {"max_tokens": 34, "frequency_penalty": 1.0}
    collector = Collector()
    engine.submit([collector.answer(PROMPT[:6], **fields)])
    assert not collector.wait(1)
    alone, begin, begun = collector.answers[0].generated, engine._model.begin_history, []

    def begin_with_others(slot, prompt, answer=()):
        begun.append(len(answer))
        is_again = len(begun) > 2 and not answer
        begin(slot, prompt, 9 * alone if is_again else answer)

    monkeypatch.setattr(engine._model, "begin_history", begin_with_others)
    collector = Collector()
    engine.submit([collector.answer(PROMPT[:6], **fields) for _ in range(2)])
    assert not collector.wait(2)
    assert begun[:3] == [0, 0, 0] and begun[3] > 0
    assert [answer.generated for answer in collector.answers] == [alone] * 2


def test_failures_answer_all_requests(base):
    damaged = dict(base.params)
    damaged["norm"] = jax.tree.map(lambda leaf: leaf * np.nan, damaged["norm"])
    model = ServingModel(base.config, damaged, {}, compute=COMPUTE)
    engine, collector = Engine(model, SMALL), Collector()
    engine.start()
    engine.submit([collector.answer(), collector.answer()])
    errors = collector.wait(2)
    assert all("logits are not finite" in error for error in errors.values())
    end(engine)  # the thread goes on after answers that are not finite

    ended = queue.SimpleQueue()
    engine, collector = Engine(model, SMALL), Collector()
    model.prefill = lambda *_: 1 / 0
    engine.start(on_end=lambda: ended.put(engine.failure))
    engine.submit([collector.answer(), collector.answer(), collector.answer()])
    errors = collector.wait(3)
    assert set(errors.values()) == {"the server failed; its log has the reason"}
    assert isinstance(ended.get(timeout=10), ZeroDivisionError)
    with pytest.raises(ClosedError):
        engine.submit([collector.answer()])


def test_one_damaged_adapter_leaves_others_as_they_are(base):
    """Rows of other lengths do not read its values in the cache, in freed blocks too."""
    mix = adapter_of(base, MIXLORA)
    damaged = jax.tree.map(lambda leaf: leaf * np.nan, mix.tree)
    adapters = {"mix": mix, "damaged": mix._replace(tree=damaged)}
    engine, collector = started(base, adapters), Collector()

    def ask():
        answers = [
            collector.answer(PROMPT[:9], max_tokens=6), collector.answer(PROMPT[:3], "mix", 9)
        ]  # fmt: skip
        engine.submit(answers)
        assert not collector.wait(2)
        return [answer.generated for answer in answers]

    before = ask()
    engine.submit([collector.answer(adapter="damaged"), collector.answer(PROMPT[:5], "damaged")])
    assert len(collector.wait(2)) == 2
    assert ask() == before
    end(engine)


class UndecodableTokenizer:
    """Stand-in for a tokenizer whose decoding fails."""

    def decode(self, *_, **__):
        raise ValueError("no text")


def test_an_answer_that_fails_leaves_others_as_they_are(engine, capfd):
    collector = Collector()
    good = collector.answer()
    bad = collector.answer(tokenizer=UndecodableTokenizer())
    engine.submit([bad, good])
    assert collector.wait(2) == {1: "the answer failed; the server's log has the reason"}
    assert len(good.generated) == 8 and len(bad.generated) == 1
    assert "ValueError: no text" in capfd.readouterr().err
    engine.submit([after := collector.answer()])
    assert not collector.wait(1)
    assert after.generated == good.generated


def test_stopping_ends_answers_with_an_error(base):
    engine, collector = (
        Engine(ServingModel(base.config, base.params, {}, compute=COMPUTE), SMALL),
        Collector(),
    )
    engine.submit([collector.answer()])
    engine.stop()
    engine.start()
    assert collector.wait(1) == {0: "the server is shutting down"}


def test_a_mesh_gives_the_same_tokens(folder, base):
    """Four ways to divide rows, and the heads of the cache in two; nothing compiles later."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    files = open_base(folder)
    model = build_model(files, "float32")
    adapter = adapter_of(base, MIXLORA)
    one_device = started(base, {"mix": adapter})
    (loaded,) = load_adapters({"mix": adapter}, files, model, mesh)
    params = load_params(files, model, mesh)
    adapters = {"mix": (loaded.saved.method, loaded.saved.tree)}
    sharded = Engine(
        ServingModel(files.config, params, adapters, compute=COMPUTE, mesh=mesh), SMALL
    )
    sharded.warm_up()
    sharded.start()
    answers = []
    for engine in (one_device, sharded):
        collector = Collector()
        engine.submit([collector.answer(adapter="mix"), collector.answer(), collector.answer()])
        assert not collector.wait(3)
        answers.append([answer.generated for answer in collector.answers])
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]
    assert compiled_while_serving(one_device) > 0
    assert compiled_while_serving(sharded) == 0
    end(one_device)
    end(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_rows": 0}, "max_rows: must be positive, got 0"),
        ({"cache_tokens": 39}, "39 tokens do not hold one row of `max_length` 40"),
    ],
)
def test_sizes_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        SMALL._replace(**change).check()
