"""One tiny base for all tests of formats."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hf_models import save_tiny_llama
from transformers import LlamaForCausalLM

import moe_jax
from moe_jax.checkpoints.adapter_files import SavedAdapter


class Tiny(NamedTuple):
    """A base in both libraries, and what it computes.

    Attributes:
      folder: its checkpoint.
      reference: in transformers.
      base: in ours.
      tokens: [2, 12].
      logits: of the base alone, as transformers computes them.
    """

    folder: Path
    reference: LlamaForCausalLM
    base: moe_jax.Base
    tokens: np.ndarray
    logits: np.ndarray

    def with_adapter(self, adapter: SavedAdapter) -> np.ndarray:
        """What we compute with an adapter on it."""
        adapter = adapter._replace(base=self.base.identity)
        return np.asarray(moe_jax.AdaptedModel(self.base, {"x": adapter})(self.tokens, "x"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny") / "base"
    reference = save_tiny_llama(folder)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 12))
    with torch.no_grad():
        logits = reference(torch.tensor(tokens)).logits.numpy()
    return Tiny(folder, reference, moe_jax.load_base(folder), tokens, logits)
