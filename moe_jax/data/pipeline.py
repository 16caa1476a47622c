"""Batches from the configured data: endless for training, one pass for validation."""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import DataConfig, Schema, SourceConfig
from moe_jax.config.preference import PreferenceConfig
from moe_jax.data.batch import Batch, pack_rows, pad_rows, padded_length
from moe_jax.data.examples import Examples, ExampleStore
from moe_jax.data.grouping import LengthGroupedBatches, ShuffledRange
from moe_jax.data.packing import PackedBatches
from moe_jax.data.sources import ReadSource, read_source
from moe_jax.data.tokenized_source import TokenizedSource, tokenize_source
from moe_jax.errors import error_prefix

SAMPLED_BATCHES = 256
"""Batches over which the padding is averaged for the report, and whose order is fingerprinted."""

ORDER = "order"
"""Key of `TrainData.fingerprint` for the order of the rows of all data sets."""

# Batches are made ahead of the step; collating one is far cheaper than a step on it.
PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

RowNumbers = np.ndarray | list[np.ndarray]
"""Row numbers of a batch: [batch_size], or where rows are packed an array for each of its rows."""


@dataclass(frozen=True)
class TrainData:
    """Endless training batches.

    Attributes:
      iterator: iterator of `Batch`es of NumPy arrays [batch_size, S], S in `config.lengths`, or
        `config.max_length` where rows are packed. Its `get_state` is a small dict of plain numbers,
        and `set_state` resumes exactly there, if `fingerprint` is the same.
      num_rows: training examples of all sources; an epoch of a weighted mixture does not pass each
        of them once. None if unknown.
      longest: tokens of the longest row.
      batches_of_epochs: function from a number of epochs to the number of batches that pass that
        many times `num_rows` rows.
      padding_share: expected share of padding among the tokens of a batch.
      report: lines on rows, shares of the sources and padding.
      fingerprint: digests of everything that decides the batches: `train/SOURCE` of each data set's
        rows, and `ORDER` of their mixing and batching. They depend on content alone, not on file
        locations or library versions.
      largest_tokens: largest token id of each data set.
      source_rows: training rows of each data set; None if unknown.
      source_schemas: schema of each data set.
      found_tokens: function to those of some token ids that occur in the rows; None if unknown.
      examples: examples of each data set; None of streamed data. The log-probabilities of a
        reference may be set in them before the first batch is drawn.
    """

    iterator: grain.DatasetIterator[Batch]
    num_rows: int | None
    longest: int
    batches_of_epochs: Callable[[float], int]
    padding_share: float
    report: str
    fingerprint: dict[str, str]
    largest_tokens: dict[str, int]
    source_rows: dict[str, int | None]
    source_schemas: dict[str, Schema]
    found_tokens: Callable[[Sequence[int]], set[int]] | None
    examples: tuple[Examples, ...] | None


class ValidationData:
    """Batches of one validation set: every row exactly once, in the same order every time.

    Rows are sorted by length, and those of an example stay together. The last batch is filled up
    with empty rows (segment 0, no target).

    Attributes:
      examples: examples of the set.
      num_rows: number of examples.
      schema: schema of the rows.
      report: line on truncated and dropped rows.
      digest: digest of the rows' tokens, in their order.
      largest_token: largest token id.
    """

    def __init__(self, examples: Examples, batch_size: int, lengths: Sequence[int]):
        """Sorts a set.

        Args:
          examples: examples of the set.
          batch_size: rows of a batch.
          lengths: padded lengths of rows, ascending.
        """
        source = examples.source
        self.examples = examples
        self.order = np.argsort(examples.lengths, kind="stable")
        """Numbers of the examples in the order of their rows."""
        self._batch_size = batch_size
        self._lengths = tuple(lengths)
        self.num_rows = len(examples)
        self.schema = source.schema
        self.report = source.report
        self.digest = source.digest
        self.largest_token = source.largest_token

    def __len__(self) -> int:
        """Number of batches of a pass."""
        return math.ceil(self.num_rows / self._examples_of_batch)

    def __iter__(self) -> Iterator[Batch]:
        count = self._examples_of_batch
        for start in range(0, self.num_rows, count):
            rows = self.examples.rows(self.order[start : start + count])
            yield pad_rows(rows, self._batch_size, self._lengths)

    @property
    def _examples_of_batch(self) -> int:
        return self._batch_size // self.examples.rows_per_example


def load_train_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int,
    field: str = "data",
    *,
    grouping_seed: int | None = None,
    token_cache: dict[str, TokenizedSource] | None = None,
    reader: ReadSource = read_source,
    classification: ClassificationConfig | None = None,
    preference: PreferenceConfig | None = None,
) -> TrainData:
    """Reads, tokenizes and mixes `config.train`.

    Each source is shuffled again every epoch and repeated; the mixture draws rows by the sources'
    weights. With `config.num_workers` processes are forked, so call this before JAX has started its
    threads; without, a fast tokenizer uses all cores by itself.

    Args:
      config: data sets and batching.
      tokenizer: tokenizer of the base model.
      batch_size: rows per batch.
      seed: seed of the order of rows.
      field: path of `config` in the run's configuration, for messages.
      grouping_seed: seed of the positions of batches of short and of long rows, see
        `LengthGroupedBatches`; equal for all adapters that share a batch. None takes `seed`. Packed
        rows all have one length and ignore it.
      token_cache: data sets tokenized before, which are reused; new ones are added.
      reader: reader of a data set's rows.
      classification: classes of the rows' labels, for rows to classify.
      preference: loss of preference data, for data sets of it.

    Raises:
      DataError: a source is invalid; the message names its field, file, row and column.
    """
    heads = classification, preference
    sources = _tokenize(
        "train", config.train, config, tokenizer, field, token_cache, reader, *heads
    )
    weights = [source.weight for source in config.train.values()]
    store = ExampleStore(_examples(sources, config.max_length, f"{field}.train"))
    group_seed = seed if grouping_seed is None else grouping_seed
    batches = _batch_order(store, weights, config, batch_size, seed, group_seed)
    sample = [batches[index] for index in range(SAMPLED_BATCHES)]
    padding_share = _padding_share(sample, store, config.lengths)
    collated = batches.map(lambda numbers: _collate(numbers, store, config, batch_size))
    return TrainData(
        iterator=iter(collated.to_iter_dataset(PREFETCH)),
        num_rows=len(store.lengths),
        longest=int(store.lengths.max()),
        batches_of_epochs=lambda epochs: batches.batches_of(epochs * len(store.lengths)),
        padding_share=padding_share,
        report=_train_report(store, weights, sample, config, padding_share),
        fingerprint={
            **{f"train/{source.name}": source.digest for source in sources},
            ORDER: _order_digest(sample, weights, config, batch_size, seed),
        },
        largest_tokens={source.name: source.largest_token for source in sources},
        source_rows={part.source.name: len(part) for part in store.parts},
        source_schemas={source.name: source.schema for source in sources},
        found_tokens=lambda ids: set().union(*(source.found_tokens(ids) for source in sources)),
        examples=store.parts,
    )


def load_validation_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    field: str = "data",
    *,
    token_cache: dict[str, TokenizedSource] | None = None,
    reader: ReadSource = read_source,
    classification: ClassificationConfig | None = None,
    preference: PreferenceConfig | None = None,
) -> dict[str, ValidationData]:
    """Reads and tokenizes each data set of `config.validation`; ignores weights.

    Args:
      config, tokenizer, batch_size, field, token_cache, reader, classification, preference: see
        `load_train_data`.

    Raises:
      DataError: a source is invalid; the message names its field, file, row and column.
    """
    sources = _tokenize(
        "validation",
        config.validation,
        config,
        tokenizer,
        field,
        token_cache,
        reader,
        classification,
        preference,
    )
    return {
        examples.source.name: ValidationData(examples, batch_size, config.lengths)
        for examples in _examples(sources, config.max_length, f"{field}.validation")
    }


def _examples(sources: Sequence[TokenizedSource], max_length: int, field: str) -> list[Examples]:
    """Examples of each data set; messages name its field."""
    found = []
    for source in sources:
        with error_prefix(f"{field}.{source.name}"):
            found.append(Examples(source, max_length))
    return found


def _tokenize(
    split: str,
    sources: Mapping[str, SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    field: str,
    token_cache: dict[str, TokenizedSource] | None,
    reader: ReadSource,
    classification: ClassificationConfig | None,
    preference: PreferenceConfig | None,
) -> list[TokenizedSource]:
    tokenized = {} if token_cache is None else token_cache
    keys = []
    for name, source in sources.items():
        # The weight changes the order alone, so adapters that weight a source differently share it.
        fields = (
            asdict(replace(source, weight=1.0)),
            config.max_length,
            config.train_on_prompt,
            config.date,
        )
        labels = None if classification is None else classification.labels
        schema = None if preference is None else preference.schema
        keys.append(json.dumps([name, *fields, config.cache_dir, labels, schema]))
        with error_prefix(f"{field}.{split}.{name}"):
            if keys[-1] not in tokenized:
                tokenized[keys[-1]] = tokenize_source(
                    name, source, config, tokenizer, reader, classification, preference
                )
    return [tokenized[key] for key in keys]


def _batch_order(
    store: ExampleStore,
    weights: Sequence[float],
    config: DataConfig,
    batch_size: int,
    seed: int,
    grouping_seed: int,
) -> PackedBatches | LengthGroupedBatches:
    """Endless stream of the example numbers of each batch."""
    stream, epoch_rows = _row_stream(store, weights, seed), _epoch_rows(store, weights)
    if config.is_packed:
        return PackedBatches(
            stream,
            lengths=store.lengths,
            row_length=config.max_length,
            batch_size=batch_size,
            sort_window=config.sort_window,
            epoch_examples=epoch_rows,
            seed=seed,
        )
    return LengthGroupedBatches(
        stream,
        lengths=store.lengths,
        batch_size=batch_size // store.rows_per_example,
        sort_window=config.sort_window,
        epoch_rows=epoch_rows,
        seed=grouping_seed,
    )


def _collate(
    numbers: RowNumbers, store: ExampleStore, config: DataConfig, batch_size: int
) -> Batch:
    if isinstance(numbers, np.ndarray):
        return pad_rows(store.fetch(numbers), batch_size, config.lengths)
    fetched = iter(store.fetch(np.concatenate(numbers)))
    return pack_rows([[next(fetched) for _ in row] for row in numbers], config.max_length)


def _train_report(
    store: ExampleStore,
    weights: Sequence[float],
    sample: Sequence[RowNumbers],
    config: DataConfig,
    padding_share: float,
) -> str:
    """Lines on the rows of each source, their shares of a batch, and the padding."""
    lines = [part.source.report for part in store.parts]
    lines += share_lines([part.source.name for part in store.parts], weights)
    rows = f"padded to {', '.join(map(str, config.lengths))} tokens"
    if config.is_packed:
        packed = [len(row) for batch in sample for row in batch]
        rows = f"packed, {sum(packed) / len(packed):.1f} to a row of {config.max_length} tokens"
    return "\n".join([*lines, f"{rows}: {padding_share:.1%} of a batch is padding"])


def share_lines(names: Sequence[str], weights: Sequence[float]) -> list[str]:
    """Line on the data sets' shares of a batch; none for a single data set."""
    shares = [f"{n} {w / sum(weights):.1%}" for n, w in zip(names, weights, strict=True)]
    return [f"share of the rows of a batch: {', '.join(shares)}"] if len(names) > 1 else []


def _row_stream(store: ExampleStore, weights: Sequence[float], seed: int) -> grain.MapDataset[int]:
    """Endless stream of example numbers, numbered as in `ExampleStore`."""
    streams, start = [], 0
    for part in store.parts:
        # Seeded by name: sources of equal size get different orders, and adding a source leaves
        # the others' orders unchanged.
        stop = start + len(part)
        streams.append(ShuffledRange(start, stop, [seed, zlib.crc32(part.source.name.encode())]))
        start = stop
    return grain.MapDataset.mix(streams, weights)


def _epoch_rows(store: ExampleStore, weights: Sequence[float]) -> int:
    """Examples of the mixture until the first data set is exhausted."""
    total = sum(weights)
    return max(
        1,
        int(
            min(
                len(part) * total / weight
                for part, weight in zip(store.parts, weights, strict=True)
            )
        ),
    )


def _order_digest(
    sample: Sequence[RowNumbers],
    weights: Sequence[float],
    config: DataConfig,
    batch_size: int,
    seed: int,
) -> str:
    """Digest of the settings of the order, and of a sample of it, which depends on the shuffle."""
    settings = [weights, config.lengths, config.sort_window, batch_size, seed]
    if config.is_packed:
        settings = [weights, config.packing, config.max_length, *settings[2:]]
    rows = [
        batch.tolist() if isinstance(batch, np.ndarray) else [row.tolist() for row in batch]
        for batch in sample
    ]
    content = json.dumps([*settings, rows])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _padding_share(
    sample: Sequence[RowNumbers], store: ExampleStore, padded_lengths: Sequence[int]
) -> float:
    tokens = padded = 0
    for rows in sample:
        tokens += sum(store.mean_lengths[row].sum() for row in rows)
        is_padded = isinstance(rows, np.ndarray)
        longest = store.lengths[rows].max() if is_padded else padded_lengths[-1]
        padded += padded_length(int(longest), padded_lengths) * len(rows)
    return 1.0 - tokens / padded
