"""One of two processes that save a sharded state; started by test_two_process_store.py.

python two_process_store.py PORT PROCESS_ID FOLDER
"""

import os
import sys
from pathlib import Path

port, process_id, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
os.environ["JAX_PLATFORMS"] = "cpu"

from xla_flags import xla_flags  # noqa: E402

os.environ["XLA_FLAGS"] = xla_flags(devices=1)

import jax  # noqa: E402

jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process_id)

import numpy as np  # noqa: E402
from damage import cut  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from moe_jax.checkpoints.store import TrainingStore, newest_intact_step  # noqa: E402
from moe_jax.training.run.workdir import intact_step  # noqa: E402

sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
with TrainingStore(folder, every=1, keep=3) as store:
    for step in (1, 2):
        values = np.arange(8, dtype=np.float32) * step
        array = jax.make_array_from_callback((8,), sharding, values.__getitem__)
        tree = {"a": {"w": array}}
        store.save(step, adapters=tree, optimizer=tree, data={}, metadata={})
    store.wait()
    assert newest_intact_step(folder) == (2, {})
multihost_utils.sync_global_devices("checked")
if process_id == 1:  # the other one notices
    cut(folder / "2" / "data" / "metadata")
multihost_utils.sync_global_devices("damaged")
said: list[str] = []
print(intact_step(folder, said.append, fall_back=True), len(said))
