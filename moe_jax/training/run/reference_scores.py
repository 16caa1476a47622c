"""Log-probabilities of the answers of preference data under references, computed once and cached.

The examples of a data set are scored in chunks, each of which is an entry of the cache, beside
those of the tokenized data: a run that ends while it scores loses at most a chunk. An entry belongs
to the tokens of the data set, the bytes of the base, the weights of the reference, the numeric
types, the kernels and the platform, so that a run that resumes reads what it began with.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from moe_jax.checkpoints.adapter_files import load_adapter, read_description
from moe_jax.config.run import AdapterConfig
from moe_jax.data.batch import pad_rows
from moe_jax.data.examples import Examples
from moe_jax.data.table_cache import cache_key, cached_table, find_table, progress_bars
from moe_jax.errors import CheckpointError, error_prefix
from moe_jax.training.run.inputs import Inputs
from moe_jax.training.run.measurement import batch_results
from moe_jax.training.run.workdir import is_main_process
from moe_jax.training.step.program import Program

BASE = "base"
"""Fingerprint of the reference without an adapter."""

SCORES_VERSION = 3
"""Part of the key of cached scores; raise it when what they are computed from changes."""

CHUNK_EXAMPLES = 256
"""Examples of a chunk; more in a data set that would have more than `MOST_CHUNKS`."""

MOST_CHUNKS = 64
"""Largest number of chunks of a data set."""

_LINE_SECONDS = 30.0
"""Least time between two lines on the progress."""

_COLUMN = "log_prob"


class _Chunk(NamedTuple):
    """Examples of a data set whose scores are computed and kept together.

    Attributes:
      part: the data set.
      numbers: numbers of the examples, those of about the same length.
      key: key of their scores in the cache.
    """

    part: Examples
    numbers: np.ndarray
    key: str


def reference_fingerprints(inputs: Inputs) -> dict[str, str]:
    """Fingerprint of the reference of each adapter whose answers are scored before training.

    Raises:
      CheckpointError: a folder holds no adapter.
    """
    fingerprints = {}
    for name, adapter in inputs.config.adapters.items():
        preference = adapter.preference
        if preference is None or preference.cached_reference is None:
            continue
        fingerprints[name] = BASE
        if preference.cached_reference == "start":
            assert adapter.start_from is not None
            with error_prefix(f"config.adapters.{name}.start_from"):
                description = read_description(Path(adapter.start_from).expanduser())
            content = json.dumps([description.method, description.checksums], sort_keys=True)
            fingerprints[name] = hashlib.sha256(content.encode()).hexdigest()[:32]
    return fingerprints


def score_answers(
    program: Program,
    inputs: Inputs,
    params: Any,
    fingerprints: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Sets the log-probabilities of the references in the data of the adapters that train.

    Args:
      program: compiled computations.
      inputs: data of the run, which gets them.
      params: frozen base parameters.
      fingerprints: from `reference_fingerprints` when the run began.
      say: prints a line.

    Raises:
      CheckpointError: scores are missing, and the reference has changed since the run began.
      DataError: the cache is not writable.
      KeyboardInterrupt, SystemExit: of a signal, with a note that says how much is scored.
    """
    for name in program.config.adapters:
        if name not in fingerprints:
            continue
        train = inputs.train[name].examples
        assert train is not None
        parts = [*train, *(data.examples for data in inputs.validation[name].values())]
        chunks = {part: _chunks(inputs, name, part, fingerprints[name]) for part in parts}
        missing = _missing(inputs, name, [chunk for some in chunks.values() for chunk in some])
        if missing:
            _fill_cache(program, inputs, name, missing, params, fingerprints[name], say)
        for part, of_part in chunks.items():
            scores = np.empty((len(part), part.rows_per_example), np.float32)
            for chunk in of_part:
                table = find_table(inputs.config.adapters[name].data.cache_dir, chunk.key)
                assert table is not None
                values = np.asarray(table.with_format("numpy")[_COLUMN])
                scores[chunk.numbers] = values.reshape(-1, part.rows_per_example)
            part.set_reference_log_probs(scores)


def _chunks(inputs: Inputs, name: str, part: Examples, fingerprint: str) -> list[_Chunk]:
    config, adapter = inputs.config, inputs.config.adapters[name]
    content = (
        "reference scores",
        SCORES_VERSION,
        part.source.digest,
        part.source.schema,
        adapter.data.max_length,
        inputs.base.identity.fingerprint,
        config.base.param_dtype,
        config.compute.dtype,
        config.compute.attention,
        config.compute.experts,
        jax.default_backend(),
        fingerprint,
    )
    size = max(CHUNK_EXAMPLES, math.ceil(len(part) / MOST_CHUNKS))
    order = np.argsort(part.lengths, kind="stable")
    return [
        _Chunk(part, order[start : start + size], cache_key(*content, size, start))
        for start in range(0, len(part), size)
    ]


def _missing(inputs: Inputs, name: str, chunks: Sequence[_Chunk]) -> list[_Chunk]:
    """Chunks of an adapter that the cache of a process lacks, each key once."""
    cache_dir = inputs.config.adapters[name].data.cache_dir
    missing = np.array([find_table(cache_dir, chunk.key) is None for chunk in chunks])
    if jax.process_count() > 1:  # scoring takes all of them
        missing = multihost_utils.process_allgather(missing).any(axis=0)
    absent = [chunk for chunk, is_missing in zip(chunks, missing, strict=True) if is_missing]
    return list({chunk.key: chunk for chunk in absent}.values())


def _fill_cache(
    program: Program,
    inputs: Inputs,
    name: str,
    chunks: Sequence[_Chunk],
    params: Any,
    fingerprint: str,
    say: Callable[[str], None],
) -> None:
    """Scores chunks of an adapter's data, and stores each as soon as it is scored."""
    adapter = inputs.config.adapters[name]
    tree = None if fingerprint == BASE else _load_reference(program, inputs, name, fingerprint)
    total, done = sum(len(chunk.numbers) for chunk in chunks), 0
    say(f"scoring the answers of {total} examples by the reference of {name!r}")
    said = time.monotonic()
    style: dict[str, Any] = {"unit": "example", "dynamic_ncols": True, "leave": False}
    is_hidden = None if is_main_process() else True  # None shows it on a terminal
    try:
        with tqdm(total=total, disable=is_hidden, **style) as bar:
            for chunk in chunks:
                scores = []
                for found in _scores(program, adapter, chunk, tree, params):
                    scores.append(found)
                    bar.update(len(found))
                _store(adapter.data.cache_dir, chunk.key, np.concatenate(scores))
                done += len(chunk.numbers)
                if time.monotonic() - said > _LINE_SECONDS and done < total:
                    say(f"scored {done} of {total} examples")
                    said = time.monotonic()
    except (KeyboardInterrupt, SystemExit) as stop:
        stop.add_note(
            f"the scores of {done} of {total} examples are kept; run the same command to go on"
        )
        raise


def _load_reference(program: Program, inputs: Inputs, name: str, fingerprint: str) -> Any:
    """Weights of an adapter's `start_from`, if it is still the one that the run began with."""
    if reference_fingerprints(inputs)[name] != fingerprint:
        raise CheckpointError(
            f"config.adapters.{name}.start_from: the adapter changed since the run began, and the "
            "log-probabilities of its answers are no longer in the cache; restore it, or give "
            "another --workdir"
        )
    folder = inputs.config.adapters[name].start_from
    assert folder is not None
    return load_adapter(Path(folder).expanduser(), program.state_shardings.adapters[name]).tree


def _scores(
    program: Program, adapter: AdapterConfig, chunk: _Chunk, tree: Any, params: Any
) -> Iterator[np.ndarray]:
    """Yields the log-probabilities of the examples of each batch, float32 [examples, rows]."""
    part, size = chunk.part, chunk.part.rows_per_example
    # The shapes of the batches of validation, so that an adapter that equals its reference gets the
    # same bits there.
    rows = adapter.batch_size // program.config.training.micro_batches
    count = rows // size
    numbers = [chunk.numbers[n : n + count] for n in range(0, len(chunk.numbers), count)]
    batches = (pad_rows(part.rows(some), rows, adapter.data.lengths) for some in numbers)
    method = None if tree is None else adapter.method
    step = lambda batch: program.answer_step(method, tree, params, batch)
    results = batch_results(program, step, batches)
    for some, (_, (log_probs, _)) in zip(numbers, results, strict=True):
        yield log_probs[: size * len(some)].reshape(-1, size)


def _store(cache_dir: str | None, key: str, scores: np.ndarray) -> None:
    def make(folder: Path) -> datasets.Dataset:
        made = datasets.Dataset.from_dict({_COLUMN: scores.reshape(-1)})
        made.save_to_disk(str(folder / "scores"))
        return datasets.Dataset.load_from_disk(str(folder / "scores"))

    with progress_bars():
        cached_table(cache_dir, key, make)
