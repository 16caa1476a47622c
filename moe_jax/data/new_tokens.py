"""Tokenizers with the new tokens of adapters; `adapters/new_tokens.py` has their rows."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from transformers import AddedToken, PreTrainedTokenizerBase

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.new_tokens import token_range
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import FieldError
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import CheckpointError
from moe_jax.hf.base_model import BaseModel


def load_extended_tokenizer(
    folder: Path,
    model: ModelConfig,
    methods: Iterable[AdapterMethod | None],
    *,
    visible: bool = False,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a base and adds the new tokens of its adapters.

    Args:
      folder: folder of the base.
      model: architecture of the base.
      methods: methods of the adapters that share the tokenizer; those without new tokens, and None
        for the base alone, may be among them.
      visible: the new tokens are no special tokens, so that decoding without these keeps them.

    Raises:
      CheckpointError: the tokenizer cannot be read, or gives the tokens other ids than in training.
      ConfigError: the adapters have different new tokens, or the tokenizer has one already.
    """
    tokenizer = load_tokenizer(folder)
    extended = [method for method in methods if method is not None and method.new_tokens]
    if not extended:
        return tokenizer
    lists = {method.new_tokens for method in extended}
    if len(lists) > 1:
        shown = " and ".join(", ".join(tokens) for tokens in sorted(lists)[:2])
        raise FieldError(
            "new_tokens",
            f"the adapters have different ones ({shown}), and one tokenizer serves all "
            "of them; use these adapters separately",
        )
    first = add_new_tokens(tokenizer, extended[0].new_tokens, visible=visible)
    for method in extended:
        new = token_range(method, model.vocab_size)
        if new is not None and new.first != first:
            raise CheckpointError(
                f"{folder}: its tokenizer gives {method.new_tokens[0]!r} the id {first}, but "
                f"the adapter was trained with {new.first}; restore the base's tokenizer"
            )
    return tokenizer


def add_new_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...], *, visible: bool = False
) -> int:
    """Adds new tokens to a tokenizer, as its `add_special_tokens` does; returns the first id.

    Args:
      tokenizer: tokenizer of a base; changed.
      tokens: at least one.
      visible: see `load_extended_tokenizer`.

    Raises:
      ConfigError: the tokenizer has one of them already.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token in vocabulary:
            raise FieldError(
                "new_tokens",
                f"{token!r} is a token of the base's tokenizer already, with the id "
                f"{vocabulary[token]}, and needs no new row; leave it out",
            )
    added = [AddedToken(token, special=not visible, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=not visible)
    ids = [int(tokenizer.get_vocab()[token]) for token in tokens]
    if ids != list(range(ids[0], ids[0] + len(tokens))):
        raise FieldError("new_tokens", f"the base's tokenizer gives them the ids {ids}, with gaps")
    return ids[0]


def with_token_id(method: AdapterMethod, base: BaseModel) -> AdapterMethod:
    """The method with the id that the base's tokenizer gives its first new token.

    Raises:
      CheckpointError: the tokenizer cannot be read.
      ConfigError: the tokenizer has one of the tokens, gives another id than `new_token_id`, or has
        ids that the base has no embedding for.
    """
    if not method.new_tokens:
        return method
    first = add_new_tokens(load_tokenizer(base.folder), method.new_tokens)
    if first > base.config.vocab_size:
        raise FieldError(
            "new_tokens",
            f"the next id of the base's tokenizer is {first}, but the base has "
            f"embeddings for {base.config.vocab_size} tokens only; give a base whose embeddings "
            "cover its tokenizer",
        )
    if method.new_token_id not in (None, first):
        raise FieldError(
            "new_token_id",
            f"{method.new_token_id}, but the base's tokenizer gives the id {first}; leave it out",
        )
    return dataclasses.replace(method, new_token_id=first)
