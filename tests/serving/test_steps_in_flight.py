"""Steps that are dispatched before answers get the tokens of the step before."""

import asyncio
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from foreign_adapters import MIXLORA
from serving.engines import COMPUTE, PROMPT, SMALL, TOKENIZER, Collector, end, started
from whole_models import adapter_of

import moe_jax
from moe_jax.inference.decoding import NOT_FINITE
from moe_jax.serving.answer import AnswerRequest, OngoingAnswer
from moe_jax.serving.engine import Engine
from moe_jax.serving.metrics import Metrics
from moe_jax.serving.service import Service
from moe_jax.serving.serving_model import ServingModel

SHARE = {**MIXLORA, "router": {"name": "switch", "capacity_factor": 1.0}}


@pytest.fixture(scope="module")
def base(folder):
    return moe_jax.load_base(folder)


@pytest.fixture(scope="module")
def engine(base):
    engine = started(base, {"mix": adapter_of(base, MIXLORA), "share": adapter_of(base, SHARE)})
    yield engine
    end(engine)


def on_tokens(act, **fields):
    """An answer whose sink calls `act(answer, number of tokens)`, and an event of its end."""
    ended = threading.Event()

    def sink(event):
        act(answer, event.length)
        if event.is_last:
            ended.set()

    request = AnswerRequest(**{"temperature": 0.0, "logprobs": 0, **fields})
    answer = OngoingAnswer(request, TOKENIZER, sink)
    return answer, ended


def alone(engine, **fields):
    collector = Collector()
    engine.submit([collector.answer(**fields)])
    assert not collector.wait(1)
    return collector.answers[0].generated


def test_the_next_step_is_dispatched_first(engine, monkeypatch):
    """Also where a row takes a further block. No step follows the last token, but an end token."""
    decode, order = engine._model.decode, []

    def recorded(*arguments):
        order.append("step")
        return decode(*arguments)

    monkeypatch.setattr(engine._model, "decode", recorded)

    def ask(**fields):
        order.clear()
        answer, ended = on_tokens(lambda *_: order.append("token"), tokens=PROMPT[:3], **fields)
        engine.submit([answer])
        assert ended.wait(60)
        alone(engine, max_tokens=1)  # after the last step
        return answer.generated, list(order)

    whole, steps = ask(max_tokens=17)
    assert steps == ["token", "step", *["step", "token"] * 15, "token"]
    place = next(i for i in range(1, 16) if whole[i] not in whole[:i])
    cut, steps = ask(max_tokens=17, end_ids=frozenset({whole[place]}))
    assert cut == whole[: place + 1]
    assert steps.count("step") == place + 1


def test_a_row_that_ends_leaves_nothing_to_the_next_one(base):
    """The step in vain writes to the blocks, the history and the router's counts of its slot."""
    adapters = {"share": adapter_of(base, SHARE)}
    engine = started(base, adapters, SMALL._replace(max_rows=1))
    after = {"adapter": "share", "max_tokens": 12, "frequency_penalty": 1.5}
    expected = alone(engine, **after)
    first = alone(engine, tokens=PROMPT[:5], adapter="share", max_tokens=9)
    place = next(i for i in range(2, 8) if first[i] not in first[:i])
    collector = Collector()
    ends = {"end_ids": frozenset({first[place]}), "frequency_penalty": 0.0}
    engine.submit(
        [
            collector.answer(PROMPT[:5], "share", 9, **ends),
            collector.answer(**after),
        ]
    )
    assert not collector.wait(2)
    assert [answer.generated for answer in collector.answers] == [first[: place + 1], expected]
    end(engine)


def test_an_answer_that_is_cancelled_as_it_gets_a_token(engine):
    expected = alone(engine, tokens=PROMPT[:4], max_tokens=12)

    def leave(answer, length):
        if length == 4:
            answer.cancel()

    leaving, _ = on_tokens(leave, tokens=PROMPT[:6], adapter="mix", max_tokens=30)
    collector = Collector()
    engine.submit([leaving, collector.answer(PROMPT[:4], max_tokens=12)])
    assert not collector.wait(1)
    assert collector.answers[0].generated == expected
    assert len(leaving.generated) == 4


def test_logits_that_are_not_finite_in_the_middle(engine, monkeypatch):
    """The token of the failed row, which is none, is already part of the next step."""
    expected = alone(engine, tokens=PROMPT[:4], max_tokens=12)
    decode, calls = engine._model.decode, []

    def failing(slots, call, settings):
        chosen, routing = decode(slots, call, settings)
        calls.append(call)
        if len(calls) == 4:
            is_failed = call.lengths == len(PROMPT) - 1
            assert is_failed.sum() == 1
            chosen = chosen._replace(tokens=jnp.where(is_failed, NOT_FINITE, chosen.tokens))
        return chosen, routing

    collector = Collector()
    answers = [
        collector.answer(PROMPT[: len(PROMPT) - 4], adapter="mix", max_tokens=20),
        collector.answer(PROMPT[:4], max_tokens=12),
    ]
    # Prompts of three parts and of one: the first row decodes alone until the other has its own.
    monkeypatch.setattr(engine._model, "decode", failing)
    engine.submit(answers[:1])
    engine.submit(answers[1:])
    errors = collector.wait(2)
    assert isinstance(calls[4].tokens, jax.Array)  # not read before
    assert list(errors) == [0] and "not finite" in errors[0]
    assert answers[1].generated == expected


def test_steps_are_ahead_again_after_a_row_gave_way(base, monkeypatch):
    """Six blocks, and two rows that grow to five."""
    engine, collector, steps = started(base, {}), Collector(), []
    decode = engine._model.decode

    def recorded(slots, call, settings):
        steps.append((engine.preemptions, isinstance(call.tokens, jax.Array)))
        return decode(slots, call, settings)

    monkeypatch.setattr(engine._model, "decode", recorded)
    engine.submit([collector.answer(PROMPT[:6], max_tokens=34) for _ in range(2)])
    assert not collector.wait(2)
    assert {*steps} == {(0, False), (0, True), (1, False), (1, True)}
    assert steps[-1] == (1, True)
    first, second = collector.answers
    assert first.generated == second.generated
    end(engine)


def test_stopping_with_a_step_in_flight(base):
    engine = started(base, {})
    stop = lambda _, length: engine.stop() if length == 3 else None
    answer, ended = on_tokens(stop, tokens=PROMPT[:3], max_tokens=30)
    engine.submit([answer])
    assert ended.wait(60) and engine.join(30)
    assert answer.is_ended and len(answer.generated) == 3


def test_adapters_that_take_turns(base, monkeypatch):
    """A slot for one adapter, so that a step has two calls."""
    monkeypatch.setattr("moe_jax.serving.adapter_slots.SLOTS", 1)
    adapters = {name: adapter_of(base, MIXLORA, spread=s) for name, s in (("a", 0.1), ("b", 0.3))}
    engine, collector = started(base, adapters), Collector()
    expected = [alone(engine, adapter=name, max_tokens=12) for name in adapters]
    assert expected[0] != expected[1]
    engine.submit([collector.answer(adapter=name, max_tokens=12) for name in adapters])
    assert not collector.wait(2)
    assert [answer.generated for answer in collector.answers] == expected
    end(engine)


def test_attention_to_several_blocks_at_once(base, engine):
    """As on accelerators; a row has 40 positions, and three groups of two blocks of 8 have 48."""
    model = ServingModel(base.config, base.params, {}, compute=COMPUTE)
    model.blocks_at_once = 2
    grouped = Engine(model, SMALL)
    grouped.start()
    fields = {"tokens": PROMPT, "max_tokens": 17}
    assert alone(grouped, **fields) == alone(engine, **fields)
    end(grouped)


def test_tokens_do_not_wait_for_the_prompts_of_others(base, monkeypatch):
    model = ServingModel(base.config, base.params, {}, compute=COMPUTE)
    engine, seen = Engine(model, SMALL), []
    second = Collector()

    def ask_second(_, length):
        if length == 2:
            engine.submit([second.answer(PROMPT)])

    first, ended = on_tokens(ask_second, tokens=PROMPT[:3], max_tokens=20)
    delivered = [0]
    prefill = model.prefill

    def recorded(slots, call):
        seen.append((len(first.generated), delivered[0]))
        return prefill(slots, call)

    monkeypatch.setattr(model, "prefill", recorded)
    engine.start(on_step=lambda: delivered.__setitem__(0, len(first.generated)))
    engine.submit([first])
    assert ended.wait(60) and not second.wait(1)
    end(engine)
    assert len(seen) == 4 and all(tokens == known for tokens, known in seen)
    assert [tokens for tokens, _ in seen[1:]] == [3, 4, 5]


def test_answers_behind_a_cancelled_one_do_not_wait(engine):
    """Six blocks, of which a row has four: a prompt of three waits, and a short one behind it."""
    collector = Collector()
    long = collector.answer(PROMPT, max_tokens=1)
    small = collector.answer(PROMPT[:3], max_tokens=1)

    def cancel(_, length):
        if length == 3:
            long.cancel()
            engine.wake()

    first, ended = on_tokens(cancel, tokens=PROMPT + PROMPT[:4], max_tokens=13)
    seen = []
    small._sink = lambda event: seen.append(len(first.generated))
    engine.submit([first, long, small])
    assert ended.wait(60)
    assert 3 <= seen[0] <= 5


def test_a_loop_is_woken_once_a_step(base):
    class Loop:
        def __init__(self, is_closed=False):
            self.calls, self.is_closed = [], is_closed

        def call_soon_threadsafe(self, *call):
            if self.is_closed:
                raise RuntimeError("Event loop is closed")
            self.calls.append(call)

    on_steps = []
    start = lambda on_step, on_end: on_steps.append(on_step)
    engine = SimpleNamespace(limits=SMALL, start=start)
    service = Service("base", base.config, {}, TOKENIZER, frozenset(), engine, Metrics())
    service.start(lambda: None)
    loops = [Loop(), Loop(is_closed=True), Loop()]
    events = [asyncio.Event() for _ in range(4)]
    for loop, event in zip((*loops, loops[0]), events, strict=True):
        service.set_after_step(loop, event)
    on_steps[0]()
    assert [len(loop.calls) for loop in loops] == [1, 0, 1]
    for loop in loops:
        for function, *arguments in loop.calls:
            function(*arguments)
    assert [event.is_set() for event in events] == [True, False, True, True]
    on_steps[0]()
    assert [len(loop.calls) for loop in loops] == [1, 0, 1]
