"""Exports adapters to the formats of other tools, and imports adapters from them."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import FloatType
from moe_jax.config.parse import FieldError, suggest
from moe_jax.errors import CheckpointError
from moe_jax.exchange import FORMATS
from moe_jax.exchange.adapter_folder import CONFIG_FILE, read_adapter_folder
from moe_jax.exchange.format import (
    AdapterFormat,
    ExportOptions,
    Format,
    NotExpressible,
    Weighting,
    not_expressible,
)
from moe_jax.exchange.model_card import CARD_FILE, card_pictures, model_card
from moe_jax.exchange.whole_model import ModelFormat
from moe_jax.files.folders import new_folder
from moe_jax.files.json_file import read_json_object
from moe_jax.hf.base_model import BaseModel, open_base
from moe_jax.hf.config import read_model_config
from moe_jax.hf.wrapper import LOADED_ALONE, is_wrapper

_NATIVE = "moe_jax"
"""Name of the format that can express every adapter."""

_CARD_BYTES = 2**16
"""Upper bound of the size of a model card."""


def export_adapter(
    adapter: SavedAdapter,
    to: str,
    output: Path,
    *,
    dtype: FloatType | None = None,
    base: str | None = None,
    weights: Weighting | None = None,
    tokens: np.ndarray | None = None,
    data_name: str = "",
    location: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Writes an adapter in the format of another tool, with a model card.

    Args:
      adapter: from `load_adapter`.
      to: name of the format, a key of `FORMATS`.
      output: a folder that does not exist or is empty; it is written completely or not at all.
      dtype: dtype of the written tensors; by default that of the base for a whole model, and
        float32, as trained, for an adapter.
      base: folder or hub id of the base as the receiving tool will find it; by default the path
        that it had in training. A format that writes a whole model reads the base there.
      weights: weighting of experts in a format that merges them; "average" by default.
      tokens: int [B, S], rows on which such a format measures the divergence.
      data_name: name of the source of `tokens` in messages.
      location: folder or hub id of the export for the model card; by default `output`.
      say: receives a line with the size of the export before it is written.

    Returns:
      Properties that the format drops or changes, and measurements, one sentence each.

    Raises:
      CheckpointError: the format is unknown or cannot express the adapter; `base` is a folder with
        another model; `output` is not empty; the disk is too small, full or not writable.
      ConfigError: an option does not apply to the format.
    """
    if to not in FORMATS:
        raise CheckpointError(f"unknown format {to!r}; {suggest(to, FORMATS)}")
    if dtype is not None and dtype not in get_args(FloatType):
        raise CheckpointError(f"unknown dtype {dtype!r}; {suggest(dtype, get_args(FloatType))}")
    export_format: Format = FORMATS[to]()
    if weights is not None and weights not in get_args(Weighting):
        raise CheckpointError(
            f"unknown weights {weights!r}; {suggest(weights, get_args(Weighting))}"
        )
    for name, value in (("weights", weights), ("data", tokens)):
        if value is not None and not export_format.merges_experts:
            raise FieldError(name, f"the {to} format does not merge experts; leave the option out")
    known_base = adapter.base.path if base is None else base
    location = str(output) if location is None else location
    options = ExportOptions(known_base, dtype, weights, tokens, data_name, location)
    try:
        _check(adapter, to, options)
    except NotExpressible as error:
        raise CheckpointError(f"{error}; {_advice(adapter, to, options)}") from None
    if base is not None and names_base(to):
        _require_same_architecture(adapter, base)
    if isinstance(export_format, AdapterFormat):
        revision = None if adapter.training is None else adapter.training.base.get("revision")
        _require_text_model(known_base, revision if base is None else None, to)
    export = export_format.prepare(adapter, options)
    left_out, pictures = list(export.notes), card_pictures(adapter)
    num_bytes = export.num_bytes + _CARD_BYTES + sum(map(len, pictures.values()))
    with new_folder(output, num_bytes) as folder:
        say(f"writing {output}: {to}, {export.dtype}, up to {num_bytes / 1e6:,.1f} MB")
        outcome = export.write(folder)
        options = options._replace(dtype=export.dtype)
        card = model_card(adapter, options, export_format, outcome, left_out)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        for file, picture in pictures.items():
            (folder / file).write_bytes(picture)
    return export.notes


def _check(adapter: SavedAdapter, to: str, options: ExportOptions) -> None:
    """Refuses an adapter that a format cannot express; see `Format.check`."""
    export_format: Format = FORMATS[to]()
    classification = adapter.method.classification
    if classification is not None and not export_format.classifies:
        feature = f"a classifier ({classification.describe()})"
        raise not_expressible(to, feature, "it has no score heads")
    if adapter.method.new_tokens and not export_format.adds_tokens:
        feature = f"new_tokens {', '.join(adapter.method.new_tokens)}"
        raise not_expressible(to, feature, "it has no rows of the embedding and the head")
    export_format.check(adapter, options)


def _advice(adapter: SavedAdapter, to: str, options: ExportOptions) -> str:
    """Names the formats that can express an adapter that `to` cannot."""
    # Default options, with a text for formats that require one.
    defaults = options._replace(dtype=None, weights=None, tokens=np.zeros((1, 1), np.int32))
    possible = []
    for name in sorted(FORMATS):
        with contextlib.suppress(NotExpressible):
            _check(adapter, name, defaults)
            possible.append(name)
    other_tools = [f"--to {name}" for name in possible if name not in (to, _NATIVE)]
    return f"formats that can: {', '.join(other_tools or [f'--to {_NATIVE}'])}"


def _require_same_architecture(adapter: SavedAdapter, base: str) -> None:
    """Refuses a local folder with a model of another architecture; hub ids are not looked up.

    Fingerprints are not compared, since the same weights in another dtype are valid.
    """
    folder = Path(base).expanduser()
    if folder.is_dir() and read_model_config(folder) != adapter.model:
        raise CheckpointError(
            f"{base}: its architecture differs from that of the base that the adapter was trained "
            f"on ({adapter.base.path}); give that base"
        )


def _require_text_model(base: str, revision: str | None, to: str) -> None:
    """Refuses a base that also reads images: in other tools its modules have other names.

    A hub id is looked up in the local cache alone.
    """
    from huggingface_hub import try_to_load_from_cache

    folder, cached = Path(base).expanduser(), None
    if not folder.is_dir():
        with contextlib.suppress(ValueError):  # of a path that is no hub id
            cached = try_to_load_from_cache(base, "config.json", revision=revision)
    file = Path(cached) if isinstance(cached, str) else folder / "config.json"
    fields = read_json_object(file) if file.is_file() else {}
    loads_alone = to == "peft" and fields.get("model_type") in LOADED_ALONE
    if is_wrapper(fields) and not loads_alone:
        raise CheckpointError(
            f"{base}: is a language model inside a larger model, in which the modules have other "
            f"names than the {to} format writes; write a whole text model with --to llama"
        )


def names_base(to: str) -> bool:
    """True if an export in this format refers to its base instead of including it."""
    return not issubclass(FORMATS[to], ModelFormat)


def import_adapter(source: Path, base: str | Path | BaseModel) -> SavedAdapter:
    """Reads an adapter that PEFT or MoE-PEFT wrote.

    Args:
      source: a folder with `adapter_config.json` and `adapter_model.safetensors` or `.bin`.
      base: base model, or its folder or hub id; its weights are not loaded.

    Returns:
      The adapter, with step 0.

    Raises:
      CheckpointError: the adapter is damaged, of an unknown type, does not belong to this base, or
        has unsupported settings.
    """
    contents = read_adapter_folder(source)
    model = open_base(base)
    import_format = _import_format(contents.config, source)
    method, tree = import_format.read(contents, model)
    return SavedAdapter(method, tree, model.config, model.identity, 0)


def _import_format(config: dict[str, Any], source: Path) -> AdapterFormat:
    """The format that reads the `peft_type` of a configuration."""
    formats = {}
    for cls in FORMATS.values():
        if issubclass(cls, AdapterFormat):
            formats |= dict.fromkeys(cls.peft_types, cls)
    name = config.get("peft_type")
    if not isinstance(name, str) or name not in formats:
        raise CheckpointError(
            f"{source / CONFIG_FILE}: peft_type: {name!r} is not supported; "
            f"{suggest(str(name), formats)}"
        )
    return formats[name]()
