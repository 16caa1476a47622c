"""A model that was fine-tuned as a whole becomes a LoRA on the base that it began from.

For each targeted projection, the difference of the two weights is brought to rank R by its singular
value decomposition: nothing of that rank is nearer to it. Tensors are read one after the other from
both checkpoints, so that memory holds a few matrices beside the adapter. What an adapter has no
place for (norms, embeddings, the head, biases, projections that are not targeted) has to be equal,
or be left out on purpose.
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
from moe_jax.surgery.outcome import SurgeryOutcome, finished, new_adapter, text_rows
from moe_jax.surgery.truncation import Truncated, relative_error, truncated

_ROUNDING = 1e-6
"""A relative error of the weights' difference that float32 has anyway."""


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
    """Makes a LoRA of the difference of two checkpoints.

    Args:
      base: the checkpoint that fine-tuning began from, a folder or a hub id.
      dense: the fine-tuned one, of the same architecture.
      rank: R.
      alpha: of the LoRA; by default R, which scales its product by one. The weights are divided by
        the scale, so that it only matters for further training.
      target_modules: the projections that the LoRA has.
      leave_out: leaves out what differs elsewhere, and says how much; without, it is refused.
      seed: for directions that a difference leaves open; see `truncation`.
      data: a file of text on which the LoRA is compared with the fine-tuned model.
      output: where the adapter is written too; does not exist yet, or is empty.

    Raises:
      UserError: a checkpoint is missing or damaged, they are not of one architecture, do not
        differ, or differ in what an adapter has no place for.
    """
    if output is not None:
        require_unused(Path(output))
    with located("the new lora"):
        scale = float(rank if alpha is None else alpha)
        method = LoraConfig(rank=rank, alpha=scale, target_modules=tuple(target_modules))
    frozen, folders = open_base(base), [resolve_checkpoint(str(path)) for path in (base, dense)]
    model = _common_model(*folders)
    text = None if data is None else text_rows(Path(data), frozen)
    with open_shards(folders[0]) as first, open_shards(folders[1]) as second:
        pair = _CheckpointPair(model, first, second)
        others = pair.differences(method)
        if others and not leave_out:
            raise CheckpointError(
                f"{folders[1]}: also differs from the base in {name_list(list(others))}, which a LoRA "
                f"on {', '.join(method.target_modules)} has no place for; leave that out with "
                "--leave-out, or target the projection"
            )
        leaves, parts = pair.low_rank_leaves(method, np.random.default_rng(seed))
    every = [part for own in parts.values() for part in own]
    if not any(part.square for part in every):
        raise CheckpointError(
            f"{folders[1]}: does not differ from the base in {', '.join(method.target_modules)}; "
            "give a checkpoint that was fine-tuned"
        )
    result = new_adapter(method, leaves, model, frozen.identity, 0)
    errors = {name: relative_error(own) for name, own in parts.items()}
    overall = relative_error(every)
    notes = _notes(overall, others, rank)
    notes += [_of_module(name, own) for name, own in parts.items()]
    change = None
    if text is not None:
        change = text.measuring(result).change_from(folders[1])
        notes.append(text.describe(change, "the fine-tuned model"))
    exact = overall < _ROUNDING and not others
    return finished(SurgeryOutcome(result, exact, notes, change, errors), output)


class _CheckpointPair:
    """Two open checkpoints of one architecture, compared leaf by leaf."""

    def __init__(self, model: ModelConfig, base: Shards, dense: Shards):
        self._num_layers = model.num_layers
        self._base, self._dense = base, dense
        names = {leaf.path: leaf for leaf in checked_leaves(dense, model)}
        self._leaves = [(leaf, names[leaf.path]) for leaf in checked_leaves(base, model)]

    def differences(self, method: LoraConfig) -> dict[str, float]:
        """Tensors that differ and have no place in the LoRA, with their relative difference."""
        found = {}
        for leaf, other in self._leaves:
            if _target(leaf) in method.target_modules:
                continue
            for layer, name in enumerate(leaf.keys):
                at = layer if leaf.stacked else None
                before, difference = self._difference(leaf, other, at)
                if difference.any():
                    norm = float(np.linalg.norm(before))
                    size = float(np.linalg.norm(difference))
                    # Of a tensor that holds several leaves, the one that differs most.
                    found[name] = max(size / norm if norm else math.inf, found.get(name, 0.0))
        return found

    def low_rank_leaves(
        self, method: LoraConfig, rng: np.random.Generator
    ) -> tuple[Leaves, dict[str, list[Truncated]]]:
        """The LoRA's leaves, and what was cut off of each projection, layer by layer."""
        leaves, parts = {}, {}
        for leaf, other in self._leaves:
            target = _target(leaf)
            if target not in method.target_modules:
                continue
            own = []
            for layer in range(self._num_layers):
                _, difference = self._difference(leaf, other, layer)
                own.append(truncated(difference / method.scale, method.rank, rng))
            site = "/".join(leaf.path[:-1])
            leaves[f"{site}/lora_A"] = np.stack([part.lora_a for part in own])
            leaves[f"{site}/lora_B"] = np.stack([part.lora_b for part in own])
            parts["/".join(leaf.path[1:-1])] = own
        return leaves, parts

    def _difference(
        self, leaf: Leaf, other: Leaf, layer: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The base's array, and what is to be added to it; both float32."""
        before = read_leaf(leaf, self._base, np.dtype(np.float32), layer)
        difference = read_leaf(other, self._dense, np.dtype(np.float32), layer)
        difference -= before
        if not np.isfinite(difference).all():
            name = leaf.keys[layer or 0]
            raise CheckpointError(
                f"{name}: is not finite in {self._base.folder} or {self._dense.folder}; give "
                "checkpoints whose weights are numbers"
            )
        return before, difference


def _target(leaf: Leaf) -> str | None:
    """The projection whose kernel the leaf is; None if it is something else."""
    return leaf.path[-2] if leaf.path[-1] == "kernel" and leaf.stacked else None


def _common_model(base: Path, dense: Path) -> ModelConfig:
    """The architecture of two checkpoints, which must be the same."""
    model, other = read_model_config(base), read_model_config(dense)
    for name, value in vars(model).items():
        if vars(other)[name] != value:
            raise CheckpointError(
                f"{dense}: {name} is {vars(other)[name]!r}, but {value!r} in {base}; give a "
                "checkpoint that was fine-tuned from this base"
            )
    return model


def _notes(overall: float, others: dict[str, float], rank: int) -> list[str]:
    if overall < _ROUNDING:
        notes = [f"exact, up to rounding: the differences have no more than rank {rank}"]
    else:
        notes = [f"not exact: rank {rank} leaves a relative error of {overall:.3g} of all changes"]
    if others:
        notes[0] = notes[0].replace("exact, up to rounding: ", "not exact as a whole: ")
        most = max(others, key=others.__getitem__)
        notes.append(
            f"left out: {name_list(list(others))}, relative difference up to {others[most]:.3g} "
            f"({most})"
        )
    return notes


def _of_module(name: str, parts: list[Truncated]) -> str:
    layers = [relative_error([part]) for part in parts]
    return (
        f"{name}: relative error {relative_error(parts):.3g} "
        f"({min(layers):.3g} to {max(layers):.3g} in a layer)"
    )
