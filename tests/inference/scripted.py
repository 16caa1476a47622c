"""Scripted stand-in for `TokenGenerator`, for tests that do not depend on a model."""

from collections.abc import Callable, Sequence

from moe_jax.inference.generator import Request


class ScriptedGenerator:
    """Yields the tokens `script(request)`; stops like `TokenGenerator`."""

    def __init__(self, script: Callable[[Request], Sequence[int]]):
        self.script = script
        self.batches: list[list[Request]] = []

    def stream(self, requests, sampling, *, max_new_tokens, eos_ids, seed=0, stop=None):
        self.batches.append(list(requests))
        scripts = [list(self.script(request))[:max_new_tokens] for request in requests]
        written = [[] for _ in requests]
        ended = [False] * len(requests)
        while not all(ended):
            step = [None] * len(requests)
            for row, script in enumerate(scripts):
                if ended[row]:
                    continue
                step[row] = token = script[len(written[row])]
                written[row].append(token)
                ended[row] = (
                    token in eos_ids
                    or len(written[row]) == len(script)
                    or (stop is not None and stop(row, written[row]))
                )
            yield step
