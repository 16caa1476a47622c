"""Settings of text generation.

Needs neither jax nor transformers, so that `moe-jax generate --help` answers at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from moe_jax.config.parse import require


@dataclass(frozen=True)
class SamplingConfig:
    """Rule by which the next token is chosen from the logits.

    Attributes:
      temperature: divisor of the logits; 0 is greedy decoding.
      top_k: number of most likely tokens that may be drawn, with those that tie with the last one;
        None is no limit.
      top_p: only the most likely tokens whose cumulative probability passes this may be drawn
        (nucleus sampling, arXiv:1904.09751); 1 is no limit.
      min_p: smallest probability of a token that may be drawn, relative to the most likely token
        (arXiv:2407.01082); 0 is no limit.
      repetition_penalty: divisor of the positive logits, and factor of the negative ones, of tokens
        that are in the prompt or the answer so far (CTRL, arXiv:1909.05858, section 4.1); 1 is no
        penalty. Applies to greedy decoding too.

    Raises:
      ConfigError: a value is out of range, or has no effect with greedy decoding.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            require(is_number, name, f"must be a number, got {value!r}")
        require(
            0 <= self.temperature < float("inf"),
            "temperature",
            f"must be 0 (greedy) or positive, got {self.temperature}",
        )
        require(
            self.top_k is None or _is_positive_int(self.top_k),
            "top_k",
            f"must be a positive whole number, or None for no limit, got {self.top_k!r}",
        )
        require(0 < self.top_p <= 1, "top_p", f"must be above 0 and at most 1, got {self.top_p}")
        require(0 <= self.min_p <= 1, "min_p", f"must be between 0 and 1, got {self.min_p}")
        require(
            0 < self.repetition_penalty < float("inf"),
            "repetition_penalty",
            f"must be positive (1 is no penalty), got {self.repetition_penalty}",
        )
        for name, neutral in (("top_k", None), ("top_p", 1), ("min_p", 0)):
            require(
                self.temperature > 0 or getattr(self, name) == neutral,
                name,
                "has no effect with temperature 0, which is greedy; set a temperature too, such "
                "as 1",
            )

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is always chosen."""
        return self.temperature == 0


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Number, length and end of the answers to each prompt.

    Attributes:
      sampling: rule by which tokens are chosen.
      max_new_tokens: largest number of tokens of an answer.
      samples: number of answers to each prompt.
      stop: strings before which an answer ends; special tokens may be given by their text.
      seed: random seed; the same seed gives the same answers.

    Raises:
      ConfigError: a value is out of range.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_new_tokens: int = 128
    samples: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name in ("max_new_tokens", "samples"):
            value = getattr(self, name)
            require(_is_positive_int(value), name, f"must be a positive number, got {value!r}")
        require(
            self.samples == 1 or not self.sampling.is_greedy,
            "samples",
            f"with temperature 0 all {self.samples} would be the same; set a temperature",
        )
        is_seed = isinstance(self.seed, int) and 0 <= self.seed < 2**32
        require(is_seed, "seed", f"must be between 0 and 2**32 - 1, got {self.seed!r}")
        is_strings = isinstance(self.stop, tuple) and all(isinstance(s, str) for s in self.stop)
        require(is_strings, "stop", f"must be strings, got {self.stop!r}")
        require("" not in self.stop, "stop", "a stop string is empty, and would end every answer")


@dataclass(frozen=True)
class PromptFormat:
    """Format in which a text is presented to the model.

    Attributes:
      chat: the text is a user's turn, formatted by the tokenizer's chat template.
      system: system message at the start of conversations; requires `chat`.
      template: the text is an instruction, formatted by this prompt template as in training: the
        name of a file in `moe_jax/data/prompts/`, or a path. Without `chat` and `template` the text
        is the prompt.

    Raises:
      ConfigError: fields contradict each other.
    """

    chat: bool = False
    system: str | None = None
    template: str | None = None

    def __post_init__(self):
        require(
            not (self.chat and self.template),
            "template",
            "is for prompts without a chat template; give it or `chat`, not both",
        )
        require(
            self.chat or self.system is None,
            "system",
            "a system message is for conversations; give `chat` too",
        )


class StreamSettings(TypedDict, total=False):
    """Keyword arguments of `generate_stream`: fields of the three classes above, in one list."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: str | Sequence[str]
    seed: int
    chat: bool
    system: str | None
    template: str | None


class GenerateSettings(StreamSettings, total=False):
    """Keyword arguments of `generate`."""

    samples: int


def parse_settings(settings: Mapping[str, Any]) -> tuple[GenerationConfig, PromptFormat]:
    """Builds the configuration from keyword arguments.

    Raises:
      ConfigError: a value is out of range, or two contradict each other.
      TypeError: a name is unknown.
    """
    sampling, generation, prompt_format = (
        {name: settings[name] for name in names if name in settings}
        for names in (_names(cls) for cls in (SamplingConfig, GenerationConfig, PromptFormat))
    )
    for name in settings:
        if name not in GenerateSettings.__annotations__:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
    if "stop" in generation:
        stop = generation["stop"]
        generation["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return (
        GenerationConfig(sampling=SamplingConfig(**sampling), **generation),
        PromptFormat(**prompt_format),
    )


def _names(cls: Any) -> list[str]:
    return [member.name for member in fields(cls)]


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
