"""The same model in transformers and peft: what `moe-jax verify` compares with.

The only module of the package that imports torch, and only where it is called.
"""

import gc
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config.model import FloatType
from moe_jax.errors import CheckpointError


def missing_package(*names: str) -> str | None:
    """The first of these packages that is not installed; None if all are."""
    return next((name for name in names if importlib.util.find_spec(name) is None), None)


@contextmanager
def reference_model(
    folder: Path, dtype: FloatType, adapter: Path | None = None
) -> Iterator["TorchReference"]:
    """Loads a model of transformers, and an adapter of peft; frees both afterwards.

    Args:
      folder: checkpoint.
      dtype: dtype of weights and computation.
      adapter: folder of an adapter in peft's format.

    Raises:
      CheckpointError: transformers or peft cannot load it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    # The libraries raise many types.
    try:
        with _quiet():
            is_wrapper = hasattr(AutoConfig.from_pretrained(folder), "text_config")
            loader: Any = AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM
            model: Any = loader.from_pretrained(folder, dtype=getattr(torch, dtype))
            if adapter is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"cannot be loaded there ({reason})") from error
    try:
        yield TorchReference(model.eval())
    finally:
        del model
        gc.collect()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides progress bars, and warnings of the libraries about one another."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if had_bars:
            logging.enable_progress_bar()


class TorchReference:
    """A model of transformers."""

    def __init__(self, model: Any):
        self._model = model

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits float32 [B, S, V] of rows without padding, int [B, S]."""
        import torch

        with torch.no_grad():
            ids = torch.tensor(tokens, dtype=torch.long)
            return self._model(ids, use_cache=False).logits.float().numpy()

    def greedy(self, prompt: np.ndarray, count: int) -> list[int]:
        """The `count` most likely tokens after a prompt, int [S], computed without a cache."""
        row = prompt[None]
        for _ in range(count):
            token = self.logits(row)[:, -1:].argmax(-1)
            row = np.concatenate([row, token.astype(row.dtype)], axis=1)
        return row[0, len(prompt) :].tolist()
