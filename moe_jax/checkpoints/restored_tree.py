"""Reads trees of arrays that Orbax wrote, and checks every leaf."""

import asyncio
import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe_jax.checkpoints.leaves import checksums, leaf_specs, require_same_leaves
from moe_jax.errors import CheckpointError


class _ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Reads arrays; on an error, waits for the reads of the other arrays before it raises.

    Orbax alone would close its event loop while they are under way, and asyncio would print the
    outcome of each: up to a page for every array of the tree.
    """

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        # Tasks of the running event loop only, which Orbax creates for this read.
        other_tasks = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        except Exception:
            await asyncio.gather(*(asyncio.all_tasks() - other_tasks), return_exceptions=True)
            raise


def restore_tree(folder: Path, target: Any, sums: dict[str, int], advice: str) -> Any:
    """Reads a saved tree with the leaves of `target`.

    Args:
      folder: folder that Orbax wrote.
      target: nested dict of `ShapeDtypeStruct` with shardings.
      sums: `checksums` of the tree when it was saved.
      advice: remedy for a damaged folder, for the message.

    Raises:
      CheckpointError: the folder is missing or damaged, or its leaves, shapes or types differ.
    """
    require_same_leaves(read_leaf_specs(folder, advice), leaf_specs(target), str(folder))
    arguments: Any = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _ArrayHandler()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            tree = checkpointer.restore(folder.absolute(), args=arguments)
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            raise CheckpointError(
                f"{folder} is damaged ({error_summary(error)}); {advice}"
            ) from error
    if (actual := checksums(tree)) != sums:
        bad = next((path for path in actual if actual[path] != sums.get(path)), "its list of sums")
        raise CheckpointError(f"{folder} is damaged (checksum of {bad!r} differs); {advice}")
    return tree


def read_leaf_specs(folder: Path, advice: str) -> dict[str, Any]:
    """Shape and type of every leaf that Orbax wrote to `folder`; raises as `restore_tree` does."""
    try:
        # The handler itself, since the checkpointer turns its errors into an empty tree.
        path: Any = folder.absolute()  # annotated as etils' path; pathlib's works
        metadata = ocp.StandardCheckpointHandler().metadata(path)
        return leaf_specs(metadata.tree)
    except Exception as error:  # as in restore_tree
        raise CheckpointError(f"{folder} is damaged ({error_summary(error)}); {advice}") from error


def error_summary(error: BaseException) -> str:
    """First line of an error of Orbax or TensorStore, without their long details."""
    cause = error.__cause__ or error  # Orbax names the slice, its cause names the leaf
    text = str(cause).strip().partition(". See full")[0]  # before pages of TensorStore's settings
    text = re.sub(r'( in OCDBT database)? at local file "[^"]*"', "", text)  # the caller names it
    return text.splitlines()[0][:120] if text else type(error).__name__
