"""One of two processes that train together; started by test_two_processes.py.

python two_processes.py PORT PROCESS_ID OUTPUT
"""

import json
import os
import sys

port, process_id, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.environ["JAX_PLATFORMS"] = "cpu"

from xla_flags import xla_flags  # noqa: E402

os.environ["XLA_FLAGS"] = xla_flags(devices=4)

import jax  # noqa: E402

jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process_id)

import numpy as np  # noqa: E402
import tiny_program  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from test_two_processes import METHOD, MODEL, ROWS  # noqa: E402

program = tiny_program.program(
    {"default": METHOD}, rows=ROWS, mesh={"data": 2, "fsdp": 4}, config=MODEL
)
assert jax.process_count() == 2 and jax.device_count() == 8
params = tiny_program.random_params(program)
state = program.init_state(params).replace(adapters=tiny_program.random_adapters(program))
before = multihost_utils.process_allgather(state.adapters, tiled=True)
state, metrics = program.train_step(
    state, params, program.put_train_batch(tiny_program.random_batch(ROWS))
)
after = multihost_utils.process_allgather(state.adapters, tiled=True)
if process_id == 0:
    leaves = jax.tree.leaves(jax.tree.map(lambda old, new: old - new, before, after))
    np.savez(output, *leaves)
    print(json.dumps({name: np.asarray(value).tolist() for name, value in metrics.items()}))
