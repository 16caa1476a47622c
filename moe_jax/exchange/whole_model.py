"""What the formats have in common that write a whole model, and not an adapter alone."""

import abc
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ModelConfig
from moe_jax.exchange.format import Export, ExportOptions, ExportOutcome, Format
from moe_jax.exchange.merging import Merger, open_merger
from moe_jax.exchange.sharded_writer import LazyTensor, weights_bytes, write_weights
from moe_jax.hf.key_table import TensorParts, tensor_parts
from moe_jax.loaded.base_folder import BaseFolder, find_base

_CONFIG = "config.json"

# What stands beside the weights of a checkpoint and goes with the model.
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)

_TOKENIZERS = ("tokenizer", "vocab.json", "spiece.model")


class Recipe(NamedTuple):
    """A tensor of the checkpoint to be written.

    Attributes:
      name: in the checkpoint.
      shape: as stored.
      make: makes it.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[Merger], np.ndarray]


class Plan(NamedTuple):
    """How an adapter and its base become another checkpoint.

    Attributes:
      config: its `config.json`, but for the type of its tensors.
      recipes: its tensors, layer by layer.
      approximation: in what it departs from the adapter on its base, for the model card; None if
        the two compute the same.
      measure: given the folder with the finished weights, the KL divergence from the exact model in
        nats per token; None if it is not asked for.
    """

    config: dict[str, Any]
    recipes: list[Recipe]
    approximation: str | None = None
    measure: Callable[[Path], float] | None = None


class ModelFormat(Format):
    """A format that holds a base and an adapter as one model, in Hugging Face's folder.

    Memory holds a few copies of one matrix while it is written.
    """

    library = "transformers"

    def loading(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{options.name}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{options.name}")'
        )

    @abc.abstractmethod
    def plan(
        self,
        adapter: SavedAdapter,
        base: BaseFolder,
        config: dict[str, Any],
        options: ExportOptions,
    ) -> Plan:
        """Decides what is written.

        Args:
          adapter: passed `check`; its weights are those of its method.
          base: the base that it was trained on.
          config: the base's `config.json`.
          options: of the export.

        Raises:
          CheckpointError: as in `Format.prepare`.
        """

    def prepare(self, adapter: SavedAdapter, options: ExportOptions) -> Export:
        base = find_base(adapter, options.base)
        stated = json.loads((base.folder / _CONFIG).read_text(encoding="utf-8"))
        plan = self.plan(adapter, base, stated, options)
        # Under both of the names that versions of transformers know it by.
        config = {**plan.config, "dtype": options.dtype, "torch_dtype": options.dtype}
        copied = {f for pattern in _COPIED for f in base.folder.glob(pattern) if f.is_file()}
        notes: list[str] = []
        if not any(file.name.startswith(_TOKENIZERS) for file in copied):
            notes.append("no tokenizer: the base's folder holds none; copy one beside the model")

        def write(folder: Path) -> ExportOutcome:
            (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for file in sorted(copied):
                shutil.copyfile(file, folder / file.name)
            with open_merger(base, adapter) as merger:
                tensors = [
                    LazyTensor(name, shape, functools.partial(make, merger))
                    for name, shape, make in plan.recipes
                ]
                write_weights(folder, tensors, options.dtype)
            divergence = None if plan.measure is None else plan.measure(folder)
            if divergence is not None:
                notes.append(
                    f"KL divergence from the exact model, measured: {divergence:.4g} nats per token"
                )
            product = f"a `{config['architectures'][0]}`"
            return ExportOutcome(product, True, plan.approximation, divergence)

        size = weights_bytes([recipe.shape for recipe in plan.recipes], options.dtype)
        size += sum(file.stat().st_size for file in copied) + 2**16
        return Export(size, write, notes)


def base_tensors(model: ModelConfig) -> list[tuple[str, TensorParts]]:
    """A base's tensors: those outside its layers, then layer by layer."""

    def layer(item: tuple[str, TensorParts]) -> int:
        leaf, index = item[1][0]
        return index if leaf.stacked else -1

    return sorted(tensor_parts(model).items(), key=layer)


def stored_shape(parts: TensorParts) -> tuple[int, ...]:
    """The shape of a base's tensor as it is stored."""
    return parts[0][0].tensor_shape


def as_stored(parts: TensorParts, make: Callable[[str, int], np.ndarray]) -> np.ndarray:
    """A base's tensor as it is stored, of its leaves.

    Args:
      parts: its entry in `tensor_parts`.
      make: makes a leaf of its path and layer, as `Merger.merged` does.
    """
    arrays = []
    for leaf, layer in parts:
        array = make("/".join(leaf.path), layer)
        arrays.append(array.T if leaf.transposed else array)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
