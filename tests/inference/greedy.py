"""Greedy continuations by this library and by transformers."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from moe_jax.inference.generator import Request, TokenGenerator
from moe_jax.inference.settings import SamplingConfig

UNUSED_ID = 10**6
"""Id beyond the vocabulary, so that only the length ends a continuation."""

GREEDY = SamplingConfig()


def continuations(
    generator: TokenGenerator,
    requests: Sequence[Request],
    new_tokens: int,
    *,
    sampling: SamplingConfig = GREEDY,
    eos_id: int = UNUSED_ID,
    **options,
) -> list[list[int]]:
    """New tokens of each request; asserts that a row that has ended stays ended."""
    rows = [[] for _ in requests]
    ended = [False] * len(requests)
    steps = generator.stream(
        requests, sampling, max_new_tokens=new_tokens, eos_ids=(eos_id,), **options
    )
    for step in steps:
        assert len(step) == len(requests)
        for number, token in enumerate(step):
            ended[number] = ended[number] or token is None
            assert ended[number] == (token is None)
            if token is not None:
                rows[number].append(token)
    return rows


def transformers_continuation(
    model: PreTrainedModel, prompt: Sequence[int], new_tokens: int
) -> list[int]:
    """Greedy continuation of a single prompt by transformers' `generate`."""
    tokens = model.generate(
        torch.tensor([list(prompt)]),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens[0, len(prompt) :].tolist()
