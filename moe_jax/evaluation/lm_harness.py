"""Our model behind the interface of lm-evaluation-harness, so that any of its tasks runs.

Needs the extra `lm-eval`. From Python:

    import lm_eval
    from moe_jax.evaluation.lm_harness import HarnessModel

    model = HarnessModel("models/llama", adapter="runs/mine/adapters/default")
    lm_eval.simple_evaluate(model=model, tasks=["arc_easy"])
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moe_jax.adapters.method import require_language_model
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import FloatType
from moe_jax.config.parse import located, suggest
from moe_jax.config.run import MeshConfig
from moe_jax.data.tokenizer import encode, end_of_text, leading_tokens, load_tokenizer
from moe_jax.errors import ConfigError, DataError
from moe_jax.evaluation.scorer import ScoredSequence, Scorer, SequenceScore, default_buckets
from moe_jax.evaluation.scoring_protocols import encode_pairs
from moe_jax.hf.base_model import BaseModel, open_base
from moe_jax.inference.api import InferenceSession
from moe_jax.inference.prompts import Prompt
from moe_jax.inference.settings import GenerationConfig, SamplingConfig
from moe_jax.loaded.model import build_model, load_adapters, load_params
from moe_jax.sharding.mesh import make_mesh

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows
except ImportError as error:
    raise ConfigError(
        "lm-evaluation-harness is not installed; pip install 'moe-jax[lm-eval]'"
    ) from error


@register_model("moe_jax")
class HarnessModel(TemplateLM):
    """A base, or an adapter on it, for `lm_eval.simple_evaluate`.

    Attributes:
      tokenizer: the base's own.
      max_length: tokens of its context.
    """

    def __init__(
        self,
        base: str | Path | BaseModel,
        adapter: str | Path | SavedAdapter | None = None,
        *,
        revision: str | None = None,
        dtype: FloatType = "float32",
        batch_size: int = 16,
        truncate: bool = False,
        mesh: MeshConfig | None = None,
    ):
        """Loads both.

        Args:
          base, revision, dtype, batch_size, mesh: see `run.evaluate`.
          adapter: a folder, or what `moe_jax.load_adapter` returned; None is the base as it is.
          truncate: cuts tokens off the start of a request that is longer than the base's context,
            instead of refusing it.
        """
        super().__init__()
        files = open_base(base, revision)
        model = build_model(files, dtype)
        devices = None if mesh is None else make_mesh(mesh)
        named = {} if adapter is None else {"adapter": adapter}
        loaded = load_adapters(named, files, model, devices)
        for one in loaded:
            require_language_model(one.saved.method, str(adapter), "score texts")
        self.tokenizer: Any = load_tokenizer(files.folder)
        self.max_length = files.config.max_position_embeddings
        self._adapter = loaded[0].adapter if loaded else None
        self._adapter_name = loaded[0].name if loaded else None
        self._lead = leading_tokens(self.tokenizer)
        self._truncate = truncate
        self._batch_size = int(batch_size)
        self._conversations: set[str] = set()  # by their texts, as requests hold them
        params = load_params(files, model, devices)
        self._session = InferenceSession(
            files._replace(params=params),
            {one.name: one.adapter for one in loaded},
            dtype=dtype,
            mesh=devices,
        )
        self._scorer = Scorer(
            model,
            params,
            batch_size=self._batch_size,
            buckets=default_buckets(self.max_length),
            mesh=devices,
        )

    @property
    def eot_token_id(self) -> int:
        return end_of_text(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        del kwargs
        ids = encode(self.tokenizer, [string])[0]
        is_led = ids[: len(self._lead)] == self._lead
        return ids if add_special_tokens is False or is_led else [*self._lead, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # Blanks belong to what follows them, as the harness has it; the rest is as in training.
        stripped = context.rstrip()
        pair = (stripped, context[len(stripped) :] + continuation)
        before, after = encode_pairs(self.tokenizer, [pair])[0]
        return before or [self.prefix_token_id], after

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        items = [
            self._fitted(ScoredSequence.continuation(context, continuation), texts)
            for texts, context, continuation in requests
        ]
        answers = [(score.values[0], score.is_greedy) for score in self._scores(items)]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        del disable_tqdm
        items, owners = [], []
        for number, request in enumerate(requests):
            ids = encode(self.tokenizer, [request.args[0]])[0]
            windows = get_rolling_token_windows(
                ids, self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for tokens, targets in windows:
                items.append(ScoredSequence(tuple(tokens), tuple(targets), ()))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, score in zip(owners, self._scores(items), strict=True):
            sums[number] += score.values[0]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        asked = [request.args for request in requests]
        groups = list(grouped(asked).items())
        prompts = {}
        for config, places in groups:
            for place in places:
                prompts[place] = self._prompt(asked[place][0], config.max_new_tokens)
            self._session.check([prompts[place] for place in places], config)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until", unit="text")
        texts = [""] * len(requests)
        with bar:
            for (config, places), is_chat in itertools.product(groups, (False, True)):
                own = [p for p in places if (asked[p][0] in self._conversations) == is_chat]
                if not own:
                    continue
                generator = self._session.text_generator(is_chat=is_chat, alone=True)
                given = [prompts[place] for place in own]
                for answers in generator.answers(given, config, self._batch_size):
                    for answer in answers:
                        place = own[answer.prompt]
                        texts[place] = answer.text
                        self.cache_hook.add_partial("generate_until", asked[place], answer.text)
                    bar.update(len(answers))
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        self._conversations.add(text)
        return text

    def _prompt(self, context: str, max_new_tokens: int) -> Prompt:
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        room = self.max_length - max_new_tokens
        where = f"a request of {len(tokens)} tokens ({context[:40]!r}...)"
        if len(tokens) > room:
            if not self._truncate or room <= len(self._lead):
                raise DataError(
                    f"{where} and {max_new_tokens} new ones are more than the base's context of "
                    f"{self.max_length}; take fewer shots or new tokens, or truncate=True to cut "
                    "its start off"
                )
            lead = len(self._lead)
            tokens = [*tokens[:lead], *tokens[len(tokens) - room + lead :]]
        return Prompt(tuple(tokens), self._adapter_name, where)

    def _scores(self, items: list[ScoredSequence]) -> list[SequenceScore]:
        found: dict[int, SequenceScore] = {}
        groups = [(item,) for item in items]
        for batch in self._scorer.scores(groups, self._adapter, [False] * len(items)):
            found |= {index: score for index, _, score in batch}
        return [found[index] for index in range(len(items))]

    def _fitted(self, item: ScoredSequence, texts: tuple[str, str]) -> ScoredSequence:
        if len(item.tokens) <= self.max_length:
            return item
        problem = f"a request of {len(item.tokens)} tokens ({texts[0][:40]!r}...)"
        if not self._truncate:
            raise DataError(
                f"{problem} is longer than the base's context of {self.max_length}; take fewer "
                "shots, or truncate=True to cut its start off"
            )
        try:
            return item.shortened(self.max_length, len(self._lead))
        except ValueError:
            raise DataError(f"{problem}: the text to score alone is too long") from None


# FIXME docstring of the merged evaluation.harness_requests:
# """What lm-evaluation-harness asks for when a task generates text, in this library's terms."""


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
