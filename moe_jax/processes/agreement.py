"""Comparison of values between the processes of a run."""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed

from moe_jax.processes.peers import CommonError
from moe_jax.terminal import first_of
from moe_jax.version import __version__

_PATIENCE_MS = 10_000
"""Waiting for another process before a line says so."""

_rounds = itertools.count()


def require_agreement(values: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Requires that `values` are the same in all processes. All processes must call this.

    Args:
      values: JSON values by what they are called in an error.
      say: prints a line, when another process takes long.

    Raises:
      ConfigError: a process has another value than process 0; the same error in all processes.
    """
    if jax.process_count() == 1:
        return
    mine = json.loads(json.dumps(values))
    place = f"moe_jax/agreement/{next(_rounds)}"
    _client().key_value_set(f"{place}/{jax.process_index()}", json.dumps(mine))
    # All are read first: an error ends the store of the values.
    first, *others = [_value_of(process, place, say) for process in range(jax.process_count())]
    for process, other in enumerate(others, 1):
        differences = [
            f"{name} is {_show(other, name)}, and {_show(first, name)} in process 0"
            for name in first | other
            if _show(first, name) != _show(other, name)
        ]
        if differences:
            raise CommonError(
                f"process {process} differs from process 0: {first_of(differences)}; start all "
                "processes with the same command, code and files"
            )


def value_of_first(value: Any, say: Callable[[str], None]) -> Any:
    """JSON value of process 0, in all processes, which wait for it. All must call this."""
    if jax.process_count() == 1:
        return value
    place = f"moe_jax/agreement/{next(_rounds)}"
    if jax.process_index() == 0:
        _client().key_value_set(f"{place}/0", json.dumps(value))
    return _value_of(0, place, say)


def _value_of(process: int, place: str, say: Callable[[str], None]) -> Any:
    """Values of a process, which may take any time; its end ends this process too."""
    is_announced = False
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(f"{place}/{process}", _PATIENCE_MS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if not is_announced:
            say(f"waiting for process {process}")
            is_announced = True


def _client() -> Any:
    """Client of the key-value store that the processes share."""
    return distributed.global_state.client


def _show(values: Mapping[str, Any], name: str) -> str:
    text = repr(values[name]) if name in values else "absent"
    return f"{text[:100]}..." if len(text) > 100 else text


def require_one_process() -> None:
    """Requires that this process is not one of several.

    Raises:
      ConfigError: it is.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise CommonError(
            f"this process is one of {jax.process_count()}: generation, evaluation and inspection "
            "run in one process, on its own devices, except the evaluation of a training run"
        )


@functools.cache
def code_versions() -> dict[str, str]:
    """Versions of this package, by the content of its source files, and of jax."""
    folder = Path(__file__).parents[1]
    source = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        source.update(f"{file.relative_to(folder)}\n".encode())
        source.update(file.read_bytes())
    packages = {name: version(name) for name in ("jax", "jaxlib")}
    return {"moe_jax": f"{__version__}, source {source.hexdigest()[:12]}", **packages}
