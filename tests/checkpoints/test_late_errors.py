"""Late errors of Orbax's failed writes are not printed by programs; other reports are."""

import asyncio
import gc
import logging
import subprocess
import sys

import pytest

from moe_jax.checkpoints.late_errors import register_folder, silence_late_errors

REFUSED = """
import gc, pathlib, resource, signal, sys
from moe_jax.checkpoints.late_errors import register_folder, silence_late_errors

silence_late_errors()  # before the import of Orbax, as in commands
import jax
import orbax.checkpoint as ocp

folder = pathlib.Path(sys.argv[1])
register_folder(folder)
keys = jax.random.split(jax.random.key(0), 40)
tree = {str(i): jax.random.normal(key, (64, 64)) for i, key in enumerate(keys)}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # longer files raise an error
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
    """Leaves a failed future that is never awaited to asyncio, as TensorStore does."""
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(error)
    loop.close()
    gc.collect()


@pytest.mark.parametrize(("named", "printed"), [("mine/adapters", 0), ("another", 1)])
def test_a_future_without_a_traceback(named, printed, tmp_path, caplog, monkeypatch):
    for name in ("absl", "asyncio"):  # removed again after the test
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    register_folder(tmp_path / "mine")
    silence_late_errors.__wrapped__()
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
def test_reports_of_other_code_are_printed(error):
    program = f"""
import pathlib
from moe_jax.checkpoints.late_errors import register_folder, silence_late_errors

class Others:
    def __del__(self):
        raise RuntimeError({error})

register_folder(pathlib.Path("mine"))
silence_late_errors()
Others()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "Exception ignored in: <function Others.__del__" in done.stderr
    assert error.strip("'") in done.stderr


LIBRARY = """
import logging, pathlib, sys
import jax.numpy as jnp
import moe_jax
from moe_jax.adapters import LoraConfig
from moe_jax.checkpoints.adapter_files import SavedAdapter, load_adapter, save_adapter
from moe_jax.checkpoints.store import TrainingStore
from moe_jax.hf.base_model import open_base

def hooks():
    return [sys.unraisablehook, sys.excepthook, *(
        list(logging.getLogger(name).filters) for name in ("absl", "asyncio", None)
    )]

before = hooks()
folder = pathlib.Path(sys.argv[1])
base = open_base("moe_jax/demo/base")
tree = {"layers": {"a": jnp.ones((2, 2))}}
adapter = SavedAdapter(
    LoraConfig(rank=2, alpha=2.0, target_modules=("q_proj",)), tree, base.config, base.identity, 1
)
save_adapter(folder / "adapter", adapter)
load_adapter(folder / "adapter")
with TrainingStore(folder / "states", every=1, keep=1) as store:
    store.save(1, adapters=tree, optimizer=tree, data={}, metadata={})
print(hooks() == before)
"""


def test_the_library_leaves_hooks_and_logging_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stdout == "True\n", done.stderr
