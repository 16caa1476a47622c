"""Extracts a LoRA from a base and a fully fine-tuned version of it.

For each targeted projection, the difference of the two weights is approximated by the nearest
matrix of rank R, from its singular value decomposition. Tensors are read one at a time from both
checkpoints, so memory holds a few matrices besides the adapter. All other weights (norms,
embeddings, the head, biases, other projections) have to be equal, or their differences are left out
explicitly.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.tree import TARGET_MODULES
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import located
from moe_jax.errors import CheckpointError
from moe_jax.files.folders import require_unused
from moe_jax.hf.base_model import open_base, resolve_checkpoint
from moe_jax.hf.config import read_model_config
from moe_jax.hf.key_table import Leaf
from moe_jax.hf.load import checked_leaves, read_leaf
from moe_jax.hf.shards import Shards, name_list, open_shards
from moe_jax.surgery.experts import Leaves
from moe_jax.surgery.outcome import SurgeryOutcome, new_adapter, save_outcome, tokenized_text
from moe_jax.surgery.truncation import NearestPair, nearest_pair, relative_error

_ROUNDING = 1e-6
"""Relative errors below this are rounding errors of float32 weights."""


def from_dense(
    base: str | Path,
    dense: str | Path,
    *,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] = TARGET_MODULES,
    leave_out: bool = False,
    seed: int = 0,
    data: str | Path | None = None,
    output: str | Path | None = None,
) -> SurgeryOutcome:
    """Extracts a LoRA from the difference of two checkpoints.

    Args:
      base: folder or hub id of the checkpoint before fine-tuning.
      dense: folder or hub id of the fine-tuned checkpoint, of the same architecture.
      rank: R.
      alpha: alpha of the LoRA; by default R, a scale of one. The weights are divided by the scale,
        so alpha matters for further training only.
      target_modules: projections that the LoRA adapts.
      leave_out: leaves out differences elsewhere and reports them; otherwise they are refused.
      seed: seed of A's columns beyond the rank of a difference; see `truncation`.
      data: a text file on which the LoRA is compared with the fine-tuned model.
      output: a folder for the adapter; does not exist, or is empty.

    Raises:
      UserError: a checkpoint is missing or damaged, the architectures differ, the checkpoints are
        equal, or other weights differ and `leave_out` is false.
    """
    if output is not None:
        require_unused(Path(output))
    with located("the new lora"):
        scale = float(rank if alpha is None else alpha)
        method = LoraConfig(rank=rank, alpha=scale, target_modules=tuple(target_modules))
    base_model, folders = open_base(base), [resolve_checkpoint(str(path)) for path in (base, dense)]
    model = _common_model(*folders)
    text = None if data is None else tokenized_text(Path(data), base_model)
    with open_shards(folders[0]) as first, open_shards(folders[1]) as second:
        checkpoints = _CheckpointPair(model, first, second)
        others = checkpoints.differences(method)
        if others and not leave_out:
            raise CheckpointError(
                f"{folders[1]}: also differs from the base in {name_list(list(others))}, which a "
                f"LoRA on {', '.join(method.target_modules)} cannot express; leave the difference "
                "out with --leave-out, or target the projection"
            )
        leaves, pairs = checkpoints.low_rank_leaves(method, np.random.default_rng(seed))
    all_pairs = [pair for layers in pairs.values() for pair in layers]
    if not any(pair.square for pair in all_pairs):
        raise CheckpointError(
            f"{folders[1]}: does not differ from the base in {', '.join(method.target_modules)}; "
            "give a checkpoint that was fine-tuned"
        )
    result = new_adapter(method, leaves, model, base_model.identity, 0)
    errors = {name: relative_error(layers) for name, layers in pairs.items()}
    overall = relative_error(all_pairs)
    notes = _notes(overall, others, rank)
    notes += [_projection_note(name, layers) for name, layers in pairs.items()]
    change = None
    if text is not None:
        change = text.measurement(result).logit_change_from(folders[1])
        notes.append(text.describe(change, "the fine-tuned model"))
    exact = overall < _ROUNDING and not others
    return save_outcome(SurgeryOutcome(result, exact, notes, change, errors), output)


class _CheckpointPair:
    """Two open checkpoints of one architecture, compared leaf by leaf."""

    def __init__(self, model: ModelConfig, base: Shards, dense: Shards):
        self._base, self._dense = base, dense
        dense_leaves = {leaf.path: leaf for leaf in checked_leaves(dense, model)}
        self._leaves = [(leaf, dense_leaves[leaf.path]) for leaf in checked_leaves(base, model)]

    def differences(self, method: LoraConfig) -> dict[str, float]:
        """Relative differences of tensors that the LoRA cannot express, by name."""
        errors = {}
        for leaf, other in self._leaves:
            if _target(leaf) in method.target_modules:
                continue
            for layer, name in enumerate(leaf.keys):
                index = layer if leaf.stacked else None
                before, difference = self._difference(leaf, other, index)
                if difference.any():
                    norm = float(np.linalg.norm(before))
                    size = float(np.linalg.norm(difference))
                    # A fused tensor holds several leaves; report the largest difference.
                    errors[name] = max(size / norm if norm else math.inf, errors.get(name, 0.0))
        return errors

    def low_rank_leaves(
        self, method: LoraConfig, rng: np.random.Generator
    ) -> tuple[Leaves, dict[str, list[NearestPair]]]:
        """Leaves of the LoRA, and the pairs of each projection with their errors, by layer."""
        leaves, pairs = {}, {}
        for leaf, other in self._leaves:
            target = _target(leaf)
            if target not in method.target_modules:
                continue
            layers = []
            for layer in range(len(leaf.keys)):
                _, difference = self._difference(leaf, other, layer)
                layers.append(nearest_pair(difference / method.scale, method.rank, rng))
            site = "/".join(leaf.path[:-1])
            leaves[f"{site}/lora_A"] = np.stack([pair.lora_a for pair in layers])
            leaves[f"{site}/lora_B"] = np.stack([pair.lora_b for pair in layers])
            pairs["/".join(leaf.path[1:-1])] = layers
        return leaves, pairs

    def _difference(
        self, leaf: Leaf, other: Leaf, layer: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The base's array and the difference of the fine-tuned one, float32."""
        before = read_leaf(leaf, self._base, np.dtype(np.float32), layer)
        difference = read_leaf(other, self._dense, np.dtype(np.float32), layer)
        difference -= before
        if not np.isfinite(difference).all():
            name = leaf.keys[layer or 0]
            raise CheckpointError(
                f"{name}: is not finite in {self._base.folder} or {self._dense.folder}; give "
                "checkpoints with finite weights"
            )
        return before, difference


def _target(leaf: Leaf) -> str | None:
    """The projection whose kernel is the leaf; None for other leaves."""
    return leaf.path[-2] if leaf.path[-1] == "kernel" and leaf.stacked else None


def _common_model(base: Path, dense: Path) -> ModelConfig:
    """The common architecture of two checkpoints."""
    model, other = read_model_config(base), read_model_config(dense)
    for name, value in vars(model).items():
        if vars(other)[name] != value:
            raise CheckpointError(
                f"{dense}: {name} is {vars(other)[name]!r}, but {value!r} in {base}; give a "
                "checkpoint that was fine-tuned from this base"
            )
    return model


def _notes(overall: float, others: dict[str, float], rank: int) -> list[str]:
    if overall >= _ROUNDING:
        notes = [f"not exact: rank {rank} has a relative error of {overall:.3g} over all changes"]
    elif others:
        notes = [f"not exact: other weights differ; the projections have at most rank {rank}"]
    else:
        notes = [f"exact, up to rounding: the differences have at most rank {rank}"]
    if others:
        largest = max(others, key=others.__getitem__)
        notes.append(
            f"left out: {name_list(list(others))}, relative difference up to {others[largest]:.3g} "
            f"({largest})"
        )
    return notes


def _projection_note(name: str, pairs: list[NearestPair]) -> str:
    layers = [relative_error([pair]) for pair in pairs]
    return (
        f"{name}: relative error {relative_error(pairs):.3g} "
        f"({min(layers):.3g} to {max(layers):.3g} per layer)"
    )
