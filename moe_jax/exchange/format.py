"""What a format has to provide.

A format is one file of this package: a class derived from `Format`, or from `AdapterFormat` if
adapters are read from it too, decorated with `@FORMATS.register("its_name")`, and one line in the
package's `__init__`.
"""

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
from moe_jax.checkpoints.leaves import leaf_specs, named_leaves, nested, require_same_leaves
from moe_jax.config.model import FloatType, ModelConfig
from moe_jax.config.parse import Registry, located
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.exchange.adapter_folder import (
    CONFIG,
    AdapterFolder,
    Fields,
    require_tensors,
    tensor_parts,
    to_leaves,
    to_tensors,
    write_adapter_folder,
)
from moe_jax.hf.key_table import base_leaves
from moe_jax.loaded.expected_leaves import expected_leaves

FORMATS = Registry("format")
"""The formats by the name that `moe-jax export --to NAME` gives."""


class NotExpressible(CheckpointError):
    """An adapter is nothing for a format; `exchange.export_adapter` adds which ones it is for."""


def cannot(format_name: str, feature: str, reason: str) -> NotExpressible:
    """The error for an adapter that a format cannot express."""
    return NotExpressible(f"the {format_name} format cannot express {feature}; {reason}")


def field_names(cls: Any) -> tuple[str, ...]:
    """The fields of a dataclass, to be named as known."""
    return tuple(field.name for field in dataclasses.fields(cls))


def require_known(config: Any, known: Collection[str], where: str, format_name: str) -> None:
    """Refuses fields of a method or router that a format knows nothing of.

    So that a field that is added one day is not dropped in silence: until its meaning in the format
    has been thought of, it must have its default.

    Args:
      config: the method or router.
      known: the fields that the format writes, refuses itself, or leaves out on purpose.
      where: in front of a field's name in messages.
      format_name: for messages.

    Raises:
      CheckpointError: another field has a value that is not its default.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in known and value != field.default:
            raise cannot(format_name, f"{where}{field.name} {value!r}", "train without it")


Weighting = Literal["average", "utilisation"]
"""How experts become one: all alike, or each by its share of the tokens."""


class ExportOptions(NamedTuple):
    """What is asked of an export.

    Attributes:
      base: the base's folder or hub id, as the receiving tool will know it; where a whole model is
        written, it is read from there.
      dtype: the type of the tensors that are written.
      weights: how experts are merged where they are; None leaves it to the format.
      tokens: int [N, S], what a merged model is measured on; None where nothing is measured.
      data_name: what the tokens are called in messages.
      name: where the receiving tool will find the export: its folder, or `OWNER/NAME` on the hub.
    """

    base: str
    dtype: FloatType
    weights: Weighting | None = None
    tokens: np.ndarray | None = None
    data_name: str = ""
    name: str = "exported"


class ExportOutcome(NamedTuple):
    """What came of an export.

    Attributes:
      product: what was written, in words.
      whole: whether that is a model that needs no base beside it.
      approximation: in what it departs from the adapter on its base; None if in nothing.
      divergence: KL from the exact model, in nats per token; None if it was not measured.
    """

    product: str
    whole: bool
    approximation: str | None = None
    divergence: float | None = None


class Export(NamedTuple):
    """An export that is known to be possible, before anything is written.

    Attributes:
      num_bytes: that it takes on the disk, at most.
      write: fills the empty folder that it is given; it may add notes.
      notes: what the format leaves out or states in another way, one sentence each, for the user.
    """

    num_bytes: int
    write: Callable[[Path], ExportOutcome]
    notes: list[str]


class Format(abc.ABC):
    """A format that adapters are written in.

    Attributes:
      measures: whether it has a use for `ExportOptions.weights` and `tokens`.
      classifies: whether it expresses a score head.
      library: what loads it, as the hub calls it; empty if the hub knows no name for that.
    """

    measures: ClassVar[bool] = False
    classifies: ClassVar[bool] = False
    library: ClassVar[str] = ""

    def loading(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        """A few lines of Python that load the export, for its model card; empty if there are none.

        Args:
          adapter: what was exported.
          options: of the export.
        """
        return ""

    @abc.abstractmethod
    def check(self, adapter: SavedAdapter, options: ExportOptions) -> None:
        """Refuses an adapter that the format cannot express, before any file is read.

        Raises:
          NotExpressible: it cannot; the message names the feature and says why.
          ConfigError: an option is of no use.
        """

    @abc.abstractmethod
    def prepare(self, adapter: SavedAdapter, options: ExportOptions) -> Export:
        """Finds everything else that stands in the way of an export.

        Args:
          adapter: passed `check`.
          options: of the export.

        Raises:
          CheckpointError: something does; the message says what to do about it.
        """


class AdapterFormat(Format):
    """A format that holds adapters alone, in the folder of PEFT, and is read too.

    Attributes:
      reads: the `peft_type`s that it reads.
      weights_file: the file of weights that it writes.
    """

    reads: ClassVar[tuple[str, ...]]
    weights_file: ClassVar[str]

    @abc.abstractmethod
    def config_of(self, adapter: SavedAdapter, base: str) -> tuple[dict[str, Any], list[str]]:
        """The configuration that is written, with its `peft_type`, and notes; see `Export.notes`.

        Raises:
          NotExpressible: as in `check`.
        """

    @abc.abstractmethod
    def method_of(
        self, peft_type: str, fields: Fields, source: AdapterFolder, model: ModelConfig
    ) -> AdapterMethod:
        """The method that computes what the adapter computes in the tool that it comes from.

        Args:
          peft_type: one of `reads`.
          fields: of the configuration; what is not asked for here is refused.
          source: the rest of the adapter.
          model: the base.

        Raises:
          CheckpointError, ConfigError: a field is missing or asks for what is not supported.
        """

    def check(self, adapter: SavedAdapter, options: ExportOptions) -> None:
        self.config_of(adapter, options.base)
        _require_own_projections(adapter)

    def prepare(self, adapter: SavedAdapter, options: ExportOptions) -> Export:
        config, notes = self.config_of(adapter, options.base)
        leaves = expected_leaves(adapter.model, adapter.method)
        require_same_leaves(leaf_specs(adapter.tree), leaves, "its weights")
        values = {path: np.asarray(leaf) for path, leaf in named_leaves(adapter.tree).items()}
        parts = tensor_parts(leaves, config["peft_type"])
        with np.errstate(over="ignore"):
            tensors = to_tensors(values, parts, jnp.dtype(options.dtype))
        for name, tensor in tensors.items():
            if not np.all(np.isfinite(tensor)):
                raise CheckpointError(
                    f"{name}: has values too large for {options.dtype}; use another dtype"
                )

        def write(folder: Path) -> ExportOutcome:
            write_adapter_folder(folder, config, tensors, self.weights_file)
            return ExportOutcome(f"`{CONFIG}` and `{self.weights_file}`", whole=False)

        # Names, shapes and the frame of the files take a few hundred bytes a tensor.
        size = sum(tensor.nbytes for tensor in tensors.values()) + 1024 * (len(tensors) + 16)
        return Export(size, write, notes)

    def read(
        self, source: AdapterFolder, model: ModelConfig, base: str
    ) -> tuple[AdapterMethod, dict[str, Any]]:
        """The method and the weights of an adapter of this format.

        Args:
          source: its `peft_type` is one of `reads`.
          model: the architecture of the base.
          base: the base, for messages.

        Raises:
          CheckpointError: the adapter is not of this base, or not what this format can be read as.
        """
        fields = Fields(source.config, str(source.config_file))
        try:
            peft_type = fields.choose("peft_type", self.reads)
            with located(str(source.config_file)):
                method = self.method_of(peft_type, fields, source, model)
                method.check_model(model)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        fields.finish()
        leaves = expected_leaves(model, method)
        parts = tensor_parts(leaves, peft_type)
        require_tensors(source, {part.name: part.shape for part in parts}, base)
        values = to_leaves(source.tensors, parts, leaves)
        return method, nested({path: jax.device_put(value) for path, value in values.items()})


def _require_own_projections(adapter: SavedAdapter) -> None:
    """Refuses targets that the base's checkpoint stores fused with others, as Phi-3 does.

    PEFT and MoE-PEFT adapt the modules that transformers has, by their names. A pair on a part of
    one of them is no pair of the whole.
    """
    for leaf in base_leaves(adapter.model):
        *_, target, name = leaf.path
        module = leaf.keys[0].split(".")[-2]
        if name == "kernel" and target in adapter.method.target_modules and module != target:
            raise NotExpressible(
                f"target_modules: {target!r} is no module of a {adapter.model.model_type} in other "
                f"tools, but a part of {module}; leave it out in training"
            )
