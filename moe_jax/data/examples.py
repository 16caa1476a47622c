"""From a checked row to pieces of text, each marked as given or as to be learnt."""

import json
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_jax.config.data import Schema
from moe_jax.data.chat import conversation_pieces
from moe_jax.data.prompt_template import PromptTemplate


class Piece(NamedTuple):
    """A stretch of text; `is_target` where the model is to learn to write it."""

    text: str
    is_target: bool


class Example(NamedTuple):
    """A row as text.

    Attributes:
      pieces: the stretches of text, in order.
      leads: whether the tokenizer's leading tokens (BOS) go before it.
      ends: whether an end-of-text token, a target, goes after it.
    """

    pieces: tuple[Piece, ...]
    leads: bool
    ends: bool


def make_examples(
    row: dict[str, str],
    schema: Schema,
    template: PromptTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Example]:
    """The examples of one checked row: one, or for some chat templates one per assistant turn.

    Args:
      row: the fields of the schema, and `where`.
      schema: which fields the row has.
      template: the prompt template, for the schema `instruction`.
      tokenizer: its chat template renders the schema `chat`.

    Raises:
      DataError: the row does not go with the prompt template or the chat template.
    """
    if schema == "text":
        return [Example((Piece(row["text"], True),), leads=True, ends=True)]
    if schema == "chat":
        conversations = conversation_pieces(json.loads(row["messages"]), tokenizer, row["where"])
        return [
            Example(tuple(Piece(*piece) for piece in pieces), leads=False, ends=ends)
            for pieces, ends in conversations
        ]
    if schema in ("completion", "task"):
        prompt, completion = row["prompt"], row["completion"]
    else:
        assert template is not None
        prompt = template.fill(row["instruction"], row["input"], row["where"])
        completion = row["output"]
    return [Example((Piece(prompt, False), Piece(completion, True)), leads=True, ends=True)]
