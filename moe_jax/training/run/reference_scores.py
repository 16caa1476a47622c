"""Log-probabilities of the answers of preference data under references, computed once and cached.

An entry of the cache belongs to the tokens of a data set, the bytes of the base, the weights of the
reference, the numeric types, the kernels and the platform, so that a run that resumes reads what it
began with. The entries are beside those of the tokenised data.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.checkpoints.adapter_files import load_adapter, read_description
from moe_jax.config.preference import ROWS_PER_EXAMPLE
from moe_jax.config.run import AdapterConfig
from moe_jax.data.examples import Examples
from moe_jax.data.pipeline import ValidationData
from moe_jax.data.table_cache import cache_key, cached_table, find_table, progress_bars
from moe_jax.errors import CheckpointError, error_prefix
from moe_jax.training.records.console import stage
from moe_jax.training.run.inputs import Inputs
from moe_jax.training.run.measurement import batch_results
from moe_jax.training.step.program import Program

BASE = "base"
"""Fingerprint of the reference without an adapter."""

SCORES_VERSION = 2
"""Part of the key of cached scores; raise it when what they are computed from changes."""

_COLUMN = "log_prob"


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
    """
    for name in program.config.adapters:
        if name not in fingerprints:
            continue
        adapter = inputs.config.adapters[name]
        train = inputs.train[name].examples
        assert train is not None
        parts = [*train, *(data.examples for data in inputs.validation[name].values())]
        keys = [_key(inputs, adapter, part, fingerprints[name]) for part in parts]
        found = [find_table(adapter.data.cache_dir, key) for key in keys]
        missing = np.array([table is None for table in found])
        if jax.process_count() > 1:  # scoring takes all of them
            missing = multihost_utils.process_allgather(missing).any(axis=0)
        tree = None
        if missing.any() and fingerprints[name] != BASE:
            tree = _load_reference(program, inputs, name, fingerprints[name])
        for part, key, table, is_missing in zip(parts, keys, found, missing, strict=True):
            if is_missing:
                title = f"scoring the answers of {part.source.name!r} by the reference of {name!r}"
                with stage(say, title):
                    scores = _scores(program, adapter, part, tree, params)
                table = _store(adapter.data.cache_dir, key, scores)
            assert table is not None
            values = np.asarray(table.with_format("numpy")[_COLUMN], np.float32)
            part.set_reference_log_probs(values.reshape(-1, ROWS_PER_EXAMPLE))


def _key(inputs: Inputs, adapter: AdapterConfig, part: Examples, fingerprint: str) -> str:
    config = inputs.config
    return cache_key(
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
    program: Program, adapter: AdapterConfig, part: Examples, tree: Any, params: Any
) -> np.ndarray:
    """Log-probabilities of the rows of all examples, float32 [examples, rows]."""
    rows = adapter.batch_size // program.config.training.micro_batches
    data = ValidationData(part, rows, adapter.data.lengths)
    method = None if tree is None else adapter.method
    step = lambda batch: program.answer_step(method, tree, params, batch)
    found = [log_probs for _, (log_probs, _) in batch_results(program, step, data)]
    scores = np.empty((len(part), part.rows_per_example), np.float32)
    scores[data.order] = np.concatenate(found)[: scores.size].reshape(scores.shape)
    return scores


def _store(cache_dir: str | None, key: str, scores: np.ndarray) -> datasets.Dataset:
    def make(folder: Path) -> datasets.Dataset:
        made = datasets.Dataset.from_dict({_COLUMN: scores.reshape(-1)})
        made.save_to_disk(str(folder / "scores"))
        return datasets.Dataset.load_from_disk(str(folder / "scores"))

    with progress_bars():
        return cached_table(cache_dir, key, make)
