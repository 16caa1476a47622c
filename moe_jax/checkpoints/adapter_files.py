"""Folders of trained adapters: weights, and `adapter.json`, which describes them.

The description holds a digest of its other fields, among them the checksums of the weights, so that
an adapter loads as it was saved or not at all. One that was edited by hand on purpose loads if its
`digest` is null.

They may also hold the record of the training, see `training_record`.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.late_errors import register_folder
from moe_jax.checkpoints.leaves import (
    LeafSpec,
    Snapshot,
    leaf_specs,
    nested_dict,
    snapshot_without_copy,
    take_snapshot,
)
from moe_jax.checkpoints.restored_tree import restore_tree
from moe_jax.checkpoints.training_record import (
    TrainingRecord,
    read_pictures,
    read_record,
    write_record,
)
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import parse, parse_member, to_plain
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.files.atomic import write_atomic
from moe_jax.files.digests import content_digest
from moe_jax.files.disk import disk_errors, require_space, resolve_link
from moe_jax.files.folders import current_folder, replace_folder, restore_former_folder
from moe_jax.files.json_file import parse_json
from moe_jax.hf.base_model import BaseIdentity
from moe_jax.version import __version__

FORMAT_VERSION = 2
DESCRIPTION = "adapter.json"
_WEIGHTS = "weights"
_DIGEST = "digest"
_CHANGED = "the file was changed or is damaged"


@dataclasses.dataclass(frozen=True)
class Description:
    """Content of `adapter.json`.

    Attributes:
      package_version: release that wrote the folder.
      method: fields of the method, and its `name`.
      base: identity of the base model that it was trained on.
      model: fields of the base model's architecture.
      step: number of optimizer steps it was trained for.
      leaves: shape and type of every weight, by path.
      checksums: checksum of every weight, by path.
    """

    package_version: str
    method: dict[str, Any]
    base: BaseIdentity
    model: dict[str, Any]
    step: int
    leaves: dict[str, LeafSpec]
    checksums: dict[str, int]


class SavedAdapter(NamedTuple):
    """A trained adapter: its method, its weights and the base model that it belongs to.

    Attributes:
      method: configuration of the method, for example `MixLoraConfig`.
      tree: weights, as in `TrainState.adapters[name]`.
      model: architecture of the base model.
      base: identity of the base model.
      step: number of optimizer steps it was trained for.
      training: record of the training; None if there is none.
      pictures: content of picture files by name, see `PICTURES`.
    """

    method: Any
    tree: Any
    model: ModelConfig
    base: BaseIdentity
    step: int
    training: TrainingRecord | None = None
    pictures: Mapping[str, bytes] = MappingProxyType({})


def save_adapter(folder: Path, adapter: SavedAdapter) -> None:
    """Writes the folder of an adapter; an existing one is replaced once the new one is complete.

    Readers find the former or the new folder, even after a process was killed. With several
    processes, each must call this.

    Raises:
      TrainingError: a weight is not finite; nothing is written.
      CheckpointError: the disk is too small, full or not writable; a former `folder` is untouched.
    """
    _write(folder, adapter, snapshot_without_copy(adapter.tree))


def capture_adapter(folder: Path, adapter: SavedAdapter) -> Callable[[], None]:
    """Copies an adapter on its devices without waiting; its arrays may be donated to the next step.

    Returns:
      A function that writes the copy as `save_adapter` does, with the same errors. It runs no
      computation across devices, so with a single process another thread may call it.
    """
    weights = take_snapshot(adapter.tree)
    # The copy, since the arrays of the tree are donated before the function is called.
    return functools.partial(_write, folder, adapter._replace(tree=weights.tree), weights)


def _write(folder: Path, adapter: SavedAdapter, weights: Snapshot) -> None:
    folder = resolve_link(folder)
    weights.require_finite(adapter.step)
    description = {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "method": to_plain(adapter.method),
        "base": adapter.base._asdict(),
        "model": dataclasses.asdict(adapter.model),
        "step": adapter.step,
        "leaves": {path: list(spec) for path, spec in leaf_specs(adapter.tree).items()},
        "checksums": weights.checksums(),
    }
    description[_DIGEST] = content_digest(description)
    require_space(folder, sum(leaf.nbytes for leaf in jax.tree.leaves(adapter.tree)))
    incomplete = folder.with_name(f".{folder.name}.incomplete")
    register_folder(incomplete)
    try:
        with disk_errors(folder):
            if jax.process_index() == 0:
                restore_former_folder(folder)
                shutil.rmtree(incomplete, ignore_errors=True)
                incomplete.mkdir(parents=True)
                (incomplete / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
                write_record(incomplete, adapter.training, adapter.pictures)
            multihost_utils.sync_global_devices(f"save_adapter {folder.name}")
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(incomplete / _WEIGHTS, adapter.tree)
            if jax.process_index() == 0:
                replace_folder(folder, incomplete)
            multihost_utils.sync_global_devices(f"saved_adapter {folder.name}")
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(incomplete, ignore_errors=True)
        raise


def load_adapter(folder: Path, shardings: Any = None) -> SavedAdapter:
    """Reads the folder of an adapter.

    Args:
      folder: folder with `adapter.json`.
      shardings: tree of shardings like the adapter's; None puts all leaves on the default device.

    Raises:
      CheckpointError: the folder is missing, incomplete or damaged, or of another format version.
    """
    folder = current_folder(folder)
    description = read_description(folder)
    method, model = described_method(folder, description)
    target = nested_dict(
        {path: jax.ShapeDtypeStruct(*spec) for path, spec in description.leaves.items()}
    )
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        target,
        jax.tree.map(lambda _: shardings, target)
        if isinstance(shardings, jax.sharding.Sharding)
        else shardings,
    )
    tree = restore_tree(
        folder.absolute() / _WEIGHTS, target, description.checksums, "copy the folder again"
    )
    return SavedAdapter(
        method,
        tree,
        model,
        description.base,
        description.step,
        read_record(folder),
        read_pictures(folder),
    )


def described_method(folder: Path, description: Description) -> tuple[Any, ModelConfig]:
    """Method of an adapter and architecture of its base; raises as `load_adapter` does."""
    file = folder / DESCRIPTION
    try:
        method = parse_member(METHODS, description.method, f"{file}: method")
        return method, parse(ModelConfig, description.model, f"{file}: model")
    except ConfigError as error:
        raise CheckpointError(f"{error}; {_CHANGED}") from None


def read_description(folder: Path) -> Description:
    """Reads `adapter.json` and checks its version and types; raises as `load_adapter` does.

    The fields of the method and the model are checked by `described_method`.
    """
    file = current_folder(folder) / DESCRIPTION
    try:
        description = parse_json(file.read_bytes())
    except FileNotFoundError:
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder}: is an adapter of another tool; convert it with `moe-jax import`"
            ) from None
        raise CheckpointError(
            f"{folder}: no adapter here, {DESCRIPTION} is missing; a finished run has its adapters "
            "in WORKDIR/adapters/NAME"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format version {version!r}, this release reads {FORMAT_VERSION}; load it "
            "with the release that wrote it, or train it again"
        )
    _require_digest(description, file)
    fields = {}
    for field, hint in _TYPES.items():
        if field not in description:
            raise CheckpointError(f"{file}: field {field!r} is missing; {_CHANGED}")
        try:
            fields[field] = parse(hint, description[field], f"{file}: {field}")
        except ConfigError as error:
            raise CheckpointError(f"{error}; {_CHANGED}") from None
    for field, keys in (("method", ("name",)), ("base", BaseIdentity._fields)):
        for key in keys:
            if not isinstance(fields[field].get(key), str):
                raise CheckpointError(f"{file}: {field}.{key}: expected a text; {_CHANGED}")
    fields["base"] = BaseIdentity(**{key: fields["base"][key] for key in BaseIdentity._fields})
    fields["leaves"] = _leaf_specs(fields["leaves"], file)
    return Description(**fields)


def _require_digest(description: dict[str, Any], file: Path) -> None:
    """Requires that the fields are those that were saved, or that their digest is null."""
    content = dict(description)
    digest = content.pop(_DIGEST, "")
    if digest is not None and digest != content_digest(content):
        raise CheckpointError(
            f"{file}: differs from its digest, so it is damaged or was edited; copy the folder "
            f'again, or, to load it as it is, set "{_DIGEST}": null in the file'
        )


_TYPES: dict[str, Any] = {
    **{field.name: field.type for field in dataclasses.fields(Description)},
    "base": dict[str, Any],
    "leaves": dict[str, Any],
}
"""JSON type of each field."""


def _leaf_specs(leaves: dict[str, Any], file: Path) -> dict[str, LeafSpec]:
    specs = {}
    for path, value in leaves.items():
        try:
            shape, dtype = value
            sizes = parse(tuple[int, ...], shape)
            specs[path] = LeafSpec(sizes, jnp.dtype(dtype).name)
            if any(size < 0 for size in sizes) or any(p.startswith(f"{path}/") for p in leaves):
                raise ValueError
        except (TypeError, ValueError, ConfigError):
            raise CheckpointError(
                f"{file}: leaves: {path!r} is {value!r}, expected a shape and a type; {_CHANGED}"
            ) from None
    return specs


def add_pictures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Adds pictures to the folder of a saved adapter.

    Raises:
      CheckpointError: the disk is full or not writable.
    """
    with disk_errors(folder):
        restore_former_folder(folder)
    for name, picture in pictures.items():
        write_atomic(folder / name, picture)
