"""Tiny bases for the tests of formats."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from foreign_adapters import MIXLORA
from hf_models import save_tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from whole_models import adapter_of, saved_base

import moe_jax
from moe_jax.checkpoints.adapter_files import SavedAdapter


class Tiny(NamedTuple):
    """A base in transformers and moe_jax, and its logits.

    Attributes:
      folder: folder of the checkpoint.
      reference: the base in transformers.
      base: the base in moe_jax.
      tokens: token ids, [2, 12].
      logits: logits of the base without an adapter, from transformers.
    """

    folder: Path
    reference: LlamaForCausalLM
    base: moe_jax.Base
    tokens: np.ndarray
    logits: np.ndarray

    def with_adapter(self, adapter: SavedAdapter) -> np.ndarray:
        """Logits of moe_jax with an adapter on the base."""
        adapter = adapter._replace(base=self.base.identity)
        return np.asarray(moe_jax.AdaptedModel(self.base, {"x": adapter})(self.tokens, "x"))


class Mixture(NamedTuple):
    """A base with a tokenizer, an adapter with experts to merge, and a text.

    Attributes:
      base: the base.
      adapter: a MixLoRA of the base.
      text: a text file.
      rows: tokens of the text in rows for measuring, [2, 64].
    """

    base: moe_jax.Base
    adapter: SavedAdapter
    text: Path
    rows: np.ndarray


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny") / "base"
    reference = save_tiny_llama(folder)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 12))
    with torch.no_grad():
        logits = reference(torch.tensor(tokens)).logits.numpy()
    return Tiny(folder, reference, moe_jax.load_base(folder), tokens, logits)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory) -> Mixture:
    folder = tmp_path_factory.mktemp("mixture")
    base = saved_base(folder / "base", "llama")
    words = WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "base")
    tokens = np.random.default_rng(1).integers(0, 64, 150)
    # Two texts. A row of this base has 64 tokens; the last 22 do not fill a row.
    texts = [" ".join(f"w{n}" for n in part) for part in (tokens[:100], tokens[100:])]
    (folder / "text.txt").write_text("\n\n".join(texts))
    rows = tokens[:128].reshape(2, 64)
    return Mixture(base, adapter_of(base, MIXLORA), folder / "text.txt", rows)
