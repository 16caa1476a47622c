"""From the configuration of the data to batches: endless for training, one pass for validation."""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import grain
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.data.batch import Batch, Row, pack_rows, pad_rows, padded_length
from moe_jax.data.grouping import LengthGroupedBatches, ShuffledRange
from moe_jax.data.packing import PackedBatches
from moe_jax.data.sources import ReadSource, read_source
from moe_jax.data.tokenised_source import TokenisedSource, flat_values, tokenise_source
from moe_jax.errors import named

# Batches over which the padding is counted for the report, and whose order is compared.
SAMPLED_BATCHES = 256
# What is not about one data set in `TrainData.fingerprint`.
ORDER = "order"
# Batches made ahead of the step: collating one is far cheaper than a step on it.
PREFETCH = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

Rows = np.ndarray | list[np.ndarray]
"""The numbers of a batch's rows [batch_size], or where rows are packed those in each."""


@dataclass(frozen=True)
class TrainData:
    """Training batches without end.

    Attributes:
      iterator: yields `Batch`es of NumPy arrays [batch_size, S], S in `config.lengths`, or the
        last of them where rows are packed. Its `get_state` is a small dict of plain numbers, and
        `set_state` continues exactly there, as long as `fingerprint` is the same.
      num_rows: rows of all sources that are trained on; with weights, an epoch of the mixture does
        not pass each of them once.
      longest: tokens of the longest of them.
      batches_of_epochs: how many batches it takes to pass over so many times `num_rows` rows.
      padding_share: expected share of padding among the tokens of a batch.
      report: lines on what became of the rows.
      fingerprint: digests of all that decides the batches: `train/SOURCE` of each data set's
        rows, and `ORDER` of how they are mixed and batched. By content: it is the same wherever
        the files lie and whichever libraries read them.
      largest_tokens: the largest token id of each data set.
      source_rows: rows of each data set that are trained on.
    """

    iterator: grain.DatasetIterator[Batch]
    num_rows: int
    longest: int
    batches_of_epochs: Callable[[float], int]
    padding_share: float
    report: str
    fingerprint: dict[str, str]
    largest_tokens: dict[str, int]
    source_rows: dict[str, int]


class ValidationData:
    """Batches of one validation set: every row exactly once, in the same order every time.

    Rows are sorted by length. The last batch is filled up with empty rows (segment 0, no target).

    Attributes:
      num_rows: rows that are measured.
      report: a line on what became of the rows.
      digest: of the rows' tokens, in their order.
      largest_token: the largest token id.
    """

    def __init__(self, source: TokenisedSource, batch_size: int, lengths: Sequence[int]):
        self._rows = _RowStore([source])
        self._order = np.argsort(source.lengths, kind="stable")
        self._batch_size = batch_size
        self._lengths = tuple(lengths)
        self.num_rows = len(source.lengths)
        self.report = source.report
        self.digest = source.digest
        self.largest_token = source.largest_token

    def __len__(self) -> int:
        """How many batches a pass has."""
        return math.ceil(self.num_rows / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.num_rows, self._batch_size):
            rows = self._rows.fetch(self._order[start : start + self._batch_size])
            yield pad_rows(rows, self._batch_size, self._lengths)


def load_train_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int,
    field: str = "data",
    *,
    place_seed: int | None = None,
    known: dict[str, TokenisedSource] | None = None,
    read: ReadSource = read_source,
    classification: ClassificationConfig | None = None,
) -> TrainData:
    """Reads, tokenises and mixes `config.train`.

    Each source is shuffled anew every epoch and repeated; the mixture draws rows by the sources'
    weights. With `config.num_workers` processes are forked, so call this before JAX has started
    its threads; without, a fast tokenizer uses all cores by itself.

    Args:
      config: what to read and how to batch it.
      tokenizer: of the base model.
      batch_size: rows per batch.
      seed: of the order of rows.
      field: where `config` stands in the run's configuration, for messages.
      place_seed: of where batches of short and of long rows come, see `LengthGroupedBatches`; the
        same for all adapters that share a batch. None is `seed`. Packed rows are all of one length.
      known: data sets that were tokenised before, which are taken from here; new ones are added.
      read: reads the rows of a data set.
      classification: what the rows' labels are, where they are to be classified.

    Raises:
      DataError: a source cannot be used; the message names its field, file, row and column.
    """
    more = field, known, read, classification
    sources = _tokenise("train", config.train, config, tokenizer, *more)
    weights = [source.weight for source in config.train.values()]
    store = _RowStore(sources)
    stream, epoch_rows = _row_stream(sources, weights, seed), _epoch_rows(sources, weights)
    if config.is_packed:
        batches = PackedBatches(
            stream,
            lengths=store.lengths,
            row_length=config.max_length,
            batch_size=batch_size,
            sort_window=config.sort_window,
            epoch_examples=epoch_rows,
            seed=seed,
        )
    else:
        batches = LengthGroupedBatches(
            stream,
            lengths=store.lengths,
            batch_size=batch_size,
            sort_window=config.sort_window,
            epoch_rows=epoch_rows,
            seed=seed if place_seed is None else place_seed,
        )

    def collate(rows: Rows) -> Batch:
        if isinstance(rows, np.ndarray):
            return pad_rows(store.fetch(rows), batch_size, config.lengths)
        fetched = iter(store.fetch(np.concatenate(rows)))
        return pack_rows([[next(fetched) for _ in row] for row in rows], config.max_length)

    sample = [batches[index] for index in range(SAMPLED_BATCHES)]
    padding_share = _padding_share(sample, store.lengths, config.lengths)
    report = [source.report for source in sources]
    if len(sources) > 1:
        shares = ", ".join(
            f"{source.name} {weight / sum(weights):.1%}"
            for source, weight in zip(sources, weights, strict=True)
        )
        report.append(f"share of the rows of a batch: {shares}")
    rows = f"padded to {', '.join(map(str, config.lengths))} tokens"
    if config.is_packed:
        share = sum(len(np.concatenate(batch)) for batch in sample) / len(sample) / batch_size
        rows = f"packed, {share:.1f} to a row of {config.max_length} tokens"
    report.append(f"{rows}: {padding_share:.1%} of a batch is padding")
    return TrainData(
        iterator=iter(batches.map(collate).to_iter_dataset(PREFETCH)),
        num_rows=len(store.lengths),
        longest=int(store.lengths.max()),
        batches_of_epochs=lambda epochs: batches.batches_of(epochs * len(store.lengths)),
        padding_share=padding_share,
        report="\n".join(report),
        fingerprint={
            **{f"train/{source.name}": source.digest for source in sources},
            ORDER: _order_digest(sample, weights, config, batch_size, seed),
        },
        largest_tokens={source.name: source.largest_token for source in sources},
        source_rows={source.name: len(source.lengths) for source in sources},
    )


def load_validation_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    field: str = "data",
    *,
    known: dict[str, TokenisedSource] | None = None,
    read: ReadSource = read_source,
    classification: ClassificationConfig | None = None,
) -> dict[str, ValidationData]:
    """Reads and tokenises each data set of `config.validation`; weights are not looked at.

    Args:
      config, tokenizer, batch_size, field, known, read, classification: see `load_train_data`.

    Raises:
      DataError: a source cannot be used; the message names its field, file, row and column.
    """
    more = field, known, read, classification
    sources = _tokenise("validation", config.validation, config, tokenizer, *more)
    return {s.name: ValidationData(s, batch_size, config.lengths) for s in sources}


def _tokenise(
    split: str,
    sources: Mapping[str, SourceConfig],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    field: str,
    known: dict[str, TokenisedSource] | None,
    read: ReadSource,
    classification: ClassificationConfig | None,
) -> list[TokenisedSource]:
    tokenised = {} if known is None else known
    keys = []
    for name, source in sources.items():
        decides = asdict(replace(source, weight=1.0)), config.max_length, config.train_on_prompt
        labels = None if classification is None else classification.labels
        keys.append(json.dumps([name, *decides, config.cache_dir, labels]))
        with named(f"{field}.{split}.{name}"):
            if keys[-1] not in tokenised:
                tokenised[keys[-1]] = tokenise_source(
                    name, source, config, tokenizer, read, classification
                )
    return [tokenised[key] for key in keys]


class _RowStore:
    """The rows of several sources under one numbering, source after source.

    Attributes:
      lengths: tokens of every row.
    """

    def __init__(self, sources: Sequence[TokenisedSource]):
        self._sources = tuple(sources)
        self._starts = np.cumsum([0, *(len(source.kept) for source in sources)])
        self.lengths = np.concatenate([source.lengths for source in sources])

    def fetch(self, rows: np.ndarray) -> list[Row]:
        """The rows of these numbers, in their order."""
        out: list[Row | None] = [None] * len(rows)
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(owners):
            places = np.flatnonzero(owners == number)
            source = self._sources[number]
            table = source.table[source.kept[rows[places] - self._starts[number]].tolist()]
            tokens, masks = _arrays(table["tokens"]), _arrays(table["loss_mask"])
            labels = table["label"].to_pylist()
            for place, ids, mask, label in zip(places, tokens, masks, labels, strict=True):
                out[place] = Row(ids, mask, source.expert_group, label)
        return [row for row in out if row is not None]


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    lengths = column.combine_chunks().value_lengths().to_numpy()
    return np.split(flat_values(column), np.cumsum(lengths)[:-1])


def _row_stream(
    sources: Sequence[TokenisedSource], weights: Sequence[float], seed: int
) -> grain.MapDataset[int]:
    """An endless stream of row numbers, source after source numbered as in `_RowStore`."""
    streams, start = [], 0
    for source in sources:
        # Sources of equal size must not be shuffled alike, nor all anew when one is added.
        stop = start + len(source.kept)
        streams.append(ShuffledRange(start, stop, [seed, zlib.crc32(source.name.encode())]))
        start = stop
    return grain.MapDataset.mix(streams, weights)


def _epoch_rows(sources: Sequence[TokenisedSource], weights: Sequence[float]) -> int:
    """Rows of the mixture after which the first of the sources starts over."""
    total = sum(weights)
    return max(
        1,
        int(
            min(
                len(source.kept) * total / weight
                for source, weight in zip(sources, weights, strict=True)
            )
        ),
    )


def _order_digest(
    sample: Sequence[Rows],
    weights: Sequence[float],
    config: DataConfig,
    batch_size: int,
    seed: int,
) -> str:
    """Of the settings of the order, and of a sample of it, which another shuffle would not give."""
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
    sample: Sequence[Rows], row_lengths: np.ndarray, padded_lengths: Sequence[int]
) -> float:
    tokens = padded = 0
    for rows in sample:
        lengths = np.array([row_lengths[row].sum() for row in rows])
        tokens += int(lengths.sum())
        longest = lengths.max() if isinstance(rows, np.ndarray) else padded_lengths[-1]
        padded += padded_length(int(longest), padded_lengths) * len(lengths)
    return 1.0 - tokens / padded
