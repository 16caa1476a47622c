"""Adapters out to other tools, and in from them."""

import contextlib
from pathlib import Path
from typing import Any, get_args

import numpy as np

from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import FloatType
from moe_jax.config.parse import FieldError, suggest
from moe_jax.errors import CheckpointError
from moe_jax.exchange import FORMATS
from moe_jax.exchange.adapter_folder import CONFIG, read_adapter_folder
from moe_jax.exchange.format import (
    AdapterFormat,
    ExportOptions,
    Format,
    NotExpressible,
    Weighting,
    cannot,
)
from moe_jax.exchange.model_card import CARD, model_card, pictures_of
from moe_jax.exchange.whole_model import ModelFormat
from moe_jax.files.folders import new_folder
from moe_jax.hf.base_model import BaseModel, open_base
from moe_jax.hf.config import read_model_config

_OWN = "moe_jax"
"""The format that takes every adapter."""

_FOR_THE_CARD = 2**16
"""More bytes than a model card has."""


def export_adapter(
    adapter: SavedAdapter,
    to: str,
    output: Path,
    *,
    dtype: FloatType = "float32",
    base: str | None = None,
    weights: Weighting | None = None,
    tokens: np.ndarray | None = None,
    data_name: str = "",
    known_as: str | None = None,
) -> list[str]:
    """Writes an adapter in the format of another tool, with a model card.

    Args:
      adapter: from `load_adapter`.
      to: the format, a key of `FORMATS`.
      output: a folder that does not exist yet, or is empty; it appears complete or not at all.
      dtype: the type of the tensors that are written.
      base: the base's folder or hub id as the receiving tool will know it; by default the path that
        it had in training. A format that writes a whole model reads the base there.
      weights: how a format that merges experts weights them; "average" by default.
      tokens: int [N, S], rows that such a format measures on what merging changes.
      data_name: what they are called in messages.
      known_as: where the receiving tool will find it, by default in `output`; for the model card.

    Returns:
      What the format leaves out or states in another way, and what was measured, one sentence each.

    Raises:
      CheckpointError: the format is unknown or cannot express the adapter; `base` is a folder with
        another model; `output` is not empty; the disk is too small, full or not writable.
      ConfigError: an option is of no use to the format.
    """
    if to not in FORMATS:
        raise CheckpointError(f"unknown format {to!r}; {suggest(to, FORMATS)}")
    if dtype not in get_args(FloatType):
        raise CheckpointError(f"unknown dtype {dtype!r}; {suggest(dtype, get_args(FloatType))}")
    chosen: Format = FORMATS[to]()
    if weights is not None and weights not in get_args(Weighting):
        raise CheckpointError(
            f"unknown weights {weights!r}; {suggest(weights, get_args(Weighting))}"
        )
    for name, value in (("weights", weights), ("data", tokens)):
        if value is not None and not chosen.measures:
            raise FieldError(
                name, f"the {to} format merges no experts and measures nothing; leave it out"
            )
    known_base = adapter.base.path if base is None else base
    place = str(output) if known_as is None else known_as
    options = ExportOptions(known_base, dtype, weights, tokens, data_name, place)
    try:
        _check(adapter, to, options)
    except NotExpressible as error:
        raise CheckpointError(f"{error}; {_others(adapter, to, options)}") from None
    if base is not None and names_base(to):
        _require_same_architecture(adapter, base)
    export = chosen.prepare(adapter, options)
    left_out, pictures = list(export.notes), pictures_of(adapter)
    beside = _FOR_THE_CARD + sum(map(len, pictures.values()))
    with new_folder(output, export.num_bytes + beside) as folder:
        outcome = export.write(folder)
        card = model_card(adapter, options, chosen, outcome, left_out)
        (folder / CARD).write_text(card, encoding="utf-8")
        for file, picture in pictures.items():
            (folder / file).write_bytes(picture)
    return export.notes


def _check(adapter: SavedAdapter, to: str, options: ExportOptions) -> None:
    """Refuses what a format cannot express; see `Format.check`."""
    chosen: Format = FORMATS[to]()
    classification = adapter.method.classification
    if classification is not None and not chosen.classifies:
        raise cannot(to, f"a classifier ({classification.describe()})", "it has no score heads")
    chosen.check(adapter, options)


def _others(adapter: SavedAdapter, to: str, options: ExportOptions) -> str:
    """Which formats take an adapter that `to` does not."""
    # What they would be given by default, and a text to measure on where they ask for one.
    usual = options._replace(dtype="float32", weights=None, tokens=np.zeros((1, 1), np.int32))
    takers = []
    for name in FORMATS:
        with contextlib.suppress(NotExpressible):
            _check(adapter, name, usual)
            takers.append(name)
    other_tools = [f"--to {name}" for name in takers if name not in (to, _OWN)]
    if not other_tools:
        return f"only --to {_OWN} takes it"
    return f"{' and '.join(other_tools)} take{'' if other_tools[1:] else 's'} it"


def _require_same_architecture(adapter: SavedAdapter, base: str) -> None:
    """Refuses a folder here with another model; of hub ids and places elsewhere nothing is known.

    The same weights in another type may be meant, so that fingerprints are not compared.
    """
    folder = Path(base).expanduser()
    if folder.is_dir() and read_model_config(folder) != adapter.model:
        raise CheckpointError(
            f"{base}: its architecture differs from that of the base that the adapter was trained "
            f"on ({adapter.base.path}); give that base"
        )


def names_base(to: str) -> bool:
    """Whether an export in this format is of use only with a base that it names."""
    return not issubclass(FORMATS[to], ModelFormat)


def import_adapter(source: Path, base: str | Path | BaseModel) -> SavedAdapter:
    """Reads an adapter that another tool wrote, for a base of ours.

    Args:
      source: a folder with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
      base: base model, or its folder or hub id; its weights are not loaded.

    Returns:
      The adapter, its step 0.

    Raises:
      CheckpointError: the adapter is damaged, of an unknown kind, not of this base, or asks for
        what is not supported.
    """
    found = read_adapter_folder(source)
    opened = open_base(base)
    method, tree = _reader(found.config, source).read(found, opened.config, opened.identity.path)
    return SavedAdapter(method, tree, opened.config, opened.identity, 0)


def _reader(config: dict[str, Any], source: Path) -> AdapterFormat:
    """The format whose adapters have the `peft_type` that `config` states."""
    kinds = {}
    for cls in FORMATS.values():
        if issubclass(cls, AdapterFormat):
            kinds |= dict.fromkeys(cls.reads, cls)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(
            f"{source / CONFIG}: peft_type: {kind!r} is not supported; {suggest(str(kind), kinds)}"
        )
    return kinds[kind]()
