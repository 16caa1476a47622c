"""Trees of arrays that Orbax wrote, read back and checked leaf for leaf."""

import asyncio
import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe_jax.checkpoints.leaves import checksums, leaf_specs, require_same_leaves
from moe_jax.errors import CheckpointError


class _PatientHandler(ocp.type_handlers.ArrayHandler):
    """Reads arrays; when one cannot be read, lets the reads of the others end before it raises.

    Orbax would close its event loop while they are under way, and asyncio would print what
    becomes of each: up to a page for every array of the tree.
    """

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        except Exception:
            await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
            raise


def restore_tree(folder: Path, target: Any, sums: dict[str, int], advice: str) -> Any:
    """Reads one saved tree as `target`, leaf for leaf.

    Args:
      folder: where Orbax wrote the tree.
      target: a nested dict of `ShapeDtypeStruct`, with shardings where arrays are to be placed.
      sums: the `checksums` of the tree when it was saved.
      advice: what to do if it cannot be read, for the message.

    Raises:
      CheckpointError: missing, damaged, or not exactly these leaves, shapes and types.
    """
    require_same_leaves(read_leaf_specs(folder, advice), leaf_specs(target), str(folder))
    arguments: Any = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _PatientHandler()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            tree = checkpointer.restore(folder.absolute(), args=arguments)
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            raise CheckpointError(f"{folder} is damaged ({first_line(error)}); {advice}") from error
    if (found := checksums(tree)) != sums:
        bad = next((path for path in found if found[path] != sums.get(path)), "its list of sums")
        raise CheckpointError(f"{folder} is damaged (checksum of {bad!r} differs); {advice}")
    return tree


def read_leaf_specs(folder: Path, advice: str) -> dict[str, Any]:
    """Shape and dtype of every leaf that Orbax wrote to `folder`; errors as in `restore_tree`."""
    try:
        # The handler itself: the checkpointer around it turns its errors into an empty tree.
        path: Any = folder.absolute()  # typed as etils' path, but any will do
        metadata = ocp.StandardCheckpointHandler().metadata(path)
        return leaf_specs(metadata.tree)
    except Exception as error:  # see restore_tree
        raise CheckpointError(f"{folder} is damaged ({first_line(error)}); {advice}") from error


def first_line(error: BaseException) -> str:
    """What Orbax or TensorStore says is wrong, without the pages that follow it."""
    cause = error.__cause__ or error  # Orbax names the slice, TensorStore's cause names the leaf
    text = str(cause).strip().partition(". See full")[0]  # which is pages of TensorStore's settings
    text = re.sub(r'( in OCDBT database)? at local file "[^"]*"', "", text)  # the caller names it
    return text.splitlines()[0][:120] if text else type(error).__name__
