"""Checked rows as examples, and texts and examples as token ids.

Generation sees the prompt alone, so the ids of an example must begin with the ids of its prompt.
Prompt and completion encoded jointly nearly always satisfy this, and read as the model would write
them. Where the two fuse into one token across the boundary, the completion is encoded separately,
in a way that adds no space in front of it (SentencePiece tokenizers put one before every text).

Turns of a conversation are encoded one by one, each once as a prompt and once with its answer,
until `max_length` is passed, so that long conversations take time in proportion to their length.
"""

import functools
import json
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_jax.config.data import TEMPLATE_DATE, Schema
from moe_jax.data.chat import conversation_spans, lost_fields
from moe_jax.data.chat_template import (
    ChatTemplate,
    Message,
    end_of_turn_texts,
    require_chat_template,
)
from moe_jax.data.messages import UNTRAINED
from moe_jax.data.prompt_template import PromptTemplate
from moe_jax.data.tokenizer import encode, end_of_text, leading_tokens
from moe_jax.errors import DataError

PAIR_SEPARATOR = "\n"
"""Text between the two texts of a pair to classify."""


BLANK_ANSWER = "a blank answer"
"""Remark on a conversation with an empty answer."""


class TextSpan(NamedTuple):
    """A stretch of text; `is_target` if the model is trained to write it.

    `is_target` is None for an answer that must not be learned, not even where prompts are.
    """

    text: str
    is_target: bool | None


class Example(NamedTuple):
    """A row as text.

    Attributes:
      spans: stretches of text, in order; none if the row has nothing to learn.
      add_bos: true if the tokenizer's leading tokens (BOS) precede the text.
      add_eos: true if an end-of-text token, a target, follows the text.
      remarks: what the report counts of the row, each as "a blank answer".
    """

    spans: tuple[TextSpan, ...]
    add_bos: bool
    add_eos: bool
    remarks: tuple[str, ...] = ()


def make_examples(
    row: dict[str, str],
    schema: Schema,
    template: PromptTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
    date: str = TEMPLATE_DATE,
) -> list[Example]:
    """Examples of one checked row: one, or for some chat templates one per assistant turn.

    A row of the schema `preference` gives two: the chosen answer, and the rejected one.

    Args:
      row: fields of the schema, and `where`.
      schema: schema of the row.
      template: prompt template, for the schema `instruction`.
      tokenizer: tokenizer whose chat template renders the schema `chat`.
      date: date of today for chat templates that print it.

    Raises:
      DataError: the row does not fit the prompt template or the chat template.
    """
    if schema == "text":
        return [Example((TextSpan(row["text"], True),), add_bos=True, add_eos=True)]
    if schema == "chat":
        return _chat_examples(row, tokenizer, date)
    if schema == "preference":
        return _preference_examples(row, ("chosen", "rejected"), tokenizer, date)
    if schema == "feedback":
        return _preference_examples(row, ("completion",), tokenizer, date)
    if schema in ("completion", "task"):
        prompt, completion = row["prompt"], row["completion"]
    else:
        assert template is not None
        prompt = template.fill(row["instruction"], row["input"], row["where"])
        completion = row["output"]
    return [
        Example((TextSpan(prompt, False), TextSpan(completion, True)), add_bos=True, add_eos=True)
    ]


def _chat_examples(
    row: dict[str, str], tokenizer: PreTrainedTokenizerBase, date: str
) -> list[Example]:
    """Examples of a conversation; the first one has the remarks on it."""
    arguments = {name: json.loads(row[name]) for name in ("tools", "documents") if row[name]}
    arguments |= json.loads(row["chat_template_kwargs"] or "{}")
    template = ChatTemplate(tokenizer, row["where"], date, row["system"], arguments)
    messages = json.loads(row["messages"])
    lost = lost_fields(messages, template)
    remarks = [f"{name} that the chat template leaves out" for name in lost]
    if any(_is_blank_answer(message) for message in messages):
        remarks.append(BLANK_ANSWER)
    examples = [
        Example(tuple(TextSpan(*span) for span in spans), add_bos=False, add_eos=add_eos)
        for spans, add_eos in conversation_spans(messages, template)
    ]
    if not examples:
        remarks.append("answers of weight 0 only, left out")
        examples = [Example((), add_bos=False, add_eos=False)]
    examples[0] = examples[0]._replace(remarks=tuple(remarks))
    return examples


def _preference_examples(
    row: dict[str, str],
    fields: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    date: str,
) -> list[Example]:
    """An example for each answer of a row; all without text if the row is left out."""
    prompt, answers = json.loads(row["prompt"]), [json.loads(row[field]) for field in fields]
    what = _reason_to_leave_out(answers)
    if what:
        empty = Example((), add_bos=False, add_eos=False)
        return [empty._replace(remarks=(what,)), *[empty] * (len(answers) - 1)]
    if isinstance(prompt, str):
        examples = [
            Example((TextSpan(prompt, False), TextSpan(answer, True)), add_bos=True, add_eos=True)
            for answer in answers
        ]
    else:
        require_chat_template(tokenizer, row["where"])
        examples = [
            _preference_chat_example(row, prompt, field, answer, tokenizer, date)
            for field, answer in zip(fields, answers, strict=True)
        ]
    remarks = tuple(dict.fromkeys(remark for example in examples for remark in example.remarks))
    first, *others = (example._replace(remarks=()) for example in examples)
    return [first._replace(remarks=remarks), *others]


def _reason_to_leave_out(answers: Sequence[str | list[Message]]) -> str:
    """Remark on a row that is left out; empty for others."""
    for answer in answers:
        is_text = isinstance(answer, str)
        if not answer.strip() if is_text else any(map(_is_blank_answer, answer)):
            return "an empty answer, left out"
    return "two equal answers, left out" if answers[1:] == answers[:1] else ""


def _preference_chat_example(
    row: dict[str, str],
    prompt: list[Message],
    field: str,
    answer: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    date: str,
) -> Example:
    """The conversation with one answer, whose assistant turns alone are targets."""
    asked = [{**m, UNTRAINED: 0} if m["role"] == "assistant" else m for m in prompt]
    examples = _chat_examples({**row, "messages": json.dumps([*asked, *answer])}, tokenizer, date)
    if len(examples) > 1:
        raise DataError(
            f"{row['where']}: the chat template renders the turns of {field} differently once "
            "others follow, so that they are no single answer; give one turn of the assistant"
        )
    (example,) = examples
    return example._replace(remarks=tuple(r for r in example.remarks if r != BLANK_ANSWER))


def _is_blank_answer(message: Message) -> bool:
    is_learned = message["role"] == "assistant" and UNTRAINED not in message
    return is_learned and not message.get("content", "").strip() and "tool_calls" not in message


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    train_on_prompt: bool,
    max_length: int | None = None,
) -> list[tuple[list[int], list[bool]]]:
    """Token ids and loss mask of each example.

    The mask is true at tokens of a target span and at the end-of-text token; with
    `train_on_prompt` at every token, including the first one, which no token precedes, except those
    of answers that must not be learned.

    Args:
      examples: rows as text.
      tokenizer: tokenizer of the base model.
      train_on_prompt: tokens of prompts are targets.
      max_length: length beyond which tokens are not needed; a longer example may end anywhere
        beyond it. None encodes examples in full.
    """
    leading, end = leading_tokens(tokenizer), end_of_text(tokenizer)
    ends = end_of_turn_texts(tokenizer)
    encodings = [_PartialEncoding(example, tokenizer, leading, ends) for example in examples]
    while pending := [encoding for encoding in encodings if encoding.needs_more(max_length)]:
        texts = [encoding.next_texts() for encoding in pending]
        ids = iter(encode(tokenizer, [text for group in texts for text in group]))
        for encoding, group in zip(pending, texts, strict=True):
            encoding.add(group, [next(ids) for _ in group])
    encoded = []
    for example, encoding in zip(examples, encodings, strict=True):
        tokens, targets = encoding.tokens, encoding.targets
        if example.add_eos:
            tokens, targets = [*tokens, end], [*targets, True]
        mask = [train_on_prompt if target is False else bool(target) for target in targets]
        encoded.append((tokens, mask))
    return encoded


class _PartialEncoding:
    """Token ids of an example, encoded part by part.

    The text up to the end of each span is encoded jointly with what stands before it. Where turns
    end with a token that the tokenizer looks for before all else, that token stands for all text
    before it: the text behind is encoded alike with no more than that in front. So parts begin
    there. Where no such token is found in the text or in the ids, each span is a part, with all
    text in front of it.

    Attributes:
      tokens: ids so far.
      targets: `TextSpan.is_target` of each id.
    """

    def __init__(
        self,
        example: Example,
        tokenizer: PreTrainedTokenizerBase,
        leading: list[int],
        ends: tuple[str, ...],
    ):
        self._spans = [span for span in example.spans if span.text]
        self._tokenizer = tokenizer
        self._leading = leading if example.add_bos else []
        last = next((span.text for span in reversed(self._spans) if span.is_target), "")
        self._begin(max(filter(last.endswith, ends), key=len) if last.endswith(ends) else "")

    def _begin(self, end: str) -> None:
        """Begins with parts behind each `end`, or if it is empty, with a part for each span."""
        self._end = end
        token = self._tokenizer.convert_tokens_to_ids(end)
        self._end_ids = [token] if end and isinstance(token, int) else []
        self._parts = _parts(self._spans, end) if end else [[span] for span in self._spans]
        self._done = 0
        self._text, self._ids = "", list[int]()  # in front of the next part
        self.tokens = list(self._leading)
        self.targets: list[bool | None] = [False] * len(self.tokens)

    def needs_more(self, max_length: int | None) -> bool:
        """True if text is left, and there are not more than `max_length` tokens."""
        is_long = max_length is not None and len(self.tokens) > max_length
        return self._done < len(self._parts) and not is_long

    def next_texts(self) -> list[str]:
        """Text of the next part up to the end of each of its spans, and what is in front of it."""
        texts = (span.text for span in self._parts[self._done])
        return list(accumulate(texts, initial=self._text))[1:]

    def add(self, texts: list[str], encoded: list[list[int]]) -> None:
        """Adds the ids of `next_texts()`."""
        ids_before = self._ids
        if self._end:
            begins_alike = all(ids[: len(ids_before)] == ids_before for ids in encoded)
            is_last = self._done + 1 == len(self._parts)
            if not begins_alike or not (is_last or encoded[-1][-1:] == self._end_ids):
                self._begin("")
                return
        for span, ids in zip(self._parts[self._done], encoded, strict=True):
            if ids[: len(ids_before)] == ids_before:
                new = ids[len(ids_before) :]
            else:
                new = _encode_continuation(ids_before, span.text, ids, self._tokenizer)
            self.tokens += new
            self.targets += [span.is_target] * len(new)
            ids_before = ids
        self._done += 1
        self._text = self._end or texts[-1]
        self._ids = self._end_ids or ids_before


def _parts(spans: Sequence[TextSpan], end: str) -> list[list[TextSpan]]:
    """Spans, divided behind each occurrence of `end`."""
    parts: list[list[TextSpan]] = [[]]
    for span in spans:
        *closed, rest = span.text.split(end)
        for text in closed:
            parts[-1].append(span._replace(text=text + end))
            parts.append([])
        if rest:
            parts[-1].append(span._replace(text=rest))
    return [part for part in parts if part]


def _encode_continuation(
    ids_before: list[int], text: str, ids_joint: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Ids of `text` alone that decode to it after `ids_before`.

    Returns the first of three encodings that decodes to the right text: of the text alone
    (byte-level tokenizers), after a line break, and after an end-of-text token (tokenizers that
    mark the start of a text). Where Unicode normalization across the boundary leaves none of them
    exact, the encoding of the text alone is the nearest.
    """
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    expected = decode(ids_joint)
    alone, newline, after_newline, after_end = encode(
        tokenizer, [text, "\n", "\n" + text, str(tokenizer.eos_token) + text]
    )
    candidates = [alone]
    if after_newline[: len(newline)] == newline:
        candidates.append(after_newline[len(newline) :])
    if after_end[:1] == [end_of_text(tokenizer)]:
        candidates.append(after_end[1:])
    for candidate in candidates:
        if decode(ids_before + candidate) == expected:
            return candidate
    return alone


def encode_texts(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of texts, or pairs of texts, to classify.

    The tokenizer's leading tokens, then the text; the two texts of a pair are joined by a line
    break. Nothing follows: a row is classified at its last token, as in transformers' sequence
    classifiers.

    Args:
      texts: pairs of texts; the second is empty for a single text.
      tokenizer: tokenizer of the base model.
    """
    leading = leading_tokens(tokenizer)
    joined = [PAIR_SEPARATOR.join((first, second)) if second else first for first, second in texts]
    return [[*leading, *ids] for ids in encode(tokenizer, joined)]
