"""Model class for lm-evaluation-harness, which runs its tasks on a base model or an adapter.

Needs the extra `lm-eval`. From Python:

    import lm_eval
    from moe_jax.evaluation.lm_harness import HarnessModel

    model = HarnessModel("models/llama", adapter="runs/mine/adapters/default")
    lm_eval.simple_evaluate(model=model, tasks=["arc_easy"])
"""

import dataclasses
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
from moe_jax.data.new_tokens import load_extended_tokenizer
from moe_jax.data.tokenizer import encode, end_of_text, leading_tokens
from moe_jax.errors import ConfigError, DataError
from moe_jax.evaluation.packed_sequences import ScoredSequence
from moe_jax.evaluation.scorer import Scorer, SequenceScore
from moe_jax.evaluation.scoring_protocols import encode_pairs
from moe_jax.hf.base_model import BaseModel, open_base
from moe_jax.inference.api import InferenceSession
from moe_jax.inference.prompts import Prompt
from moe_jax.inference.settings import GenerationConfig, SamplingConfig
from moe_jax.loaded.inference_model import build_model, load_adapters, load_params
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
    """A base model, or an adapter of it, for `lm_eval.simple_evaluate`.

    Attributes:
      tokenizer: tokenizer of the base.
      max_length: context length of the base.
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
        """Loads base and adapter.

        Args:
          base: folder in the Hugging Face format, hub id, or result of `moe_jax.load_base`.
          adapter: folder, or result of `moe_jax.load_adapter`; None is the base alone.
          revision: revision of a hub id.
          dtype: dtype of weights and computation.
          batch_size: number of rows in a batch, over all devices.
          truncate: cuts requests longer than the context at their start instead of rejecting them.
          mesh: device mesh; None is one device.
        """
        super().__init__()
        files = open_base(base, revision)
        model = build_model(files, dtype)
        devices = None if mesh is None else make_mesh(mesh)
        adapters = {} if adapter is None else {"adapter": adapter}
        loaded = load_adapters(adapters, files, model, devices)
        for named in loaded:
            require_language_model(named.saved.method, str(adapter), "score texts")
        methods = [named.saved.method for named in loaded]
        self.tokenizer: Any = load_extended_tokenizer(files.folder, files.config, methods)
        self.max_length = files.config.max_position_embeddings
        self._adapter = loaded[0].adapter if loaded else None
        self._adapter_name = loaded[0].name if loaded else None
        self._lead = leading_tokens(self.tokenizer)
        self._truncate = truncate
        self._batch_size = int(batch_size)
        self._conversations: set[str] = set()  # texts made by `apply_chat_template`
        params = load_params(files, model, devices)
        self._session = InferenceSession(
            dataclasses.replace(files, params=params),
            {named.name: named.adapter for named in loaded},
            dtype=dtype,
            mesh=devices,
        )
        self._scorer = Scorer(
            model,
            params,
            batch_size=self._batch_size,
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
        has_lead = ids[: len(self._lead)] == self._lead
        return ids if add_special_tokens is False or has_lead else [*self._lead, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # The harness moves trailing spaces to the continuation; otherwise as in training.
        stripped = context.rstrip()
        pair = (stripped, context[len(stripped) :] + continuation)
        context_ids, continuation_ids = encode_pairs(self.tokenizer, [pair])[0]
        return context_ids or [self.prefix_token_id], continuation_ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        # The requests of a question have the same context.
        groups = [
            [
                self._fit_to_context(ScoredSequence.continuation(context, continuation), texts)
                for texts, context, continuation in alike
            ]
            for _, alike in itertools.groupby(requests, key=lambda request: request[1])
        ]
        answers = [(score.log_prob, score.is_greedy) for score in self._scores(groups)]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        del disable_tqdm
        sequences, request_indices = [], []
        for index, request in enumerate(requests):
            ids = encode(self.tokenizer, [request.args[0]])[0]
            windows = get_rolling_token_windows(
                ids, self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for tokens, targets in windows:
                sequences.append(ScoredSequence(tuple(tokens), tuple(targets)))
                request_indices.append(index)
        sums = [0.0] * len(requests)
        scores = self._scores([[sequence] for sequence in sequences])
        for index, score in zip(request_indices, scores, strict=True):
            sums[index] += score.log_prob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        arguments = [request.args for request in requests]
        groups = list(group_by_config(arguments).items())
        prompts = {}
        for config, indices in groups:
            for index in indices:
                prompts[index] = self._prompt(arguments[index][0], config.max_new_tokens)
            self._session.check([prompts[index] for index in indices], config)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until", unit="text")
        texts = [""] * len(requests)
        with bar:
            for (config, indices), is_chat in itertools.product(groups, (False, True)):
                selected = [
                    i for i in indices if (arguments[i][0] in self._conversations) == is_chat
                ]
                if not selected:
                    continue
                generator = self._session.text_generator(
                    is_chat=is_chat, decode_without_prompt=True
                )
                batch_prompts = [prompts[index] for index in selected]
                for answers in generator.answers(batch_prompts, config, self._batch_size):
                    for answer in answers:
                        index = selected[answer.prompt]
                        texts[index] = answer.text
                        self.cache_hook.add_partial("generate_until", arguments[index], answer.text)
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
        max_tokens = self.max_length - max_new_tokens
        where = f"a request of {len(tokens)} tokens ({context[:40]!r}...)"
        if len(tokens) > max_tokens:
            lead = len(self._lead)
            if not self._truncate or max_tokens <= lead:
                raise DataError(
                    f"{where} and {max_new_tokens} new tokens exceed the base's context of "
                    f"{self.max_length}; use fewer shots or new tokens, or truncate=True to cut "
                    "its start off"
                )
            tokens = [*tokens[:lead], *tokens[len(tokens) - max_tokens + lead :]]
        return Prompt(tuple(tokens), self._adapter_name, where)

    def _scores(self, groups: Sequence[Sequence[ScoredSequence]]) -> list[SequenceScore]:
        scores: dict[tuple[int, int], SequenceScore] = {}
        for batch in self._scorer.scores(groups, self._adapter, [False] * len(groups)):
            scores |= {(group, index): score for group, index, score in batch}
        return [score for _, score in sorted(scores.items())]

    def _fit_to_context(self, sequence: ScoredSequence, texts: tuple[str, str]) -> ScoredSequence:
        if len(sequence.tokens) <= self.max_length:
            return sequence
        problem = f"a request of {len(sequence.tokens)} tokens ({texts[0][:40]!r}...)"
        if not self._truncate:
            raise DataError(
                f"{problem} is longer than the base's context of {self.max_length}; use fewer "
                "shots, or truncate=True to cut its start off"
            )
        try:
            return sequence.shortened(self.max_length, len(self._lead))
        except ValueError:
            raise DataError(f"{problem}: the text to score alone is too long") from None


# Generation settings of the harness's tasks.

MAX_NEW_TOKENS = 256
"""Default of the harness for models of transformers, if a task sets no length."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_KNOWN = ("until", "do_sample", "repetition_penalty", *_LENGTHS, *_SAMPLING)


def generation_config(kwargs: Mapping[str, Any]) -> GenerationConfig:
    """Converts the `generation_kwargs` of a task.

    Without `do_sample`, a positive temperature enables sampling. Without sampling, its settings are
    ignored, as the harness does.

    Raises:
      ConfigError: an argument is unknown or out of range.
    """
    for name in kwargs:
        if name not in _KNOWN:
            raise ConfigError(f"generation_kwargs.{name}: unknown; {suggest(name, _KNOWN)}")
    until = kwargs.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    lengths = [kwargs[name] for name in _LENGTHS if kwargs.get(name) is not None]
    do_sample = kwargs.get("do_sample")
    if do_sample is None:
        do_sample = float(kwargs.get("temperature") or 0) > 0
    sampling = {}
    if do_sample:
        sampling = {name: kwargs[name] for name in _SAMPLING if kwargs.get(name) is not None}
        sampling.setdefault("temperature", 1.0)
        if sampling.get("top_k") == 0:  # no limit, in transformers
            del sampling["top_k"]
    penalty = kwargs.get("repetition_penalty")
    with located("generation_kwargs"):
        return GenerationConfig(
            sampling=SamplingConfig(
                **sampling, repetition_penalty=1.0 if penalty is None else penalty
            ),
            max_new_tokens=lengths[0] if lengths else MAX_NEW_TOKENS,
            stop=tuple(stop for stop in stops if stop),
        )


def group_by_config(
    requests: Sequence[tuple[str, dict[str, Any]]],
) -> dict[GenerationConfig, list[int]]:
    """Indices of the requests with each generation config.

    Raises:
      ConfigError: an argument is unknown or out of range.
    """
    groups: dict[GenerationConfig, list[int]] = {}
    for index, (_, kwargs) in enumerate(requests):
        groups.setdefault(generation_config(kwargs), []).append(index)
    return groups
