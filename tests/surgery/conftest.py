"""A tiny base with a tokenizer, a text, and a reference model in NumPy."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from surgery.plain_llama import PlainLlama, divergence
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from whole_models import adapter_of, saved_base

import moe_jax
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.loaded.adapter_measurement import LogitChange
from moe_jax.surgery import outcome


class World(NamedTuple):
    """Inputs of the operations, and the reference model.

    Attributes:
      folder: folder of the base's checkpoint.
      base: the base.
      plain: the base in NumPy.
      text: a text file.
      rows: tokens of the text in rows for measuring, [2, 24].
    """

    folder: Path
    base: moe_jax.Base
    plain: PlainLlama
    text: Path
    rows: np.ndarray

    def adapter(self, method: dict[str, Any], spread: float = 0.1) -> SavedAdapter:
        """An adapter none of whose weights is zero."""
        return adapter_of(self.base, method, spread)

    def logits(self, adapter: SavedAdapter | None) -> np.ndarray:
        """Logits of the NumPy model on the rows."""
        return self.plain.logits(adapter, self.rows)[0]

    def loads(self, adapter: SavedAdapter) -> dict[str, np.ndarray]:
        """Load of each expert in the NumPy model on the rows, [L, E] by site."""
        return self.plain.logits(adapter, self.rows)[1]

    def require_measured(self, outcome: Any, former: SavedAdapter) -> None:
        """Requires the measured change to equal that of the NumPy model."""
        expected = divergence(self.logits(former), self.logits(outcome.adapter))
        assert expected[0] > 1e-3
        np.testing.assert_allclose(outcome.change, expected, rtol=1e-3)
        assert f"{outcome.change.divergence:.3g} nats per token" in outcome.notes[-1]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("surgery")
    base = saved_base(folder / "base", "llama", max_position_embeddings=24)
    words = WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "base")
    tokens = np.random.default_rng(1).integers(0, 64, 48)
    (folder / "text.txt").write_text(" ".join(f"w{n}" for n in tokens))
    plain = PlainLlama(folder / "base")
    return World(folder / "base", base, plain, folder / "text.txt", tokens.reshape(2, 24))


class _Unmeasured:
    """Replaces `AdapterMeasurement` in tests of weights alone, without compilation."""

    def __init__(self, adapter: SavedAdapter, base: Any, rows: np.ndarray):
        leaves = named_leaves(adapter.tree)
        kernel = "/router/kernel"
        self._shapes = {
            path.removeprefix("layers/").removesuffix(kernel): leaf.shape
            for path, leaf in leaves.items()
            if path.endswith(kernel)
        }

    def loads(self) -> dict[str, np.ndarray]:
        return {site: np.ones((shape[0], shape[2])) for site, shape in self._shapes.items()}

    def logit_change_to(self, adapter: SavedAdapter) -> LogitChange:
        return LogitChange(1.0, 1.0, 1.0)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces all measurements by ones."""
    monkeypatch.setattr(outcome, "AdapterMeasurement", _Unmeasured)
