"""The interface of an export format; the package's docstring says how to add one."""

import abc
import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.method import AdapterMethod
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import leaf_specs, named_leaves, nested_dict, require_same_leaves
from moe_jax.config.model import FloatType, ModelConfig
from moe_jax.config.parse import Registry, located
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.exchange.adapter_folder import (
    CONFIG_FILE,
    AdapterFolder,
    ConfigFields,
    adapter_tensors,
    leaves_from_tensors,
    require_tensors,
    tensors_from_leaves,
    write_adapter_folder,
)
from moe_jax.exchange.new_tokens import extended_tokenizer
from moe_jax.hf.base_model import BaseModel, resolve_checkpoint
from moe_jax.hf.key_table import base_leaves
from moe_jax.loaded.adapter_base import expected_leaves

FORMATS = Registry("format")
"""Format classes by the name that `moe-jax export --to NAME` takes."""


class NotExpressible(CheckpointError):
    """A format cannot express an adapter; `export_adapter` adds the formats that can."""


def not_expressible(format_name: str, feature: str, reason: str) -> NotExpressible:
    """The error for a feature of an adapter that a format cannot express."""
    return NotExpressible(f"the {format_name} format cannot express {feature}; {reason}")


def field_names(cls: Any) -> tuple[str, ...]:
    """Names of the fields of a dataclass."""
    return tuple(field.name for field in dataclasses.fields(cls))


def require_known(config: Any, known: Collection[str], prefix: str, format_name: str) -> None:
    """Refuses fields of a method or router that a format does not handle.

    A field that is added to the method later must have its default value until the format handles
    it. Otherwise an export would drop it silently.

    Args:
      config: the method or router.
      known: the fields that the format writes, checks itself, or leaves out deliberately.
      prefix: prefix of field names in messages.
      format_name: name of the format in messages.

    Raises:
      CheckpointError: another field has a value that is not its default.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in known and value != field.default:
            raise not_expressible(
                format_name, f"{prefix}{field.name} {value!r}", "train without it"
            )


Weighting = Literal["average", "utilization"]
"""Weights of the experts in a merge: equal, or proportional to each expert's share of tokens."""


class ExportOptions(NamedTuple):
    """Options of an export.

    Attributes:
      base: folder or hub id of the base, as the receiving tool will find it. A format that writes
        a whole model reads the base there.
      dtype: dtype of the written tensors; None selects the format's default.
      weights: weighting of merged experts; None selects the format's default.
      tokens: int [B, S], rows on which a merged model is measured; None measures nothing.
      data_name: name of the tokens' source in messages.
      location: folder or hub id where the receiving tool will find the export.
    """

    base: str
    dtype: FloatType | None = None
    weights: Weighting | None = None
    tokens: np.ndarray | None = None
    data_name: str = ""
    location: str = "exported"


class ExportOutcome(NamedTuple):
    """Description of a finished export, for its model card.

    Attributes:
      description: the written files, in words.
      is_whole_model: whether the export includes the base.
      approximation: the approximation that was made; None if the export is exact.
      divergence: KL divergence from the exact model in nats per token; None if not measured.
    """

    description: str
    is_whole_model: bool
    approximation: str | None = None
    divergence: float | None = None


class Export(NamedTuple):
    """An export that passed all checks and is ready to be written.

    Attributes:
      num_bytes: upper bound of its size on disk.
      dtype: dtype of the written tensors.
      write: fills an empty folder; it may append to `notes`.
      notes: properties that the format drops or changes, one sentence each, for the user.
    """

    num_bytes: int
    dtype: FloatType
    write: Callable[[Path], ExportOutcome]
    notes: list[str]


class Format(abc.ABC):
    """A format that adapters are exported to.

    Attributes:
      merges_experts: whether the format uses `ExportOptions.weights` and `tokens`.
      classifies: whether the format can express a score head.
      adds_tokens: whether the format can express new tokens.
      library: the hub's `library_name` for it; empty if the hub has none.
    """

    merges_experts: ClassVar[bool] = False
    classifies: ClassVar[bool] = False
    adds_tokens: ClassVar[bool] = False
    library: ClassVar[str] = ""

    def loading_code(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        """Python code that loads the export, for its model card; empty if there is none.

        Args:
          adapter: the exported adapter.
          options: options of the export.
        """
        return ""

    @abc.abstractmethod
    def check(self, adapter: SavedAdapter, options: ExportOptions) -> None:
        """Refuses an adapter that the format cannot express, before any file is read.

        Raises:
          NotExpressible: the message names the feature and the reason.
          ConfigError: an option does not apply.
        """

    @abc.abstractmethod
    def prepare(self, adapter: SavedAdapter, options: ExportOptions) -> Export:
        """Runs the remaining checks and returns the export, not yet written.

        Args:
          adapter: an adapter that passed `check`.
          options: options of the export.

        Raises:
          CheckpointError: the export is not possible; the message says how to make it so.
        """


class AdapterFormat(Format):
    """A format that stores an adapter alone, in PEFT's folder, and can be imported.

    Attributes:
      peft_types: the values of `peft_type` that it reads.
      weights_file: name of the weights file that it writes.
    """

    peft_types: ClassVar[tuple[str, ...]]
    weights_file: ClassVar[str]

    @abc.abstractmethod
    def adapter_config(self, adapter: SavedAdapter, base: str) -> tuple[dict[str, Any], list[str]]:
        """The `adapter_config.json` to write, with its `peft_type`, and notes (`Export.notes`).

        Raises:
          NotExpressible: see `check`.
        """

    @abc.abstractmethod
    def parse_method(
        self, peft_type: str, fields: ConfigFields, source: AdapterFolder, model: ModelConfig
    ) -> AdapterMethod:
        """The method that computes what the adapter computes in its original tool.

        Args:
          peft_type: one of `peft_types`.
          fields: the configuration; fields that are not read here are refused afterwards.
          source: the adapter's folder.
          model: architecture of the base.

        Raises:
          CheckpointError, ConfigError: a field is missing or its value is not supported.
        """

    def check(self, adapter: SavedAdapter, options: ExportOptions) -> None:
        self.adapter_config(adapter, options.base)
        _require_unfused_projections(adapter)

    def prepare(self, adapter: SavedAdapter, options: ExportOptions) -> Export:
        config, notes = self.adapter_config(adapter, options.base)
        dtype = options.dtype or "float32"
        specs = expected_leaves(adapter.model, adapter.method)
        require_same_leaves(leaf_specs(adapter.tree), specs, "its weights")
        leaves = {path: np.asarray(leaf) for path, leaf in named_leaves(adapter.tree).items()}
        layout = adapter_tensors(specs, config["peft_type"], adapter.model)
        with np.errstate(over="ignore"):
            tensors = tensors_from_leaves(leaves, layout, jnp.dtype(dtype))
        for name, tensor in tensors.items():
            if not np.all(np.isfinite(tensor)):
                raise CheckpointError(
                    f"{name}: has values too large for {dtype}; use another dtype"
                )

        tokenizer = None
        if adapter.method.new_tokens:  # a hub id in `options.base` need not be downloaded
            former = Path(adapter.base.path).expanduser()
            folder = former if former.is_dir() else resolve_checkpoint(options.base)
            tokenizer = extended_tokenizer(adapter, folder)

        def write(folder: Path) -> ExportOutcome:
            write_adapter_folder(folder, config, tensors, self.weights_file)
            files = f"`{CONFIG_FILE}` and `{self.weights_file}`"
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
                files = f"`{CONFIG_FILE}`, `{self.weights_file}` and the tokenizer"
            return ExportOutcome(files, is_whole_model=False)

        # Names, shapes and file headers take a few hundred bytes a tensor; a tokenizer, about 60
        # bytes a token twice.
        size = sum(tensor.nbytes for tensor in tensors.values()) + 1024 * (len(tensors) + 16)
        size += 0 if tokenizer is None else 128 * len(tokenizer)
        return Export(size, dtype, write, notes)

    def read_leaves(
        self, fields: ConfigFields, source: AdapterFolder, method: AdapterMethod, base: BaseModel
    ) -> dict[str, np.ndarray]:
        """Leaves of the method by path, from the adapter's tensors.

        Args:
          fields: the configuration.
          source: the adapter's folder.
          method: from `parse_method`.
          base: the base; its weights are not loaded.

        Raises:
          CheckpointError: a tensor is missing, unexpected, of another shape, or not finite.
        """
        specs = expected_leaves(base.config, method)
        layout = adapter_tensors(specs, fields.take("peft_type", str), base.config)
        shapes = {tensor.name: tensor.shape for tensor in layout}
        require_tensors(source, shapes, base.path)
        return leaves_from_tensors(source.tensors, layout, specs)

    def read(self, source: AdapterFolder, base: BaseModel) -> tuple[AdapterMethod, dict[str, Any]]:
        """Reads the method and the weights of an adapter in this format.

        Args:
          source: a folder whose `peft_type` is one of `peft_types`.
          base: base that it was trained on.

        Raises:
          CheckpointError: the adapter does not belong to this base, or has unsupported settings.
        """
        fields = ConfigFields(source.config, str(source.config_file))
        try:
            peft_type = fields.choose("peft_type", self.peft_types)
            with located(str(source.config_file)):
                method = self.parse_method(peft_type, fields, source, base.config)
                method.check_model(base.config)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        fields.refuse_unread()
        leaves = self.read_leaves(fields, source, method, base)
        return method, nested_dict({path: jax.device_put(leaf) for path, leaf in leaves.items()})


def _require_unfused_projections(adapter: SavedAdapter) -> None:
    """Refuses targets that the base stores as part of a fused projection, as Phi-3 does.

    PEFT and MoE-PEFT adapt the modules of transformers by name. A pair on a part of a fused module
    is not a pair on the whole module.
    """
    for leaf in base_leaves(adapter.model):
        *_, target, name = leaf.path
        module = leaf.keys[0].split(".")[-2]
        if name == "kernel" and target in adapter.method.target_modules and module != target:
            raise NotExpressible(
                f"target_modules: {target!r} is no module of {adapter.model.model_type} in other "
                f"tools, but part of {module}; train without it"
            )
