"""Data sets as token ids and loss masks.

A row longer than `max_length` loses its end; its completion then has no end-of-text token, so that
the model does not learn to stop there. A row without a remaining target is dropped and counted. Raw
text is not truncated but divided: each part begins with the last token of the part before it, as
context, so that every token is a target exactly once.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import PREFERENCE_SCHEMAS, DataConfig, Schema, SourceConfig
from moe_jax.config.preference import PreferenceConfig
from moe_jax.data.batch import TokenSequence
from moe_jax.data.chat_template import reads_date, require_chat_template
from moe_jax.data.files import skipped_text
from moe_jax.data.pairs import (
    Parts,
    count_labels,
    flat_values,
    list_lengths,
    pair_parts,
    split_lists,
)
from moe_jax.data.prompt_template import load_prompt_template
from moe_jax.data.schema_choice import COLUMN_SCHEMAS
from moe_jax.data.sources import ReadSource, RowTable, read_source, with_schema
from moe_jax.data.token_table import encoded_table
from moe_jax.data.tokenizer import end_of_text
from moe_jax.errors import DataError

TARGET_FIELDS: dict[Schema | None, str] = {
    "instruction": "output",
    "completion": "completion",
    "text": "text",
}
"""Field of a schema that is the whole target."""


_BATCH_ROWS = 1000
"""Rows of a table that are read into memory at once."""


@dataclass(frozen=True)
class TokenizedSource:
    """One data set as tokens.

    Attributes:
      name: name of the data set in the configuration.
      schema: schema of its rows.
      table: columns `tokens`, `is_target` and `label` of the encoded rows, not cut.
      kept: index into `table` of each sequence, a part of a row that has a target.
      starts: its first token in the row.
      lengths: its number of tokens.
      labels: its label, float32; see `Batch.labels`.
      digest: digest of the ids, masks and lengths of the sequences in their order, and of their
        group of experts; independent of file locations and library versions.
      largest_token: largest token id.
      expert_group: group of experts of the rows.
      is_classified: whether the rows are texts to classify.
      report: line with the numbers of files and rows, of truncated, dropped and empty rows, and the
        files that were skipped.
    """

    name: str
    schema: Schema
    table: datasets.Dataset
    kept: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    digest: str
    largest_token: int
    expert_group: int
    is_classified: bool
    report: str

    def sequences(self, numbers: np.ndarray) -> list[TokenSequence]:
        """Sequences of these numbers, in their order."""
        table = self.table[self.kept[numbers].tolist()]
        tokens, masks = split_lists(table["tokens"]), split_lists(table["is_target"])
        found = []
        for number, ids, mask, label in zip(
            numbers, tokens, masks, table["label"].to_pylist(), strict=True
        ):
            part = slice(self.starts[number], self.starts[number] + self.lengths[number])
            targets = target_mask(mask[part], is_classified=self.is_classified)
            found.append(TokenSequence(ids[part], targets, self.expert_group, label))
        return found

    def found_tokens(self, tokens: Sequence[int]) -> set[int]:
        """Those of these token ids that occur in the sequences."""
        read = np.zeros(len(self.table), np.int64)  # tokens of each row that are in a sequence
        np.maximum.at(read, self.kept, self.starts + self.lengths)
        found, row = set[int](), 0
        for batch in _batches(self.table):
            ids, lengths = flat_values(batch["tokens"]), list_lengths(batch["tokens"])
            places = np.flatnonzero(np.isin(ids, tokens))
            ends = np.cumsum(lengths)
            rows = np.searchsorted(ends, places, side="right")
            is_read = places - (ends - lengths)[rows] < read[row + rows]
            found |= set(ids[places[is_read]].tolist())
            row += len(lengths)
        return found


def tokenize_source(
    name: str,
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    read: ReadSource = read_source,
    classification: ClassificationConfig | None = None,
    preference: PreferenceConfig | None = None,
) -> TokenizedSource:
    """Reads, checks and tokenizes a data set, or loads it from the cache.

    Args:
      name: name of the data set in the configuration.
      source: data set to read.
      config: largest row length, and cache folder of the tables.
      tokenizer: tokenizer of the base model.
      read: reader of the rows.
      classification: classes of the rows' labels, for rows to classify.
      preference: loss of preference data, for data sets of it.

    Raises:
      DataError: the data set, its prompt template or the tokenizer is invalid, no row has a target
        within `max_length`, or feedback has one label only.
    """
    end_of_text(tokenizer)
    is_chosen = source.schema is None
    if is_chosen:
        source = _with_schema(source, config, classification, preference)
    assert source.schema is not None
    template = load_prompt_template(source.prompt) if source.schema == "instruction" else None
    if source.schema == "chat":
        require_chat_template(tokenizer, source.title)
    rows = read(source, config.cache_dir)
    table = encoded_table(name, rows, source, config, tokenizer, template, classification)
    columns = table.select_columns(["length", "label", "row"]).with_format("numpy")[:]
    parts = cut_rows(columns["length"], config.max_length, source.schema)
    table = table.with_format("arrow")
    is_classified = classification is not None
    content = _read_parts(table, parts, is_classified)
    parts = parts._replace(lengths=np.where(content.has_target, parts.lengths, 0))
    counted, equal, note = parts, list[int](), ""
    if source.schema == "preference":
        parts, counted, equal, answers = pair_parts(table, parts)
        note = f", answers of {answers[0]:.1f} tokens chosen and {answers[1]:.1f} rejected"
    kept = np.flatnonzero(parts.lengths)
    if not len(kept):
        is_cut = bool(columns["length"].any())
        raise _nothing_left(source, config.max_length, is_cut)
    report = _origin(name, rows, source.schema if is_chosen else None)
    report += _lengths_report(
        config.max_length, rows.rows, counted, columns, table["remarks"], equal
    )
    report += note + _blank_report(rows.rows, source.schema)
    if reads_date(source.schema, tokenizer):
        report += f", the chat template's date is {config.date} (data.date)"
    if rows.skipped:
        report += f"; skipped {skipped_text(rows.skipped)}"
    lengths = parts.lengths[kept]
    numbers = np.array([*lengths, source.expert_group], np.int64)
    digest = _digest(*content.digests, numbers.tobytes())
    labels = np.asarray(columns["label"][parts.rows[kept]], np.float32)
    if source.schema == "feedback":
        report += count_labels(labels, source.title)
    if is_classified or source.schema in PREFERENCE_SCHEMAS:
        digest = _digest(digest.encode(), labels.tobytes())
    return TokenizedSource(
        name=name,
        schema=source.schema,
        table=table.select_columns(["tokens", "is_target", "label"]),
        kept=parts.rows[kept],
        starts=parts.starts[kept],
        lengths=lengths,
        labels=labels,
        digest=digest,
        largest_token=content.largest_token,
        expert_group=source.expert_group,
        is_classified=is_classified,
        report=report,
    )


def _with_schema(
    source: SourceConfig,
    config: DataConfig,
    classification: ClassificationConfig | None,
    preference: PreferenceConfig | None,
) -> SourceConfig:
    if preference is not None:
        return with_schema(source, config.cache_dir, (preference.schema,))
    schemas = COLUMN_SCHEMAS if classification is None else ("classification",)
    source = with_schema(source, config.cache_dir, schemas)
    if source.schema == "classification" and classification is None:
        raise DataError(
            f"{source.title}: the columns are those of the schema 'classification', which needs "
            "method.classification"
        )
    return source


def _nothing_left(source: SourceConfig, max_length: int, is_cut: bool) -> DataError:
    """Error of a data set without a target; `is_cut` if longer rows could have one."""
    what = "pair has two different answers" if source.schema == "preference" else "row has a target"
    remedy = "; leave the data set out, or correct its answers"
    if is_cut:
        remedy = f" within max_length={max_length} tokens; raise it or shorten the prompts"
    return DataError(f"{source.title}: no {what}{remedy}")


def cut_rows(lengths: np.ndarray, max_length: int, schema: Schema) -> Parts:
    """Cuts rows of these numbers of tokens into parts of at most `max_length`.

    Raw text is divided; the end of other rows is left out.
    """
    if schema != "text":
        starts = np.zeros_like(lengths)
        kept = np.minimum(lengths, max_length)
        return Parts(np.arange(len(lengths)), starts, kept, lengths > max_length)
    counts = np.maximum(-(-(lengths - 1) // (max_length - 1)), 1)
    rows = np.repeat(np.arange(len(lengths)), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    starts = (np.arange(len(rows)) - firsts) * (max_length - 1)
    kept = np.minimum(lengths[rows] - starts, max_length)
    return Parts(rows, starts, kept, np.zeros(len(rows), bool))


def target_mask(is_target: np.ndarray, *, is_classified: bool = False) -> np.ndarray:
    """Loss mask of a part: its targets without the first token, which no token precedes.

    Of a row to classify, the last token is the only target.
    """
    mask = np.zeros_like(is_target)
    first = -1 if is_classified else 1
    mask[first:] = is_target[first:]
    return mask


class _Content(NamedTuple):
    """Content of the parts of a table.

    Attributes:
      has_target: whether each part has a target.
      digests: digests of the ids and of the masks of the parts that have one.
      largest_token: largest id among them.
    """

    has_target: np.ndarray
    digests: tuple[bytes, bytes]
    largest_token: int


def _read_parts(table: datasets.Dataset, parts: Parts, is_classified: bool) -> _Content:
    """Reads the whole table once; the masks are those of `target_mask`."""
    tokens, masks, largest = hashlib.sha256(), hashlib.sha256(), 0
    has_target = np.zeros(len(parts.rows), bool)
    row = 0
    for batch in _batches(table):
        ids, targets = flat_values(batch["tokens"]), flat_values(batch["is_target"])
        sizes = list_lengths(batch["tokens"])
        mine = slice(*np.searchsorted(parts.rows, [row, row + len(sizes)]))
        starts = (np.cumsum(sizes) - sizes)[parts.rows[mine] - row] + parts.starts[mine]
        lengths = parts.lengths[mine]
        row += len(sizes)
        # The tokens of all parts, one after another.
        firsts = np.cumsum(lengths) - lengths
        places = np.arange(lengths.sum()) + np.repeat(starts - firsts, lengths)
        mask = targets[places]
        filled = lengths > 0
        if is_classified:
            mask[:] = False
            mask[(firsts + lengths)[filled] - 1] = True
        else:
            mask[firsts[filled]] = False
        counts = np.concatenate([[0], np.cumsum(mask)])
        found = counts[firsts + lengths] > counts[firsts]
        has_target[mine] = found
        kept = np.repeat(found, lengths)
        tokens.update(ids[places[kept]].tobytes())
        masks.update(mask[kept].tobytes())
        largest = max(largest, int(ids[places[kept]].max(initial=0)))
    return _Content(has_target, (tokens.digest(), masks.digest()), largest)


def _batches(table: datasets.Dataset) -> Iterator[Any]:
    for start in range(0, len(table), _BATCH_ROWS):
        yield table[start : start + _BATCH_ROWS]


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def _origin(name: str, rows: RowTable, schema: Schema | None) -> str:
    """Numbers of rows and files, and the schema if the columns told it."""
    if rows.origin is not None:
        return f"{name}: {rows.origin}"
    files = "" if rows.files is None else f" of {rows.files} file{'s' * (rows.files != 1)}"
    chosen = "" if schema is None else f" (schema {schema!r}, by their columns)"
    return f"{name}: {len(rows.rows)} rows{files}{chosen}"


def _lengths_report(
    max_length: int,
    rows: datasets.Dataset,
    parts: Parts,
    columns: dict[str, np.ndarray],
    remarks: pa.ChunkedArray,
    equal: list[int],
) -> str:
    """Numbers of rows by length, and of those with a remark, each with the first such row.

    Args:
      max_length: largest number of tokens of a row.
      rows: rows of the data set.
      parts: parts of the encoded rows, or of pairs of them.
      columns: number of tokens and index of the row of each encoded row.
      remarks: remarks on each encoded row.
      equal: first rows of pairs whose answers are equal; see `PairedParts`.
    """
    lengths = parts.lengths
    kept = int((lengths > 0).sum())
    # An encoded row without tokens has a remark that says why.
    dropped = parts.rows[(lengths == 0) & (columns["length"][parts.rows] > 0)].tolist()
    texts = [""]
    if len(lengths) > len(rows):
        texts.append(f"{len(lengths)} after dividing long ones")
    texts.append(f"{int(parts.truncated.sum())} truncated to {max_length} tokens")
    counted = {
        "dropped without a remaining target": sorted({*dropped} - {*equal}),
        "dropped with answers that are equal where they are cut": equal,
    }
    lists = remarks.combine_chunks()
    indices = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
    for index, remark in zip(indices.tolist(), lists.flatten().to_pylist(), strict=True):
        counted.setdefault(f"with {remark}", []).append(index)
    for remark, found in counted.items():
        if not found:
            continue
        first = rows[int(columns["row"][found[0]])]["where"]
        texts.append(f"{len(found)} {remark} (first: {first})")
    if len(dropped) * 10 > len(lengths):
        texts.append(
            f"WARNING: {len(dropped) / len(lengths):.0%} of the rows are lost by their length; "
            "raise max_length"
        )
    texts.append(f"{lengths.sum() / kept:.1f} tokens a row")
    return ", ".join(texts)


def _blank_report(rows: datasets.Dataset, schema: Schema) -> str:
    """Number and first of the rows whose target is blank; empty if there are none."""
    field = TARGET_FIELDS.get(schema)
    if field is None:
        return ""
    count, first = 0, None
    batches: Any = rows.select_columns([field, "where"]).with_format("arrow").iter(10_000)
    for batch in batches:
        trimmed = pc.call_function("utf8_trim_whitespace", [batch[field]])
        blank = batch["where"].filter(pc.call_function("equal", [trimmed, pa.scalar("")]))
        first = blank[0] if first is None and len(blank) else first
        count += len(blank)
    note = f", {count} with a blank {field} (kept: the model learns to end there; first: {first})"
    return note if count else ""
