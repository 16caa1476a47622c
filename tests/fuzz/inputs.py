"""Inputs that are almost valid, and the check of what is made of them.

`make fuzz` sets `FUZZ_INPUTS`, the number of inputs of all targets together.
"""

import contextlib
import copy
import functools
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.errors import UserError
from moe_jax.terminal import MAX_MESSAGE

SECONDS = 20
"""Longest time of one input."""

MANY = int(os.environ.get("FUZZ_INPUTS", "0"))


@dataclass
class Figures:
    """What a target made of its inputs."""

    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0


FIGURES: dict[str, Figures] = {}


def figures_of_process() -> dict[str, Any]:
    """Figures by target, and the largest memory of this process in MB."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"targets": {name: asdict(each) for name, each in FIGURES.items()}, "memory": memory}


def fuzz(quick: int, share: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Settings of a target: `quick` inputs in `make test`, `share` of all in `make fuzz`."""
    return hypothesis.settings(
        max_examples=max(quick, round(share * MANY)),
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@contextlib.contextmanager
def attempt(target: str) -> Iterator[None]:
    """Accepts a result or a `UserError` of bounded length; not another error, nor a hang."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"{target}: no answer in {SECONDS} s")

    figures = FIGURES.setdefault(target, Figures())
    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    start = time.perf_counter()
    refusal = None
    try:
        yield
    except UserError as error:
        refusal = str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        figures.inputs += 1
        figures.slowest = max(figures.slowest, time.perf_counter() - start)
    if refusal is not None:
        figures.refused += 1
        assert 0 < len(refusal) <= MAX_MESSAGE


DEEP, DIGITS = "@deep@", "@digits@"
_RAW = {DEEP: "[" * 5000 + "]" * 5000, DIGITS: "9" * 5000}

_TEXTS = ["", "a", "x" * 5000, "\x1b]0;title\x07", "../..", "\ud800", "nan", "{{", "9" * 30]
_NUMBERS = [0, 1, -1, 3, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, float("nan"), float("inf")]
json_values = st.one_of(
    st.sampled_from([None, True, False, *_NUMBERS, *_TEXTS, DEEP, DIGITS]),
    st.sampled_from([[], {}, [[]], [None], [1, "a"], {"name": 3}, {"": {}}, [{}], {"a": [1]}]),
    st.integers() | st.floats() | st.text(max_size=5),
    st.dictionaries(st.text(max_size=3), st.lists(st.integers(), max_size=2), max_size=2),
)


class _Unprintable:
    def __repr__(self):
        raise RuntimeError


_CIRCLE: list[Any] = []
_CIRCLE.append(_CIRCLE)
_PYTHON = {
    "@1e400@": 10**400,
    "@1e5000@": 10**5000,
    "@array@": np.arange(3),
    "@float32@": np.float32(2.0),
    "@int64@": np.int64(4),
    "@integer keys@": {1: 2, "a": 3},
    "@no key@": {None: 1},
    "@tuple@": (1, "a"),
    "@bytes@": b"bytes",
    "@set@": {1, 2},
    "@type@": object,
    "@unprintable@": _Unprintable(),
    "@circle@": _CIRCLE,
    "@complex@": 1j,
}
python_values = json_values | st.sampled_from(list(_PYTHON))


def as_python(value: Any) -> Any:
    """The value with objects that JSON does not have, and that Hypothesis cannot print."""
    if isinstance(value, dict):
        return {key: as_python(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_python(item) for item in value]
    return _PYTHON.get(value, value) if isinstance(value, str) else value


def mutated(tree: Any, values: st.SearchStrategy[Any] = json_values) -> st.SearchStrategy[Any]:
    """The tree, nested dicts and lists, with one or two values replaced, removed or added."""
    change = st.tuples(
        st.sampled_from(_paths(tree)),
        st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add"]),
        values,
    )
    return st.lists(change, min_size=1, max_size=2).map(
        lambda changes: functools.reduce(
            lambda tree, change: _changed(tree, *change), changes, tree
        )
    )


def _paths(tree: Any) -> list[tuple[Any, ...]]:
    """Keys from the root to every value, after the empty path of the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    nested = [(key, _paths(item) if isinstance(item, dict | list) else [()]) for key, item in items]
    return [(), *((key, *path) for key, paths in nested for path in paths)]


def _changed(tree: Any, path: tuple[Any, ...], change: str, value: Any) -> Any:
    """The tree with one value changed; a path that no longer exists changes its last value."""
    keys = range(len(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else ()
    if not path or path[0] not in keys:
        return value
    copied, (key, *rest) = copy.copy(tree), path
    if rest:
        copied[key] = _changed(tree[key], tuple(rest), change, value)
    elif change == "remove":
        del copied[key]
    elif change == "rename" and isinstance(copied, dict):
        copied[f"{key}s"] = copied.pop(key)
    elif change == "add" and isinstance(copied, dict):
        copied["added" if isinstance(value, list | dict) else str(value)] = value
    elif change == "add":
        copied.append(value)
    else:
        copied[key] = value
    return copied


def as_json(value: Any) -> str:
    """JSON of a value, with nesting and integers that Python cannot hold."""
    text = json.dumps(value)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with one to four of them changed, a part removed or repeated, or their end cut off."""
    data = bytearray(content)
    position = st.integers(0, max(0, len(data) - 1))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(position)
        change = draw(st.sampled_from(["flip", "flip", "cut", "remove", "repeat", "zeros"]))
        if change == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del data[at:]
        else:
            end = at + draw(st.integers(1, 16))
            data[at:end] = {"remove": b"", "repeat": data[at:end] * 2, "zeros": bytes(end - at)}[
                change if change != "flip" else "zeros"
            ]
    return bytes(data)


def json_texts(tree: Any) -> st.SearchStrategy[bytes]:
    """JSON of a mutated tree, and damaged JSON of the tree itself."""
    whole = json.dumps(tree, indent=1).encode()
    return mutated(tree).map(lambda value: as_json(value).encode()) | damaged(whole)


def folder_with(factory: pytest.TempPathFactory, file: str, content: bytes) -> Path:
    """Folder with a file of this content, the same for all inputs of the file."""
    folder = factory.getbasetemp() / f"fuzz_{file.partition('.')[0]}"
    folder.mkdir(exist_ok=True)
    (folder / file).write_bytes(content)
    return folder
