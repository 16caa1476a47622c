"""The adapter folder of PEFT and MoE-PEFT: its configuration, weights file and tensor names.

Both tools store one matrix `[out, in]` for each layer and expert, for example

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight          a LoRA pair
    mixlora.layers.0.mlp.gate_proj.experts.0.lora_B.weight                  an expert's pair
    mixlora.layers.0.mlp.moe_gate.weight                                    the router of an FFN
    mola.layers.0.self_attn.q_proj.moe_gate.weight                          a projection's router
    base_model.model.score.weight                                           a score head
    base_model.model.lm_head.token_adapter.trainable_tokens_delta           rows of new tokens

moe_jax stores `[in, out]` with layers and experts stacked: `lora_A` `[L, in, R]` or
`[L, in, E, R]`, `lora_B` `[L, R, out]` or `[L, E, R, out]`, `router/kernel` `[L, in, E]`,
`magnitude` `[L, out]`, `score/kernel` `[in, out]`; `new_tokens/head` is [N, D] in both.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # safetensors returns bfloat16 arrays once this is imported
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.adapters.tree import MOE, NEW_TOKENS, SCORE
from moe_jax.checkpoints.leaves import LeafSpec
from moe_jax.config.attention import (
    FFN,
    GLOBAL_ATTENTION,
    LAYER_EMBEDDING,
    READERS,
    SELF_ATTENTION,
    WIDE_FFN,
)
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import parse, suggest
from moe_jax.errors import CheckpointError
from moe_jax.exchange.torch_files import read_torch_file, write_torch_file
from moe_jax.files.json_file import read_json_object
from moe_jax.hf.fields import HFFields
from moe_jax.hf.shards import name_list

CONFIG_FILE = "adapter_config.json"
SAFETENSORS_FILE = "adapter_model.safetensors"
TORCH_FILE = "adapter_model.bin"

NO_DROPOUT = 1e-9
"""The `lora_dropout` that means no dropout in MoE-PEFT's files, whose readers require > 0."""

TENSOR_PREFIXES = {
    "LORA": "base_model.model.model",
    "MIXLORA": "mixlora",
    "LORAMOE": "loramoe",
    "MOLA": "mola",
}
"""Prefix of an adapter's tensor names, by `peft_type`."""

_TOKEN_ROWS = {
    f"{NEW_TOKENS}/{leaf}": f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
    for leaf, module in (("embedding", "model.embed_tokens"), ("head", "lm_head"))
}
"""Tensor of each leaf of new tokens."""

_BLOCKS = {
    GLOBAL_ATTENTION: (SELF_ATTENTION,),
    **dict.fromkeys(READERS.values(), (SELF_ATTENTION,)),
    WIDE_FFN: (FFN,),
    LAYER_EMBEDDING: (),
}
"""Modules that the other tools have in the place of one of this package."""

_FLOATS = ("F32", "F16", "BF16")
_REQUIRED = object()


class ConfigFields(HFFields):
    """The fields of an adapter's configuration, each of which has to be read.

    A field that is not read is accepted only if it is null, false, zero or empty. Any other value
    might change what the adapter computes.
    """

    def __init__(self, fields: Mapping[str, Any], where: str):
        """Wraps a configuration.

        Args:
          fields: the parsed JSON object.
          where: path of the file, and name of the group in it, for messages.
        """
        super().__init__(fields, where, {})

    def take(self, name: str, hint: Any, default: Any = _REQUIRED) -> Any:
        """A field's value, of the type `hint`; the default if the field is missing or null.

        Raises:
          CheckpointError: the field is missing and has no default.
          ConfigError: the value is of another type.
        """
        if default is _REQUIRED:
            return self.get(name, hint)
        value = self.optional(name, hint)
        return default if value is None else value

    def choose(self, name: str, choices: Collection[str], default: Any = _REQUIRED) -> Any:
        """A field whose value has to be one of `choices`."""
        value = self.take(name, str, default)
        if value not in choices and value is not default:
            raise self.error(name, f"{value!r} is not supported; {suggest(value, choices)}")
        return value

    def subgroup(self, name: str) -> "ConfigFields | None":
        """A field that is itself a group of fields; None if it is missing."""
        group = self.optional(name, dict[str, Any])
        return None if group is None else ConfigFields(group, f"{self.where}: {name}")

    def ignore(self, *names: str) -> None:
        """Accepts fields with any value."""
        self.seen.update(names)

    def refuse_unread(self) -> None:
        """Refuses fields that were not read and have a value.

        Raises:
          CheckpointError: the message names the first such field.
        """
        for name, value in self.mapping.items():
            if name not in self.seen and value:
                raise self.error(
                    name,
                    f"{json.dumps(value)[:60]} is not supported; only adapters without it can be "
                    "read",
                )


def read_dropout(fields: ConfigFields, default: Any = _REQUIRED) -> float:
    """The dropout rate of a configuration."""
    dropout = fields.take("lora_dropout", float, default)
    return 0.0 if dropout == NO_DROPOUT else dropout


def read_target_modules(fields: ConfigFields) -> tuple[str, ...]:
    """Names of the adapted projections: a list, or MoE-PEFT's names with true or false.

    Paths such as `self_attn.q_proj` are reduced to their last name. The tensors determine which
    layers are adapted.
    """
    value = fields.take("target_modules", Any)
    if isinstance(value, dict):
        value = [name for name, adapted in value.items() if adapted]
    names = parse(tuple[str, ...], value, f"{fields.where}: target_modules")
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))


class AdapterFolder(NamedTuple):
    """Contents of an adapter folder.

    Attributes:
      config_file, weights_file: the files that were read.
      config: the configuration as parsed JSON.
      tensors: tensors by name; float32, float16 or `ml_dtypes.bfloat16`.
    """

    config_file: Path
    weights_file: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read_adapter_folder(folder: Path) -> AdapterFolder:
    """Reads an adapter folder; safetensors take precedence over `.bin`, as in PEFT.

    Raises:
      CheckpointError: a file is missing, unreadable or damaged, or holds other data than float
        tensors; see also `read_torch_file`.
    """
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        if (folder / "adapter.json").is_file():
            raise CheckpointError(
                f"{folder}: is already an adapter of this library; use it directly"
            )
        inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
        remedy = f"; give its subfolder {' or '.join(inner)}" if inner else ""
        raise CheckpointError(f"{folder}: no adapter here, {CONFIG_FILE} is missing{remedy}")
    config = read_json_object(config_file)
    for name, read in ((SAFETENSORS_FILE, _read_safetensors), (TORCH_FILE, read_torch_file)):
        if (folder / name).is_file():
            return AdapterFolder(config_file, folder / name, config, read(folder / name))
    raise CheckpointError(f"{folder}: has neither {SAFETENSORS_FILE} nor {TORCH_FILE}")


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
        raise CheckpointError(
            f"{file}: truncated or damaged ({error}); download it again"
        ) from None


def write_adapter_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], weights_file: str
) -> None:
    """Writes a configuration and a weights file for `read_adapter_folder`.

    Args:
      folder: an existing, empty folder.
      config: a JSON object.
      tensors: contiguous tensors by name.
      weights_file: `SAFETENSORS_FILE` or `TORCH_FILE`.

    Raises:
      OSError: the disk is full or not writable.
    """
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
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
    """Requires an adapter to have exactly the expected tensors.

    Args:
      source: the adapter's folder.
      expected: stored shapes by name.
      base: name of the base in messages.

    Raises:
      CheckpointError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    file, tensors = source.weights_file, source.tensors
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{file}: lacks {name_list(missing, 2)}, which {source.config_file.name} states for "
            f"{base}; give the base, the configuration and the complete weights of one adapter"
        )
    unused = sorted(name for name in tensors if name not in expected)
    if unused:
        raise CheckpointError(
            f"{file}: holds {name_list(unused, 2)}, which would be dropped, since "
            f"{source.config_file.name} does not state them for {base}; give the base, the "
            f"configuration and the weights of one adapter"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{file}: {name}: has shape {list(tensors[name].shape)}, but by "
                f"{source.config_file.name} it should have {list(shape)} on {base}; give the base "
                f"that the adapter was trained on"
            )
        require_finite(source, name)


def require_finite(source: AdapterFolder, name: str) -> None:
    """Raises `CheckpointError` if the tensor `name` has values that are not finite."""
    if not np.all(np.isfinite(source.tensors[name])):
        raise CheckpointError(f"{source.weights_file}: {name}: has values that are not finite")


class AdapterTensor(NamedTuple):
    """A stored tensor and its place in a leaf.

    Attributes:
      name: name of the tensor.
      path: path of the leaf.
      indices: `leaf[indices]` is the transposed tensor.
      shape: stored shape of the tensor.
      transposed: False if `leaf[indices]` is the tensor itself.
    """

    name: str
    path: str
    indices: tuple[int | slice, ...]
    shape: tuple[int, ...]
    transposed: bool = True

    def stored(self, array: np.ndarray) -> np.ndarray:
        """The tensor of its part of a leaf, or the part of a tensor."""
        return array.T if self.transposed else array


def adapter_tensors(
    leaves: Mapping[str, LeafSpec], peft_type: str, model: ModelConfig
) -> list[AdapterTensor]:
    """All stored tensors of an adapter with the given leaves, layer by layer.

    Args:
      leaves: leaf shapes by path.
      peft_type: a key of `TENSOR_PREFIXES`.
      model: architecture of the base.

    Raises:
      ValueError: the format has no name for a leaf; the caller should have refused it.
    """
    stacked = {path: spec for path, spec in leaves.items() if path.startswith("layers/")}
    tensors = [
        AdapterTensor("base_model.model.score.weight", path, (), spec.shape[::-1])
        if path.startswith(f"{SCORE}/")
        else AdapterTensor(_TOKEN_ROWS[path], path, (), spec.shape, transposed=False)
        for path, spec in leaves.items()
        if path not in stacked
    ]
    for layer in range(model.num_layers):
        for path, spec in stacked.items():
            root, block, *rest = path.split("/")
            layers = model.layers_with(block)
            if layer not in layers:
                continue
            place = layers.index(layer)
            # Experts that share a router have no module of their own in the other tools.
            rest = [part for part in rest if part != MOE]
            blocks = _BLOCKS.get(block, (block,))
            names = [TENSOR_PREFIXES[peft_type], root, str(layer), *blocks, *rest]
            for name, indices in _layer_tensors(names, spec.shape):
                shape = np.broadcast_to(0, spec.shape)[(place, *indices)].T.shape
                tensors.append(AdapterTensor(name, path, (place, *indices), shape))
    return tensors


def _layer_tensors(
    names: list[str], shape: tuple[int, ...]
) -> Iterable[tuple[str, tuple[int | slice, ...]]]:
    """Tensor names of one layer of a leaf, with their indices below the layer axis."""
    *module, leaf = names
    ndim = len(shape)
    prefix = ".".join(module)
    if leaf == "kernel" and module[-1] == "router":
        yield f"{prefix.removesuffix('router')}moe_gate.weight", ()
    elif leaf in ("lora_A", "lora_B") and ndim == 3:
        yield f"{prefix}.{leaf}.weight", ()
    elif leaf in ("lora_A", "lora_B") and ndim == 4:
        for expert in range(shape[2 if leaf == "lora_A" else 1]):
            index = (slice(None), expert) if leaf == "lora_A" else (expert,)
            yield f"{prefix}.experts.{expert}.{leaf}.weight", index
    elif leaf == "magnitude" and ndim == 2:
        yield f"{prefix}.lora_magnitude_vector", ()
    else:
        raise ValueError(f"no tensor name for the leaf {'.'.join(names)}")


def tensors_from_leaves(
    leaves: Mapping[str, np.ndarray], layout: Iterable[AdapterTensor], dtype: np.dtype
) -> dict[str, np.ndarray]:
    """Contiguous tensors by name, from leaves by path."""
    return {
        tensor.name: np.ascontiguousarray(
            tensor.stored(leaves[tensor.path][tensor.indices]).astype(dtype)
        )
        for tensor in layout
    }


def leaves_from_tensors(
    tensors: Mapping[str, np.ndarray],
    layout: Iterable[AdapterTensor],
    specs: Mapping[str, LeafSpec],
) -> dict[str, np.ndarray]:
    """Leaves by path, of the dtypes of `specs`, from tensors that match the layout."""
    leaves = {path: np.zeros(spec.shape, spec.dtype) for path, spec in specs.items()}
    for tensor in layout:
        leaves[tensor.path][tensor.indices] = tensor.stored(tensors[tensor.name])
    return leaves
