"""Training batches of data sets that are read during training, for data larger than the disk.

Rows are shuffled in blocks: the next `shuffle_buffer` rows of a data set are read, tokenized and
permuted together, and the files of a local data set are permuted anew every epoch. A block is a
function of its place in the data, so that a training state holds a few numbers, with which a
resumed run makes the same block again.
"""

import hashlib
import itertools
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import datasets
import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.data.batch import Batch, TokenSequence, pack_rows, pad_rows
from moe_jax.data.grouping import position_numbers
from moe_jax.data.hub import HubAddress
from moe_jax.data.packing import first_fit
from moe_jax.data.pipeline import ORDER, PREFETCH, TrainData, share_lines
from moe_jax.data.prompt_template import load_prompt_template
from moe_jax.data.readers import read_rows
from moe_jax.data.schema import check_row, column_names
from moe_jax.data.schema_choice import TEXT_SCHEMAS, choose_schema
from moe_jax.data.sources import (
    RowTable,
    check_hub_row,
    hub_data_set,
    local_files,
    no_rows,
    with_schema,
)
from moe_jax.data.token_table import encode_batch
from moe_jax.data.tokenized_source import (
    TokenizedSource,
    cut_rows,
    target_mask,
    tokenize_source,
)
from moe_jax.data.tokenizer import first_line
from moe_jax.errors import DataError, error_prefix
from moe_jax.files.hub_log import quiet_retries

SAMPLED_ROWS = 256
"""First rows of a data set that the report and the fingerprint describe."""

Row = dict[str, str]
OpenRows = Callable[[Sequence[int] | None, int], Iterator[Row]]
"""Function to the checked rows after a number of rows, given a seed of the order of the files.

None leaves the files in the order of their names.
"""

Encode = Callable[[list[Row]], list[TokenSequence]]
"""Function from rows to their sequences with a target."""


class _Source(NamedTuple):
    """Data set that is read anew every epoch.

    Attributes:
      config: configuration, with the schema.
      rows: opens the rows.
      origin: where the rows come from, for the report.
      files: number of local files; None on the hub.
      skipped: as in `RowTable`.
    """

    config: SourceConfig
    rows: OpenRows
    origin: str
    files: int | None = None
    skipped: Mapping[str, Sequence[str]] = {}


class _Blocks(grain.IterDataset[list[TokenSequence]]):
    """Endless blocks of a data set's sequences, in the order in which they are learned."""

    def __init__(self, field: str, rows: OpenRows, encode: Encode, size: int, seed: Sequence[int]):
        super().__init__()
        self._arguments = (field, rows, encode, size, seed)

    def __iter__(self) -> "_BlockIterator":
        return _BlockIterator(*self._arguments)


class _BlockIterator(grain.DatasetIterator[list[TokenSequence]]):
    def __init__(self, field: str, rows: OpenRows, encode: Encode, size: int, seed: Sequence[int]):
        super().__init__()
        self._field = field
        self._open_rows = rows
        self._encode = encode
        self._size = size
        self._seed = tuple(seed)
        self._epoch = self._row = 0
        self._reader: Iterator[Row] | None = None

    def __next__(self) -> list[TokenSequence]:
        with error_prefix(self._field):
            rows = self._read()
            if not rows:
                self._epoch, self._row, self._reader = self._epoch + 1, 0, None
                rows = self._read()
            if not rows:
                raise DataError("holds no rows any more")
            found = self._encode(rows)
        order = np.random.default_rng([*self._seed, self._epoch, self._row]).permutation(len(found))
        self._row += len(rows)
        return [found[number] for number in order]

    def _read(self) -> list[Row]:
        if self._reader is None:
            self._reader = self._open_rows([*self._seed, self._epoch], self._row)
        return list(itertools.islice(self._reader, self._size))

    def get_state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "row": self._row}

    def set_state(self, state: dict[str, int]) -> None:
        self._epoch, self._row, self._reader = state["epoch"], state["row"], None


class _Flat(grain.experimental.FlatMapTransform):
    """Flattens lists."""

    max_fan_out = sys.maxsize

    def flat_map(self, element: list[Any]) -> list[Any]:
        return element


def load_streamed_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seed: int,
    field: str = "data",
    *,
    vocab_size: int,
    grouping_seed: int | None = None,
    say: Callable[[str], None] = print,
) -> TrainData:
    """Opens the data sets of `config.train` for reading during training.

    Args:
      config, tokenizer, batch_size, seed, field, grouping_seed: see `pipeline.load_train_data`.
      vocab_size: number of embeddings of the base; larger token ids are refused when they come.
      say: prints a line, for each data set about the first row that is cut or left out.

    Returns:
      Training data whose number of rows is unknown. Report, largest tokens and fingerprint are of
      the first rows of each data set; the fingerprint includes the number of local files. A later
      row may so be corrected while a run is stopped.

    Raises:
      DataError: a data set cannot be read, or its first rows are invalid; the message names its
        field. The iterator raises it for later rows.
    """
    samples: list[TokenizedSource] = []
    streams, digests = [], {}
    for name, source_config in config.train.items():
        place = f"{field}.train.{name}"
        with error_prefix(place):
            source = _open_source(source_config)
            samples.append(_sample(name, source, config, tokenizer))
        digests[f"train/{name}"] = _digest([samples[-1].digest, source.files])
        encode = _encoder(source.config, config, tokenizer, vocab_size, say)
        seeds = [seed, zlib.crc32(name.encode())]
        blocks = _Blocks(place, source.rows, encode, config.shuffle_buffer, seeds)
        streams.append(grain.experimental.FlatMapIterDataset(blocks, _Flat()))
    weights = [source.weight for source in config.train.values()]
    size = _window_size(samples, weights, config, batch_size)
    arrange = partial(_packed, config.max_length, seed)
    if not config.is_packed:
        arrange = partial(_sorted, batch_size, seed if grouping_seed is None else grouping_seed)
    windows = grain.IterDataset.mix(streams, weights).batch(size, batch_fn=list)
    rows = grain.experimental.FlatMapIterDataset(windows.map_with_index(arrange), _Flat())
    batches = rows.batch(batch_size, batch_fn=partial(_collate, config))
    settings = [weights, config.lengths, config.packing, size, config.shuffle_buffer]
    return TrainData(
        iterator=iter(
            grain.experimental.ThreadPrefetchIterDataset(
                batches, prefetch_buffer_size=PREFETCH.prefetch_buffer_size
            )
        ),
        num_rows=None,
        longest=config.max_length,
        batches_of_epochs=_unknown_length,
        padding_share=math.nan,
        report="\n".join(
            [
                *(sample.report for sample in samples),
                *share_lines([sample.name for sample in samples], weights),
                f"shuffled in blocks of {config.shuffle_buffer} rows, {_shape(config)}",
            ]
        ),
        fingerprint={**digests, ORDER: _digest([*settings, batch_size, seed])},
        largest_tokens={sample.name: sample.largest_token for sample in samples},
        source_rows=dict.fromkeys(config.train),
        source_schemas={sample.name: sample.schema for sample in samples},
        found_tokens=None,
        examples=None,
    )


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _unknown_length(_: float) -> int:
    raise ValueError("the number of rows of streamed data is unknown")


def _shape(config: DataConfig) -> str:
    if config.is_packed:
        return f"packed into rows of {config.max_length} tokens"
    return f"padded to {', '.join(map(str, config.lengths))} tokens"


def _window_size(
    samples: Sequence[TokenizedSource],
    weights: Sequence[float],
    config: DataConfig,
    batch_size: int,
) -> int:
    """Sequences of a window, of `sort_window` batches; where rows are packed, of about as many."""
    rows = config.sort_window * batch_size
    if not config.is_packed:
        return rows
    mean = np.average([sample.lengths.mean() for sample in samples], weights=weights)
    return max(1, int(rows * config.max_length / mean))


def _sorted(
    batch_size: int, seed: int, number: int, window: list[TokenSequence]
) -> list[list[TokenSequence]]:
    """Rows of one sequence each: batches of similar length, placed as in `LengthGroupedBatches`."""
    count = len(window) // batch_size
    if count > 1:
        window.sort(key=lambda sequence: len(sequence.tokens))
    first = number * count
    ranks = np.argsort(np.argsort(position_numbers(seed, first, first + count)))
    batches = [window[rank * batch_size : (rank + 1) * batch_size] for rank in ranks]
    return [[sequence] for batch in batches for sequence in batch]


def _packed(
    length: int, seed: int, number: int, window: list[TokenSequence]
) -> list[list[TokenSequence]]:
    """Rows of several sequences, packed and shuffled as in `PackedBatches`."""
    window.sort(key=lambda sequence: -len(sequence.tokens))
    places = first_fit(np.array([len(sequence.tokens) for sequence in window]), length)
    rows: list[list[TokenSequence]] = [[] for _ in range(places.max() + 1)]
    for place, sequence in zip(places, window, strict=True):
        rows[place].append(sequence)
    return [rows[n] for n in np.random.default_rng([seed, number]).permutation(len(rows))]


def _collate(config: DataConfig, rows: Sequence[list[TokenSequence]]) -> Batch:
    if config.is_packed:
        return pack_rows(rows, config.max_length)
    return pad_rows([sequence for (sequence,) in rows], len(rows), config.lengths)


def _sample(
    name: str, source: _Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> TokenizedSource:
    """The first rows, tokenized in memory."""
    rows = list(itertools.islice(source.rows(None, 0), SAMPLED_ROWS))
    if not rows:
        raise no_rows(source.config)
    origin = f"streamed from {source.origin}, of the first {len(rows)} rows"
    table = RowTable(datasets.Dataset.from_list(rows), None, None, source.skipped, origin)
    return tokenize_source(name, source.config, config, tokenizer, lambda *_: table)


def _encoder(
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    say: Callable[[str], None],
) -> Encode:
    assert source.schema is not None
    schema, said = source.schema, set[str]()

    def say_once(row: Row, what: str) -> None:
        if what not in said:
            said.add(what)
            say(f"{row['where']}: {what}; further rows like it are not named")

    template = load_prompt_template(source.prompt) if source.schema == "instruction" else None

    def encode(rows: list[Row]) -> list[TokenSequence]:
        columns = encode_batch(
            {column: [row[column] for row in rows] for column in rows[0]},
            list(range(len(rows))),
            source=source,
            template=template,
            tokenizer=tokenizer,
            config=config,
            stored=None if source.schema == "text" else config.max_length,
        )
        found = []
        lengths = np.array(columns["length"])
        for index, start, length, truncated in zip(
            *cut_rows(lengths, config.max_length, schema), strict=True
        ):
            row = rows[columns["row"][index]]
            ids = np.asarray(columns["tokens"][index][start : start + length], np.int32)
            is_target = np.asarray(columns["is_target"][index][start : start + length], bool)
            targets = target_mask(is_target)
            if not targets.any():
                say_once(row, "is left out, as no target remains")
                continue
            if truncated:
                say_once(row, f"is truncated to {config.max_length} tokens")
            if ids.max() >= vocab_size:
                raise DataError(
                    f"{row['where']}: holds the token id {ids.max()}, but the base has "
                    f"embeddings for {vocab_size} tokens only"
                )
            found.append(TokenSequence(ids, targets, source.expert_group))
        return found

    return encode


def _open_source(source: SourceConfig) -> _Source:
    address, is_chosen = hub_data_set(source), source.schema is None
    if address is None:
        (files, skipped), source = local_files(source), with_schema(source, None, TEXT_SCHEMAS)
        rows, count = partial(_local_rows, source, files), len(files)
        origin = f"{count} file{'s' * (count != 1)}"
    else:
        if is_chosen:
            first = next(_raw_hub_rows(address, source, 0), {})
            source = choose_schema(source, list(first), source.title, TEXT_SCHEMAS)
        rows, count, skipped = partial(_hub_rows, source, address), None, {}
        origin = "the hub"
    column_names(source)
    if is_chosen:
        origin += f" (schema {source.schema!r}, by their columns)"
    return _Source(source, rows, origin, count, skipped)


def _local_rows(
    source: SourceConfig, files: Sequence[Any], seed: Sequence[int] | None, start: int
) -> Iterator[Row]:
    order = range(len(files))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(files))
    read = itertools.chain.from_iterable(read_rows(files[number]) for number in order)
    for where, row in itertools.islice(read, start, None):
        yield {**check_row(row, source, where), "where": where}


def _hub_rows(
    source: SourceConfig, address: HubAddress, _: Sequence[int] | None, start: int
) -> Iterator[Row]:
    for index, row in enumerate(_raw_hub_rows(address, source, start), start):
        yield check_hub_row(row, index, source)


def _raw_hub_rows(address: HubAddress, source: SourceConfig, start: int) -> Iterator[dict]:
    # The hub's libraries raise many types, for no network, no such id, no such split and no access.
    try:
        with quiet_retries():
            stream: Any = datasets.load_dataset(
                address.dataset,
                name=source.name,
                split=source.split,
                revision=address.revision,
                streaming=True,
            )
        yield from stream.skip(start)
    except Exception as error:
        raise DataError(
            f"{source.title}: cannot be read from the hub ({first_line(error)})"
        ) from error
