"""The folder that PEFT and MoE-PEFT keep an adapter in: a configuration and one file of weights."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # importing it is what lets safetensors return bfloat16 arrays
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.adapters.tree import MOE, SCORE
from moe_jax.checkpoints.leaves import LeafSpec
from moe_jax.config.parse import parse, suggest
from moe_jax.errors import CheckpointError
from moe_jax.exchange.torch_files import read_torch_file, write_torch_file
from moe_jax.hf.fields import HFFields
from moe_jax.hf.shards import listed

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
TORCH_FILE = "adapter_model.bin"

NO_DROPOUT = 1e-9
"""The `lora_dropout` that stands for none in MoE-PEFT's files, since its readers want a positive
one."""

_FLOATS = ("F32", "F16", "BF16")
_REQUIRED = object()


class Fields(HFFields):
    """The fields of an adapter's configuration, every one of which has to be asked for.

    What nobody asked for may be there only if it says nothing: null, false, zero or empty. Anything
    else might change what the adapter computes, in a way that would be lost.
    """

    def __init__(self, fields: Mapping[str, Any], where: str):
        """Nothing is asked for yet.

        Args:
          fields: from JSON.
          where: the file and, if it is a part of it, the field; for messages.
        """
        super().__init__(fields, where, {})

    def take(self, name: str, hint: Any, default: Any = _REQUIRED) -> Any:
        """A field's value, of the type `hint`; the default where it is missing or null.

        Raises:
          CheckpointError: it is missing and has no default.
          ConfigError: it is of another type.
        """
        if default is _REQUIRED:
            return self.get(name, hint)
        value = self.optional(name, hint)
        return default if value is None else value

    def choose(self, name: str, choices: Collection[str], default: Any = _REQUIRED) -> Any:
        """A field that has to be one of `choices`."""
        value = self.take(name, str, default)
        if value not in choices and value is not default:
            raise self.error(name, f"{value!r} is not supported; {suggest(value, choices)}")
        return value

    def part(self, name: str) -> "Fields | None":
        """A field that is a group of fields; None if it is not there."""
        group = self.optional(name, dict[str, Any])
        return None if group is None else Fields(group, f"{self.where}: {name}")

    def ignore(self, *names: str) -> None:
        """Says of fields that they do not matter, whatever they are."""
        self.seen.update(names)

    def finish(self) -> None:
        """Refuses what nobody asked for.

        Raises:
          CheckpointError: the first such field.
        """
        for name, value in self.mapping.items():
            if name not in self.seen and value:
                raise self.error(
                    name,
                    f"{json.dumps(value)[:60]} asks for something that is not supported here; only "
                    f"adapters without it can be read",
                )


def read_dropout(fields: Fields, default: Any = _REQUIRED) -> float:
    """The dropout that a configuration states."""
    dropout = fields.take("lora_dropout", float, default)
    return 0.0 if dropout == NO_DROPOUT else dropout


def read_targets(fields: Fields) -> tuple[str, ...]:
    """The projections that a configuration names: a list, or MoE-PEFT's names with true or false.

    Of paths such as `self_attn.q_proj`, the last name counts; which layers have it is found from
    the tensors.
    """
    stated = fields.take("target_modules", Any)
    if isinstance(stated, dict):
        stated = [name for name, adapted in stated.items() if adapted]
    names = parse(tuple[str, ...], stated, f"{fields.where}: target_modules")
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))


class AdapterFolder(NamedTuple):
    """What such a folder holds.

    Attributes:
      config_file, weights_file: where it was read from.
      config: the configuration, raw.
      tensors: by name; float32, float16 or `ml_dtypes.bfloat16`.
    """

    config_file: Path
    weights_file: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read_adapter_folder(folder: Path) -> AdapterFolder:
    """Reads a folder; of weights in both kinds of file, safetensors is read, as in PEFT.

    Raises:
      CheckpointError: a file is missing, unreadable or damaged, or holds what is not a tensor of
        floats; see also `read_torch_file`.
    """
    config_file = folder / CONFIG
    if not config_file.is_file():
        if (folder / "adapter.json").is_file():
            raise CheckpointError(
                f"{folder}: is an adapter of this library already; use it as it is"
            )
        raise CheckpointError(f"{folder}: no adapter here, {CONFIG} is missing")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last if it is nested deeply
        raise CheckpointError(f"{config_file}: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file}: expected an object, got {type(config).__name__}")
    for name, read in ((SAFETENSORS, _read_safetensors), (TORCH_FILE, read_torch_file)):
        if (folder / name).is_file():
            return AdapterFolder(config_file, folder / name, config, read(folder / name))
    raise CheckpointError(f"{folder}: has neither {SAFETENSORS} nor {TORCH_FILE}")


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                kind = opened.get_slice(name).get_dtype()
                if kind not in _FLOATS:
                    raise CheckpointError(
                        f"{file}: {name}: is stored as {kind}; supported: {', '.join(_FLOATS)}"
                    )
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or damaged ({error}); get it again") from None


def write_adapter_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], weights_file: str
) -> None:
    """Writes what `read_adapter_folder` reads.

    Args:
      folder: exists and is empty.
      config: of JSON values.
      tensors: by name; contiguous.
      weights_file: `SAFETENSORS` or `TORCH_FILE`.

    Raises:
      OSError: the disk's own.
    """
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if weights_file == TORCH_FILE:
        write_torch_file(folder / weights_file, tensors)
        return
    try:
        save_file(dict(tensors), folder / weights_file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def require_tensors(
    source: AdapterFolder, expected: Mapping[str, tuple[int, ...]], base: str
) -> None:
    """Refuses tensors that are not exactly the expected ones.

    Args:
      source: the adapter.
      expected: shapes by name, as stored.
      base: the base that they follow from, for messages.

    Raises:
      CheckpointError: a tensor is missing, left over, of another shape, or not finite.
    """
    file, tensors = source.weights_file, source.tensors
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{file}: lacks {listed(missing, 2)}; it is incomplete, or the adapter was trained on "
            f"another base than {base}"
        )
    unused = sorted(name for name in tensors if name not in expected)
    if unused:
        raise CheckpointError(
            f"{file}: holds {listed(unused, 2)}, which would be dropped; {source.config_file.name} "
            f"belongs to another adapter, or this one to another base than {base}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{file}: {name}: has shape {list(tensors[name].shape)}, but by "
                f"{source.config_file.name} it should have {list(shape)} on {base}; give the base "
                f"that the adapter was trained on"
            )
        if not np.all(np.isfinite(tensors[name])):
            raise CheckpointError(f"{file}: {name}: has values that are not finite")


# FIXME docstring of the merged exchange.tensor_names:
# """What PEFT and MoE-PEFT call the parts of our leaves, in both directions.
#
# They store one matrix `[out, in]` for each layer and expert, for example
#
#     base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight          LoRA
#     mixlora.layers.0.mlp.gate_proj.experts.0.lora_B.weight                  an expert's pair
#     mixlora.layers.0.mlp.moe_gate.weight                                    one router for the FFN
#     mola.layers.0.self_attn.q_proj.moe_gate.weight                          one for each projection
#     base_model.model.score.weight                                           a score head
#
# Ours are `[in, out]`, with layers and experts stacked: `lora_A` `[L, in, R]` or `[L, in, E, R]`,
# `lora_B` `[L, R, out]` or `[L, E, R, out]`, `router/kernel` `[L, in, E]`, `magnitude` `[L, out]`,
# `score/kernel` `[in, out]`.
# """


PREFIXES = {
    "LORA": "base_model.model.model",
    "MIXLORA": "mixlora",
    "LORAMOE": "loramoe",
    "MOLA": "mola",
}
"""What the names of an adapter's tensors begin with, by its `peft_type`."""

_EVERY = slice(None)


class TensorPart(NamedTuple):
    """A tensor and the part of a leaf that it is.

    Attributes:
      name: the tensor's.
      path: of the leaf.
      at: `leaf[at]` is the tensor transposed.
      shape: of the tensor, as stored.
    """

    name: str
    path: str
    at: tuple[int | slice, ...]
    shape: tuple[int, ...]


def tensor_parts(leaves: Mapping[str, LeafSpec], peft_type: str) -> list[TensorPart]:
    """All tensors of an adapter with these leaves, layer by layer.

    Args:
      leaves: shapes by path.
      peft_type: a key of `PREFIXES`.

    Raises:
      ValueError: the format has no name for a leaf, which its caller should have refused.
    """
    stacked = {path: spec for path, spec in leaves.items() if not path.startswith(f"{SCORE}/")}
    num_layers = max(spec.shape[0] for spec in stacked.values())
    parts = [
        TensorPart("base_model.model.score.weight", path, (), spec.shape[::-1])
        for path, spec in leaves.items()
        if path not in stacked
    ]
    for layer in range(num_layers):
        for path, spec in stacked.items():
            root, block, *rest = path.split("/")
            # The site of experts that share a router is no module of its own there.
            names = [PREFIXES[peft_type], root, str(layer), block, *(p for p in rest if p != MOE)]
            for name, index in _parts_of_layer(names, spec.shape):
                shape = np.broadcast_to(0, spec.shape)[(layer, *index)].T.shape
                parts.append(TensorPart(name, path, (layer, *index), shape))
    return parts


def _parts_of_layer(
    names: list[str], shape: tuple[int, ...]
) -> Iterable[tuple[str, tuple[int | slice, ...]]]:
    *module, leaf = names
    ndim = len(shape)
    where = ".".join(module)
    if leaf == "kernel" and module[-1] == "router":
        yield f"{where.removesuffix('router')}moe_gate.weight", ()
    elif leaf in ("lora_A", "lora_B") and ndim == 3:
        yield f"{where}.{leaf}.weight", ()
    elif leaf in ("lora_A", "lora_B") and ndim == 4:
        for expert in range(shape[2 if leaf == "lora_A" else 1]):
            index = (_EVERY, expert) if leaf == "lora_A" else (expert,)
            yield f"{where}.experts.{expert}.{leaf}.weight", index
    elif leaf == "magnitude" and ndim == 2:
        yield f"{where}.lora_magnitude_vector", ()
    else:
        raise ValueError(f"no tensor's name stands for {'.'.join(names)}")


def to_tensors(
    leaves: Mapping[str, np.ndarray], parts: Iterable[TensorPart], dtype: np.dtype
) -> dict[str, np.ndarray]:
    """The tensors, contiguous, of leaves by path."""
    return {
        part.name: np.ascontiguousarray(leaves[part.path][part.at].T.astype(dtype))
        for part in parts
    }


def to_leaves(
    tensors: Mapping[str, np.ndarray],
    parts: Iterable[TensorPart],
    leaves: Mapping[str, LeafSpec],
) -> dict[str, np.ndarray]:
    """The leaves by path, of their own types, of tensors whose names and shapes are the parts'."""
    result = {path: np.zeros(spec.shape, spec.dtype) for path, spec in leaves.items()}
    for part in parts:
        result[part.path][part.at] = tensors[part.name].T
    return result
