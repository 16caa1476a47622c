"""The machine that all tests see: eight CPU devices, no network, state in a temporary folder only.

The environment is set while this file is imported, before anything imports jax, transformers or
datasets, and so reaches the processes that tests start too.
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path

from xla_flags import xla_flags

DEVICES = 8
LONGEST = ("demo", "notebooks", "training", "evaluation", "inference", "sharding", "surgery")

# `MOE_JAX_TEST_PLATFORMS=cuda,cpu` computes on a GPU; tests of meshes ask for the CPU devices.
os.environ["JAX_PLATFORMS"] = os.environ.get("MOE_JAX_TEST_PLATFORMS", "cpu")
# Of two values for a flag, XLA takes the later one.
os.environ["XLA_FLAGS"] = " ".join(
    [
        xla_flags(DEVICES),
        *(
            flag
            for flag in os.environ.get("XLA_FLAGS", "").split()
            if not flag.startswith("--xla_force_host_platform_device_count")
        ),
    ]
)
# Two pytest workers share the cores; torch's own threads would only fight over them.
os.environ["OMP_NUM_THREADS"] = "1"
# Mixed dtypes and ranks are errors, so that no cast or broadcast happens by accident.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
_scratch = Path(tempfile.mkdtemp(prefix="moe_jax_tests_"))
os.environ["HF_HOME"] = str(_scratch / "huggingface")
os.environ["HF_DATASETS_CACHE"] = str(_scratch / "datasets")
if "PYTEST_XDIST_WORKER" not in os.environ:  # pytest's workers share that of the process above them
    os.environ["XDG_CACHE_HOME"] = str(_scratch / "cache")  # where commands keep what they compile

# Tracing makes and drops millions of small objects, and looking for cycles among them and all that
# the libraries keep takes 8% of the tests' time.
gc.set_threshold(100_000, 10, 10)

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_sessionstart() -> None:
    """A machine without the eight devices fails; skipping would hide every sharding test."""
    devices = jax.devices("cpu")
    if len(devices) != DEVICES:
        pytest.exit(f"the tests need {DEVICES} devices and see {devices}", returncode=3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders whose files take long come first, so that no worker is left alone with one."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Excludes all objects that exist so far from later garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(_scratch, ignore_errors=True)


@pytest.fixture
def devices() -> list[jax.Device]:
    """The eight fake devices; with `MOE_JAX_TEST_PLATFORMS=cuda,cpu`, `jax.devices()` is a GPU."""
    return jax.devices("cpu")
