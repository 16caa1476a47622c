"""Result of an operation, and the steps that all operations share: open, measure and save."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.method import METHODS, AdapterMethod, require_language_model
from moe_jax.checkpoints.adapter_files import SavedAdapter, load_adapter, save_adapter
from moe_jax.checkpoints.leaves import leaf_specs, nested_dict, require_same_leaves
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import FieldError, located
from moe_jax.files.folders import require_unused
from moe_jax.hf.base_model import BaseIdentity, BaseModel
from moe_jax.loaded.adapter_base import expected_leaves, open_adapter_base
from moe_jax.loaded.adapter_measurement import AdapterMeasurement, LogitChange
from moe_jax.loaded.run_adapters import resolve_adapter

_MAX_ROW_LENGTH = 512

_ROUNDING = 1e-7
"""KL divergences below this are reported as rounding."""


class SurgeryOutcome(NamedTuple):
    """Result of an operation.

    Attributes:
      adapter: the new adapter.
      exact: True if the new adapter is equivalent to the original model by construction, up to
        rounding, on the inputs that `notes` state.
      notes: the operation, its exactness and the measurements, one sentence each.
      change: difference of the logits from those of the original model; None if not measured.
      weight_errors: relative error of the weight changes by projection, caused by a lower rank.
    """

    adapter: SavedAdapter
    exact: bool
    notes: list[str]
    change: LogitChange | None = None
    weight_errors: Mapping[str, float] = {}


class Text(NamedTuple):
    """A text on which adapters of a base are measured.

    Attributes:
      name: name of the file.
      base: the base.
      rows: token ids of the text from the base's tokenizer, int [B, S].
    """

    name: str
    base: BaseModel
    rows: np.ndarray

    def measurement(self, adapter: SavedAdapter) -> AdapterMeasurement:
        """Loads the base and an adapter for measurements on this text."""
        return AdapterMeasurement(adapter, self.base, self.rows)

    def describe(self, change: LogitChange, original: str) -> str:
        """Describes a measured change in one sentence."""
        is_rounding = abs(change.divergence) < _ROUNDING
        divergence = f"below {_ROUNDING:.0e}" if is_rounding else f"{change.divergence:.3g}"
        return (
            f"measured on {self.rows.size:,} tokens of {self.name}: KL divergence from {original} "
            f"{divergence} nats per token; logits differ by {change.largest:.3g} at most, "
            f"{change.mean_square**0.5:.3g} in root mean square"
        )


def open_adapter(adapter: SavedAdapter | str | Path, output: str | Path | None) -> SavedAdapter:
    """Opens the adapter to convert, and checks its leaves and `output`.

    Raises:
      CheckpointError: the adapter is missing or damaged, or `output` is not empty.
    """
    if output is not None:
        require_unused(Path(output))
    saved = adapter if isinstance(adapter, SavedAdapter) else load_adapter(resolve_adapter(adapter))
    name = saved.base.path if isinstance(adapter, SavedAdapter) else str(adapter)
    require_language_model(saved.method, name, "be changed by surgery, which measures text")
    expected = expected_leaves(saved.model, saved.method)
    require_same_leaves(leaf_specs(saved.tree), expected, "its weights")
    return saved


def read_text(
    adapter: SavedAdapter, data: str | Path | None, base: str | Path | None, needed: str = ""
) -> Text | None:
    """Opens an adapter's base and reads a text with its tokenizer.

    Args:
      adapter: an adapter of the base.
      data: a text file, or None.
      base: folder or hub id of the base; None is the path that the adapter was trained with.
      needed: the reason why `data` is required; empty if it is optional.

    Raises:
      CheckpointError: the base is missing or is not the adapter's.
      ConfigError: the text is required but missing.
      DataError: the file cannot be read.
    """
    if data is None:
        if needed:
            raise FieldError("data", f"{needed}; give a text file with `data`")
        return None
    model = open_adapter_base(adapter, str(adapter.base.path if base is None else base))
    return tokenized_text(Path(data), model, adapter.method)


def tokenized_text(file: Path, base: BaseModel, method: AdapterMethod | None = None) -> Text:
    """Reads a text with the tokenizer of a base and the new tokens of an adapter."""
    from moe_jax.data.new_tokens import load_extended_tokenizer  # imports data libraries
    from moe_jax.data.token_rows import load_token_rows

    length = min(_MAX_ROW_LENGTH, base.config.max_position_embeddings)
    tokenizer = load_extended_tokenizer(base.folder, base.config, [method])
    return Text(file.name, base, load_token_rows(file, tokenizer, length=length))


def new_adapter(
    method: AdapterMethod,
    leaves: Mapping[str, np.ndarray],
    model: ModelConfig,
    base: BaseIdentity,
    step: int,
) -> SavedAdapter:
    """An adapter from leaves that match its method.

    Raises:
      ConfigError: the method is invalid for the model.
    """
    with located(f"the new {METHODS.name_of(method)}"):
        method.check_model(model)
    tree = nested_dict({path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves.items()})
    require_same_leaves(leaf_specs(tree), expected_leaves(model, method), "the new adapter")
    return SavedAdapter(method, jax.block_until_ready(tree), model, base, step)


def changed_adapter(
    former: SavedAdapter, method: AdapterMethod, leaves: Mapping[str, np.ndarray]
) -> SavedAdapter:
    """An adapter that replaces another on the same base, with its step and training record.

    The record keeps the former method.
    """
    adapter = new_adapter(method, leaves, former.model, former.base, former.step)
    return adapter._replace(training=former.training, pictures=former.pictures)


def save_outcome(outcome: SurgeryOutcome, output: str | Path | None) -> SurgeryOutcome:
    """Writes the adapter to `output`, if given, completely or not at all, and returns the outcome.

    Raises:
      CheckpointError: the disk is too small, full or not writable.
      TrainingError: a weight is not finite.
    """
    if output is not None:
        save_adapter(Path(output), outcome.adapter)
    return outcome
