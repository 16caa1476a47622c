"""What comes out of an operation: an adapter, and what it has to do with the former one."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.method import METHODS, AdapterMethod, require_language_model
from moe_jax.checkpoints.adapter_files import SavedAdapter, load_adapter, save_adapter
from moe_jax.checkpoints.leaves import leaf_specs, nested, require_same_leaves
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import FieldError, located
from moe_jax.files.folders import require_unused
from moe_jax.hf.base_model import BaseIdentity, BaseModel, resolve_adapter
from moe_jax.loaded.adapter_base import expected_leaves, open_adapter_base
from moe_jax.loaded.adapter_measurement import AdapterMeasurement, LogitChange

_LENGTH = 512
_ROUNDING = 1e-7


class SurgeryOutcome(NamedTuple):
    """A new adapter.

    Attributes:
      adapter: it, also in the folder that was asked for.
      exact: whether it computes what the former one does, to rounding, by construction: on every
        input, or as far as `notes` say.
      notes: what was done, what is exact, and what was measured, one sentence each.
      change: how far its logits are from those of the model that it came from; None if that was not
        measured.
      weight_errors: by projection, the relative error of the weights' changes, where a rank cut
        something off; 0 is none.
    """

    adapter: SavedAdapter
    exact: bool
    notes: list[str]
    change: LogitChange | None = None
    weight_errors: Mapping[str, float] = {}


class Text(NamedTuple):
    """What is measured on.

    Attributes:
      name: of the file.
      base: the base, whose tokenizer made the rows.
      rows: int [N, S].
    """

    name: str
    base: BaseModel
    rows: np.ndarray

    def measuring(self, adapter: SavedAdapter) -> AdapterMeasurement:
        """An adapter on its base, in memory."""
        return AdapterMeasurement(adapter, self.base, self.rows)

    def describe(self, change: LogitChange, original: str) -> str:
        """A change in words."""
        is_rounding = abs(change.divergence) < _ROUNDING  # of either sign
        divergence = f"below {_ROUNDING:.0e}" if is_rounding else f"{change.divergence:.3g}"
        return (
            f"measured on {self.rows.size:,} tokens of {self.name}: KL divergence from {original} "
            f"{divergence} nats per token; logits differ by {change.largest:.3g} at most, "
            f"{change.mean_square**0.5:.3g} in root mean square"
        )


def opened(adapter: SavedAdapter | str | Path, output: str | Path | None) -> SavedAdapter:
    """The adapter to be changed, its leaves those of its method; `output` can be written to.

    Raises:
      CheckpointError: it is missing or damaged, or `output` is not empty.
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
    """The rows of a file as the adapter's base reads them.

    Args:
      adapter: whose base it is.
      data: a file of text; None stands for none.
      base: the base's folder or hub id; None is the path that it was trained with.
      needed: what it is needed for, if it is.

    Raises:
      CheckpointError: the base is missing or another one.
      ConfigError: it is needed and not given, or the adapter is a classifier, which gives no
        logits of text.
      DataError: the file cannot be read.
    """
    if data is None:
        if needed:
            raise FieldError("data", f"{needed}; give a file of text with `data`")
        return None
    require_language_model(adapter.method, "given", "be measured on text")
    found = open_adapter_base(adapter, str(adapter.base.path if base is None else base))
    return text_rows(Path(data), found)


def text_rows(file: Path, base: BaseModel) -> Text:
    """The same for a base that is known to be the right one."""
    from moe_jax.data.encoding import load_token_rows  # with libraries that nothing else needs
    from moe_jax.data.tokenizer import load_tokenizer

    length = min(_LENGTH, base.config.max_position_embeddings)
    return Text(file.name, base, load_token_rows(file, load_tokenizer(base.folder), length=length))


def new_adapter(
    method: AdapterMethod,
    leaves: Mapping[str, np.ndarray],
    model: ModelConfig,
    base: BaseIdentity,
    step: int,
) -> SavedAdapter:
    """An adapter of these leaves, which must be those of its method.

    Raises:
      ConfigError: the method does not go with the model.
    """
    with located(f"the new {METHODS.name_of(method)}"):
        method.check_model(model)
    tree = nested({path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves.items()})
    require_same_leaves(leaf_specs(tree), expected_leaves(model, method), "the new adapter")
    return SavedAdapter(method, jax.block_until_ready(tree), model, base, step)


def changed_adapter(
    former: SavedAdapter, method: AdapterMethod, leaves: Mapping[str, np.ndarray]
) -> SavedAdapter:
    """The same for one that takes another's place, on the same base and after as many steps.

    How that one was trained stays on record, with the method that it had.
    """
    adapter = new_adapter(method, leaves, former.model, former.base, former.step)
    return adapter._replace(training=former.training, pictures=former.pictures)


def finished(outcome: SurgeryOutcome, output: str | Path | None) -> SurgeryOutcome:
    """Writes the adapter, if it is to be written, complete or not at all.

    Raises:
      CheckpointError: the disk is too small, full or not writable.
      TrainingError: a weight is not finite.
    """
    if output is not None:
        save_adapter(Path(output), outcome.adapter)
    return outcome
