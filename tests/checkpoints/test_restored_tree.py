"""A tree that cannot be read is refused in one line."""

import re
import subprocess
import sys

DAMAGED = """
import gc, pathlib, sys
import jax
import orbax.checkpoint as ocp
from moe_jax.checkpoints.leaves import checksums
from moe_jax.checkpoints.restored_tree import restore_tree
from moe_jax.errors import CheckpointError

folder = pathlib.Path(sys.argv[1])
keys = jax.random.split(jax.random.key(0), 40)
tree = {str(i): jax.random.normal(key, (64, 64)) for i, key in enumerate(keys)}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, tree)
for file in (folder / "ocdbt.process_0" / "d").iterdir():
    file.write_bytes(file.read_bytes()[:100])
target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
for _ in range(20):
    try:
        restore_tree(folder, target, checksums(tree), "delete it")
    except CheckpointError as error:
        print(error)
    gc.collect()
"""


def test_failed_reads_print_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DAMAGED, tmp_path / "tree"],
        capture_output=True,
        text=True,
        check=False,
    )
    refusals = done.stdout.splitlines()
    assert len(refusals) == 20
    leaf = rf'^{re.escape(str(tmp_path))}/tree is damaged \(OUT_OF_RANGE: Error \w+ "\d+/0\.0": .*'
    assert all(re.search(leaf + "; delete it$", refusal) for refusal in refusals), refusals
    assert done.stderr == ""
