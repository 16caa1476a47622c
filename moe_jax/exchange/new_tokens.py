"""New tokens of adapters in the files of other tools: tables of V' = max(V, F + N) rows."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.new_tokens import token_range, total_vocab_size
from moe_jax.adapters.tree import NEW_TOKENS
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ModelConfig
from moe_jax.data.new_tokens import load_extended_tokenizer
from moe_jax.hf.families.family import EMBEDDING_PATH, HEAD_PATH

TABLES = {f"{NEW_TOKENS}/embedding": EMBEDDING_PATH, f"{NEW_TOKENS}/head": HEAD_PATH}
"""Leaf of the base that each leaf of an adapter extends."""


def extended_model(model: ModelConfig, method: AdapterMethod) -> ModelConfig:
    """Architecture of a base whose tables have the rows of an adapter's new tokens."""
    size = total_vocab_size(model.vocab_size, [method])
    return dataclasses.replace(model, vocab_size=size)


def extended_table(
    path: str, table: np.ndarray, method: AdapterMethod, leaves: Mapping[str, np.ndarray]
) -> np.ndarray:
    """A leaf of the base with the rows of an adapter's new tokens, if they extend it.

    Args:
      path: path of the leaf.
      table: the leaf.
      method: method of the adapter.
      leaves: leaves of the adapter by path.
    """
    rows = next((leaves.get(own) for own, extended in TABLES.items() if extended == path), None)
    if rows is None:
        return table
    axis = 0 if path == EMBEDDING_PATH else 1
    new = token_range(method, table.shape[axis])
    assert new is not None
    before, _, after = np.split(table, [new.first, min(new.stop, table.shape[axis])], axis)
    return np.concatenate([before, rows if axis == 0 else rows.T, after], axis)


def extended_tokenizer(adapter: SavedAdapter, folder: Path) -> PreTrainedTokenizerBase | None:
    """Tokenizer of the base in `folder` with the new tokens of an adapter; None without any.

    Raises:
      CheckpointError: the tokenizer is missing, or gives the tokens other ids than in training.
    """
    if not adapter.method.new_tokens:
        return None
    return load_extended_tokenizer(folder, adapter.model, [adapter.method])
