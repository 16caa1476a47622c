"""Data sets as token ids and loss masks, computed once and cached on disk.

A row longer than `max_length` loses its end; its completion then has no end-of-text token, so that
the model does not learn to stop there. A row without a remaining target is dropped and counted. Raw
text is not truncated but divided: each part begins with the last token of the part before it, as
context, so that every token is a target exactly once.
"""

import functools
import hashlib
import json
import sys
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import DataConfig, Schema, SourceConfig
from moe_jax.data.chat_template import prints_date, require_chat_template
from moe_jax.data.encoding import encode_examples, encode_texts, make_examples
from moe_jax.data.files import skipped_text
from moe_jax.data.prompt_template import PromptTemplate, load_prompt_template
from moe_jax.data.schema import label_number
from moe_jax.data.schema_choice import COLUMN_SCHEMAS
from moe_jax.data.sources import (
    ReadSource,
    RowTable,
    cache_errors,
    cache_key,
    progress_bars,
    read_source,
    with_schema,
)
from moe_jax.data.tokenizer import end_of_text, tokenizer_digest
from moe_jax.errors import DataError

SHOW_PROGRESS_FROM = 20_000
"""Number of rows from which tokenising shows a progress bar."""

TARGET_FIELDS: dict[Schema | None, str] = {
    "instruction": "output",
    "completion": "completion",
    "text": "text",
}
"""Field of a schema that is the whole target."""

FEATURES = datasets.Features(
    {
        "tokens": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("bool")),
        "length": datasets.Value("int32"),
        "label": datasets.Value("float32"),
        "truncated": datasets.Value("bool"),
        "row": datasets.Value("int64"),
        "remarks": datasets.List(datasets.Value("string")),
    }
)


@dataclass(frozen=True)
class TokenisedSource:
    """One data set as tokens.

    Attributes:
      name: name of the data set in the configuration.
      schema: schema of its rows.
      table: columns `tokens`, `loss_mask`, `label`; a dropped row is empty.
      kept: indices into `table` of the rows that have a target.
      lengths: tokens of each kept row.
      digest: digest of the ids, masks and lengths of the kept rows in their order, and of their
        group of experts; independent of file locations and library versions.
      largest_token: largest token id.
      expert_group: group of experts of the rows.
      report: line with the numbers of files and rows, of truncated, dropped and empty rows, and the
        files that were skipped.
    """

    name: str
    schema: Schema
    table: datasets.Dataset
    kept: np.ndarray
    lengths: np.ndarray
    digest: str
    largest_token: int
    expert_group: int
    report: str


def tokenise_source(
    name: str,
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    read: ReadSource = read_source,
    classification: ClassificationConfig | None = None,
) -> TokenisedSource:
    """Reads, checks and tokenises a data set, or loads it from the cache.

    Args:
      name: name of the data set in the configuration.
      source: data set to read.
      config: largest row length, and cache folder of the tables.
      tokenizer: tokenizer of the base model.
      read: reader of the rows.
      classification: classes of the rows' labels, for rows to classify.

    Raises:
      DataError: the data set, its prompt template or the tokenizer is invalid, or no row has a
        target within `max_length`.
    """
    end_of_text(tokenizer)
    is_chosen = source.schema is None
    if is_chosen:
        source = _with_schema(source, config, classification)
    assert source.schema is not None
    template = load_prompt_template(source.prompt) if source.schema == "instruction" else None
    if source.schema == "chat":
        require_chat_template(tokenizer, source.title)
    rows = read(source, config.cache_dir)
    table = _token_table(name, rows, source, config, tokenizer, template, classification)
    columns = table.select_columns(["length", "label", "truncated", "row"]).with_format("numpy")[:]
    kept = np.flatnonzero(columns["length"] > 0)
    if not len(kept):
        raise DataError(
            f"{source.title}: no row has a target within max_length={config.max_length} tokens; "
            "raise it or shorten the prompts"
        )
    table = table.with_format("arrow")
    report = _origin(name, rows, source.schema if is_chosen else None)
    report += _lengths_report(config.max_length, rows.rows, columns, table["remarks"])
    report += _blank_report(rows.rows, source.schema)
    if source.schema == "chat" and prints_date(tokenizer):
        report += f", the chat template's date is {config.date} (data.date)"
    if rows.skipped:
        report += f"; skipped {skipped_text(rows.skipped)}"
    table = table.select_columns(["tokens", "loss_mask", "label"])
    lengths = columns["length"][kept]
    digest, largest_token = _digest_and_largest(table, lengths, source.expert_group)
    if classification is not None:
        labels = np.asarray(columns["label"][kept], np.float32)
        digest = hashlib.sha256(digest.encode() + labels.tobytes()).hexdigest()[:32]
    return TokenisedSource(
        name=name,
        schema=source.schema,
        table=table,
        kept=kept,
        lengths=lengths,
        digest=digest,
        largest_token=largest_token,
        expert_group=source.expert_group,
        report=report,
    )


def _with_schema(
    source: SourceConfig, config: DataConfig, classification: ClassificationConfig | None
) -> SourceConfig:
    schemas = COLUMN_SCHEMAS if classification is None else ("classification",)
    source = with_schema(source, config.cache_dir, schemas)
    if source.schema == "classification" and classification is None:
        raise DataError(
            f"{source.title}: the columns are those of the schema 'classification', which needs "
            "method.classification"
        )
    return source


def _token_table(
    name: str,
    rows: RowTable,
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | None,
    classification: ClassificationConfig | None,
) -> datasets.Dataset:
    """Table with the columns `FEATURES`, from the cache if it has one for equal inputs."""
    key = cache_key(
        rows.key,
        tokenizer_digest(tokenizer),
        source.schema,
        None if template is None else (template.with_input, template.without_input),
        config.max_length,
        config.train_on_prompt,
        config.date if source.schema == "chat" and prints_date(tokenizer) else None,
        None if classification is None else classification.labels,
    )
    if classification is None:
        tokenise = functools.partial(
            tokenise_batch,
            source=source,
            template=template,
            tokenizer=tokenizer,
            config=config,
        )
    else:
        tokenise = functools.partial(
            _tokenise_labelled,
            classification=classification,
            tokenizer=tokenizer,
            max_length=config.max_length,
        )
    workers = min(config.num_workers, len(rows.rows))
    show = len(rows.rows) >= SHOW_PROGRESS_FROM and sys.stderr.isatty()
    with progress_bars(show), cache_errors(config.cache_dir):
        return rows.rows.map(
            tokenise,
            with_indices=True,
            batched=True,
            remove_columns=rows.rows.column_names,
            features=FEATURES,
            num_proc=workers if workers > 1 else None,
            new_fingerprint=key,
            desc=f"Tokenising {name}",
        )


def _digest_and_largest(
    table: datasets.Dataset, lengths: np.ndarray, expert_group: int
) -> tuple[str, int]:
    """Digest of all ids, masks, lengths of kept rows and their group; and the largest id.

    A dropped row is empty and so changes nothing here, as it changes nothing in a batch.
    """
    tokens, masks, largest = hashlib.sha256(), hashlib.sha256(), 0
    for start in range(0, len(table), 10_000):
        batch = table[start : start + 10_000]
        ids = flat_values(batch["tokens"])
        tokens.update(ids.tobytes())
        masks.update(flat_values(batch["loss_mask"]).tobytes())
        largest = max(largest, int(ids.max(initial=0)))
    numbers = np.array([*lengths, expert_group], np.int64)
    parts = [tokens.digest(), masks.digest(), numbers.tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32], largest


def flat_values(column: pa.ChunkedArray) -> np.ndarray:
    """Values of a column of lists, concatenated in one array."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


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
    columns: dict[str, np.ndarray],
    remarks: pa.ChunkedArray,
) -> str:
    """Numbers of rows by length, and of those with a remark, each with the first such row."""
    lengths, origins = columns["length"], columns["row"]
    kept, dropped = int((lengths > 0).sum()), np.flatnonzero(lengths == 0)
    parts = [""]
    if len(lengths) > len(rows):
        parts.append(f"{len(lengths)} after dividing long ones")
    parts.append(f"{int(columns['truncated'].sum())} truncated to {max_length} tokens")
    counted = {"dropped without a remaining target": dropped.tolist()} if len(dropped) else {}
    lists = remarks.combine_chunks()
    indices = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
    for index, remark in zip(indices.tolist(), lists.flatten().to_pylist(), strict=True):
        counted.setdefault(f"with {remark}", []).append(index)
    for remark, found in counted.items():
        first = rows[int(origins[found[0]])]["where"]
        parts.append(f"{len(found)} {remark} (first: {first})")
    if len(dropped) * 10 > len(lengths):
        parts.append(
            f"WARNING: {len(dropped) / len(lengths):.0%} of the rows are lost; raise max_length"
        )
    parts.append(f"{lengths.sum() / kept:.1f} tokens a row")
    return ", ".join(parts)


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


def tokenise_batch(
    batch: dict[str, list[str]],
    indices: list[int],
    *,
    source: SourceConfig,
    template: PromptTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> dict[str, list]:
    """Columns `FEATURES` of a batch of checked rows; `row` is one of `indices`."""
    assert source.schema is not None
    examples, origins = [], []
    for position, index in enumerate(indices):
        row = {column: values[position] for column, values in batch.items()}
        for example in make_examples(row, source.schema, template, tokenizer, config.date):
            examples.append(example)
            origins.append(index)
    max_length, divides = config.max_length, source.schema == "text"
    out: dict[str, list] = {column: [] for column in FEATURES}
    encoded = encode_examples(
        examples, tokenizer, config.train_on_prompt, None if divides else max_length
    )
    for origin, example, (tokens, loss_mask) in zip(origins, examples, encoded, strict=True):
        parts = range(0, max(len(tokens) - 1, 1), max_length - 1) if divides else range(1)
        for start in parts:
            kept_tokens = tokens[start : start + max_length]
            # No token precedes a row's first one, so it is never a target.
            kept_mask = [False, *loss_mask[start + 1 : start + max_length]]
            has_target = any(kept_mask)
            out["tokens"].append(kept_tokens if has_target else [])
            out["loss_mask"].append(kept_mask if has_target else [])
            out["length"].append(len(kept_tokens) if has_target else 0)
            out["label"].append(0.0)
            out["truncated"].append(not divides and len(tokens) > max_length)
            out["row"].append(origin)
            out["remarks"].append(example.remarks if start == 0 else ())
    return out


def _tokenise_labelled(
    batch: dict[str, list[str]],
    indices: list[int],
    *,
    classification: ClassificationConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, list]:
    texts = list(zip(batch["text"], batch["text_pair"], strict=True))
    labels = [
        label_number(json.loads(label), classification, f"{where}: the label")
        for label, where in zip(batch["label"], batch["where"], strict=True)
    ]
    encoded = encode_texts(texts, tokenizer)
    kept = [tokens[:max_length] for tokens in encoded]
    return {
        "tokens": kept,
        "loss_mask": [[False] * (len(tokens) - 1) + [True] * bool(tokens) for tokens in kept],
        "length": [len(tokens) for tokens in kept],
        "label": labels,
        "truncated": [len(tokens) > max_length for tokens in encoded],
        "row": indices,
        "remarks": [()] * len(kept),
    }
