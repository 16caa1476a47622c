"""Tables of encoded rows, made once and cached on disk.

A table holds the rows up to `STORED_LENGTH` tokens, so that runs with any smaller `max_length` read
the same one.
"""

import functools
import json
import sys
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.data.chat_template import reads_date
from moe_jax.data.encoding import encode_examples, encode_texts, make_examples
from moe_jax.data.prompt_template import PromptTemplate
from moe_jax.data.schema import label_number
from moe_jax.data.sources import RowTable
from moe_jax.data.table_cache import cache_key, cached_table, progress_bars
from moe_jax.data.tokenizer import tokenizer_digest

SHOW_PROGRESS_FROM = 20_000
"""Number of rows from which tokenizing shows a progress bar."""

STORED_LENGTH = 2048
"""Tokens of a row in a table, unless `max_length` is larger. Raw text, which is not truncated, is
stored in full."""

FEATURES = datasets.Features(
    {
        "tokens": datasets.List(datasets.Value("int32")),
        "is_target": datasets.List(datasets.Value("bool")),
        "length": datasets.Value("int32"),
        "label": datasets.Value("float32"),
        "row": datasets.Value("int64"),
        "remarks": datasets.List(datasets.Value("string")),
    }
)
"""Columns of a table. `row` is the index of an example's row; a row of a chat may give several.

A row that is longer than the stored length has one token more than that, so that it is known."""


def encoded_table(
    name: str,
    rows: RowTable,
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate | None,
    classification: ClassificationConfig | None,
) -> datasets.Dataset:
    """Table with the columns `FEATURES`, from the cache if it has one for equal inputs.

    Args:
      name: name of the data set, for the progress bar.
      rows: checked rows.
      source: data set, with its schema.
      config: largest row length, date, and cache folder.
      tokenizer: tokenizer of the base model.
      template: prompt template, for the schema `instruction`.
      classification: classes of the rows' labels, for rows to classify.

    Raises:
      DataError: a row does not fit its template, or the cache is not writable.
    """
    stored = None if source.schema == "text" else max(config.max_length, STORED_LENGTH)
    key = cache_key(
        rows.key,
        tokenizer_digest(tokenizer),
        source.schema,
        None if template is None else (template.with_input, template.without_input),
        stored,
        config.train_on_prompt,
        config.date if reads_date(source.schema, tokenizer) else None,
        None if classification is None else classification.labels,
    )
    if classification is None:
        encode = functools.partial(
            encode_batch,
            source=source,
            template=template,
            tokenizer=tokenizer,
            config=config,
            stored=stored,
        )
    else:
        assert stored is not None
        encode = functools.partial(
            _encode_labeled, classification=classification, tokenizer=tokenizer, stored=stored
        )
    workers = min(config.num_workers, len(rows.rows))
    show = len(rows.rows) >= SHOW_PROGRESS_FROM and sys.stderr.isatty()

    def make(folder: Path | None) -> datasets.Dataset:
        return rows.rows.map(
            encode,
            with_indices=True,
            batched=True,
            remove_columns=rows.rows.column_names,
            features=FEATURES,
            num_proc=workers if workers > 1 else None,
            cache_file_name=None if folder is None else str(folder / "tokens.arrow"),
            new_fingerprint=key,
            desc=f"Tokenizing {name}",
        )

    with progress_bars(show):
        return make(None) if rows.key is None else cached_table(config.cache_dir, key, make)


def encode_batch(
    batch: dict[str, list[str]],
    indices: list[int],
    *,
    source: SourceConfig,
    template: PromptTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    stored: int | None,
) -> dict[str, list]:
    """Columns `FEATURES` of a batch of checked rows.

    Args:
      batch: columns of the rows.
      indices: index of each row.
      source, template, tokenizer, config: see `encoded_table`.
      stored: tokens of a row that are needed; None is all.
    """
    assert source.schema is not None
    has_labels = source.schema == "feedback"
    examples, origins, positions = [], [], []
    for position, index in enumerate(indices):
        row = {column: values[position] for column, values in batch.items()}
        for example in make_examples(row, source.schema, template, tokenizer, config.date):
            examples.append(example)
            origins.append(index)
            positions.append(position)
    encoded = encode_examples(examples, tokenizer, config.train_on_prompt, stored)
    kept = slice(None if stored is None else stored + 1)
    tokens = [ids[kept] for ids, _ in encoded]
    return {
        "tokens": tokens,
        "is_target": [mask[kept] for _, mask in encoded],
        "length": [len(ids) for ids in tokens],
        "label": [float(batch["label"][n] == "true") if has_labels else 0.0 for n in positions],
        "row": origins,
        "remarks": [example.remarks for example in examples],
    }


def _encode_labeled(
    batch: dict[str, list[str]],
    indices: list[int],
    *,
    classification: ClassificationConfig,
    tokenizer: PreTrainedTokenizerBase,
    stored: int,
) -> dict[str, list]:
    """Columns of texts to classify; the target is their last token, wherever they are cut."""
    texts = list(zip(batch["text"], batch["text_pair"], strict=True))
    labels = [
        label_number(json.loads(label), classification, f"{where}: the label")
        for label, where in zip(batch["label"], batch["where"], strict=True)
    ]
    tokens = [ids[: stored + 1] for ids in encode_texts(texts, tokenizer)]
    return {
        "tokens": tokens,
        "is_target": [[True] * len(ids) for ids in tokens],
        "length": [len(ids) for ids in tokens],
        "label": labels,
        "row": indices,
        "remarks": [()] * len(tokens),
    }
