"""What lm-evaluation-harness asks for when a task generates text, in this library's terms."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.config.parse import located, suggest
from moe_jax.errors import ConfigError
from moe_jax.inference.sampling import SamplingConfig
from moe_jax.inference.text import GenerationConfig

MAX_NEW_TOKENS = 256
"""Where a task does not say how many; the harness's own default for models of transformers."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAWING = ("temperature", "top_k", "top_p", "min_p")
_KNOWN = ("until", "do_sample", "repetition_penalty", *_LENGTHS, *_DRAWING)


def generation_config(asked: Mapping[str, Any]) -> GenerationConfig:
    """How to generate, by a task's `generation_kwargs`.

    Without `do_sample`, a positive temperature means to draw. Where nothing is drawn, what says how
    to is left out, as the harness does.

    Raises:
      ConfigError: an argument is unknown or out of range.
    """
    for name in asked:
        if name not in _KNOWN:
            raise ConfigError(f"generation_kwargs.{name}: unknown; {suggest(name, _KNOWN)}")
    until = asked.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    lengths = [asked[name] for name in _LENGTHS if asked.get(name) is not None]
    draws = asked.get("do_sample")
    if draws is None:
        draws = float(asked.get("temperature") or 0) > 0
    drawing = {}
    if draws:
        drawing = {name: asked[name] for name in _DRAWING if asked.get(name) is not None}
        drawing.setdefault("temperature", 1.0)
        if drawing.get("top_k") == 0:  # transformers' way to say that there is no limit
            del drawing["top_k"]
    penalty = asked.get("repetition_penalty")
    with located("generation_kwargs"):
        return GenerationConfig(
            sampling=SamplingConfig(
                **drawing, repetition_penalty=1.0 if penalty is None else penalty
            ),
            max_new_tokens=lengths[0] if lengths else MAX_NEW_TOKENS,
            stop=tuple(stop for stop in stops if stop),
        )


def grouped(
    requests: Sequence[tuple[str, dict[str, Any]]],
) -> dict[GenerationConfig, list[int]]:
    """The requests that are asked for in the same way, by their place.

    Raises:
      ConfigError: as in `generation_config`.
    """
    groups: dict[GenerationConfig, list[int]] = {}
    for place, (_, asked) in enumerate(requests):
        groups.setdefault(generation_config(asked), []).append(place)
    return groups
