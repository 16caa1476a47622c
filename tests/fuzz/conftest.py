"""Writes the figures of a session to `FUZZ_FIGURES`, for `run.py`."""

import json
import os
from pathlib import Path

from fuzz import inputs


def pytest_sessionfinish() -> None:
    if "FUZZ_FIGURES" in os.environ:
        Path(os.environ["FUZZ_FIGURES"]).write_text(json.dumps(inputs.figures_of_process()))
