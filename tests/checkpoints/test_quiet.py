"""What Orbax leaves behind when a write fails is not printed; what others leave behind is."""

import asyncio
import gc
import logging
import subprocess
import sys

import pytest

from moe_jax.checkpoints.quiet import quiet_orbax

REFUSED = """
import gc, pathlib, resource, signal, sys
import jax
import orbax.checkpoint as ocp
from moe_jax.checkpoints.quiet import quiet_orbax

folder = pathlib.Path(sys.argv[1])
quiet_orbax(folder)
keys = jax.random.split(jax.random.key(0), 40)
tree = {str(i): jax.random.normal(key, (64, 64)) for i, key in enumerate(keys)}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # what is longer is an error, and not the end
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for number in range(5):
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / str(number), tree)
    except ValueError:
        print("refused")
    gc.collect()
"""


def abandon(error):
    """Lets asyncio find a future that failed and that nobody waited for, as TensorStore leaves."""
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(error)
    loop.close()
    gc.collect()


@pytest.mark.parametrize(("named", "printed"), [("mine/adapters", 0), ("another", 1)])
def test_a_future_without_a_traceback(named, printed, tmp_path, caplog):
    quiet_orbax(tmp_path / "mine")
    with caplog.at_level(logging.ERROR, "asyncio"):
        abandon(ValueError(f'OUT_OF_RANGE: error writing local file "{tmp_path}/{named}/"'))
    assert len(caplog.records) == printed
    assert all(record.msg.startswith("Future exception") for record in caplog.records)


def test_failed_writes_print_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["refused"] * 5
    assert done.stderr == ""


@pytest.mark.parametrize("error", ["'Event loop is closed'", "'spilled'"])
def test_what_others_leave_is_printed(error):
    program = f"""
import pathlib
from moe_jax.checkpoints.quiet import quiet_orbax

class Others:
    def __del__(self):
        raise RuntimeError({error})

quiet_orbax(pathlib.Path("mine"))
Others()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "Exception ignored in: <function Others.__del__" in done.stderr
    assert error.strip("'") in done.stderr
