"""Decoding speed of transformers' `generate`. Needs torch and transformers."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList


class Clock(LogitsProcessor):
    """Logits processor that records the time of each token, for any number of rows."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return scores


def generate_seconds_per_step(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int
) -> float:
    """Decodes greedily; returns the mean seconds of a step from the first new token to the last.

    Args:
      model: causal language model.
      prompts: token ids of each row, of equal length.
      new_tokens: number of new tokens of each row, at least 2.
    """
    clock = Clock()
    tokens = torch.tensor(prompts, device=model.device)
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([clock]),
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
    )
    return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)
