"""Engines on the tests' tiny base, and collectors of their answers' events."""

import queue

import numpy as np
from inference.tokenizers_to_try import byte_level

from moe_jax.config.model import ComputeConfig
from moe_jax.serving.answer import AnswerRequest, OngoingAnswer
from moe_jax.serving.engine import Engine
from moe_jax.serving.limits import EngineLimits
from moe_jax.serving.serving_model import ServingModel

COMPUTE = ComputeConfig(dtype="float32")
SMALL = EngineLimits(max_rows=2, max_length=40, max_queue=5, cache_tokens=48, block=8, chunks=(8,))
PROMPT = tuple(int(token) for token in np.random.default_rng(7).integers(3, 600, 23))
TOKENIZER = byte_level()


class Collector:
    """Receives the events of answers, and waits for their ends."""

    def __init__(self):
        self.events = queue.SimpleQueue()
        self.answers = []

    def answer(self, tokens=PROMPT, adapter=None, max_tokens=8, tokenizer=TOKENIZER, **settings):
        request = AnswerRequest(
            tokens=tokens,
            adapter=adapter,
            max_tokens=max_tokens,
            **{"temperature": 0.0, **settings},
        )
        number = len(self.answers)
        sink = lambda event: self.events.put((number, event))
        self.answers.append(OngoingAnswer(request, tokenizer, sink))
        return self.answers[-1]

    def wait(self, count):
        """Waits for the ends of `count` answers; returns the errors of those that failed."""
        errors = {}
        while count:
            number, event = self.events.get(timeout=60)
            count -= event.is_last
            if event.error is not None:
                errors[number] = event.error
        return errors


def started(base, adapters, limits=SMALL):
    loaded = {name: (one.method, one.tree) for name, one in adapters.items()}
    engine = Engine(ServingModel(base.config, base.params, loaded, compute=COMPUTE), limits)
    engine.start()
    return engine


def end(engine):
    engine.close()
    assert engine.join(30)
    assert engine.failure is None
    assert (engine.rows_in_use, engine.blocks_in_use, engine.waiting) == (0, 0, 0)
