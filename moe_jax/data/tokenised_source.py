"""Token ids and loss masks of a source's rows, computed once and cached on disk.

The boundary between prompt and completion. Generation sees the prompt alone, so the ids of a row
must begin with the ids of its prompt alone. The ids of prompt and completion joined do that nearly
always, and read as the model would write them; where the two fuse into one token across the
boundary, the completion is encoded by itself, in the way that adds no space in front of it
(SentencePiece tokenizers put one before every text).

Length. A row longer than `max_length` loses its end; its completion then has no end-of-text token,
so that the model does not learn to stop there. A row without a target left is dropped and counted.
Raw text is not cut off but divided: each part begins with the last token of the part before it, as
context, so that every token is a target exactly once.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.data.chat import require_chat_template
from moe_jax.data.encoding import Example, encode_texts, make_examples
from moe_jax.data.prompt_template import PromptTemplate, load_prompt_template
from moe_jax.data.schema import label_number
from moe_jax.data.sources import ReadSource, cache_errors, digest, quiet, read_source
from moe_jax.data.tokenizer import encode, end_of_text, leading_tokens, tokenizer_digest
from moe_jax.errors import DataError

# Rows from which on tokenising takes long enough to show a progress bar.
SHOW_PROGRESS_FROM = 20_000

FEATURES = datasets.Features(
    {
        "tokens": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("bool")),
        "length": datasets.Value("int32"),
        "label": datasets.Value("float32"),
        "truncated": datasets.Value("bool"),
        "row": datasets.Value("int64"),
    }
)


@dataclass(frozen=True)
class TokenisedSource:
    """One data set as tokens.

    Attributes:
      name: the name that the configuration gives it.
      table: columns `tokens`, `loss_mask`, `label`; a dropped row is empty.
      kept: indices into `table` of the rows that have a target.
      lengths: tokens of each kept row.
      digest: of the ids, masks and lengths of the kept rows in their order, and of their group,
        whatever they were made from, where that lies, and by which versions.
      largest_token: the largest id in it.
      expert_group: the group of experts that its rows belong to.
      report: one line on what became of the rows.
    """

    name: str
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
    """Reads, checks and tokenises a data set, or takes it from the cache.

    Args:
      name: what the configuration calls it.
      source: what to read.
      config: how long its rows may be, and where tables are cached.
      tokenizer: of the base.
      read: reads the rows.
      classification: what the rows' labels are, where they are to be classified.

    Raises:
      DataError: the data set, its prompt template or the tokenizer cannot be used, or no row has a
        target within `max_length`.
    """
    end_of_text(tokenizer)
    template = load_prompt_template(source.prompt) if source.schema == "instruction" else None
    if source.schema == "chat":
        require_chat_template(tokenizer, source.path)
    rows, rows_digest = read(source, config.cache_dir)
    table_digest = digest(
        rows_digest,
        tokenizer_digest(tokenizer),
        source.schema,
        None if template is None else (template.with_input, template.without_input),
        config.max_length,
        config.train_on_prompt,
        None if classification is None else classification.labels,
    )
    workers = min(config.num_workers, len(rows))
    show = len(rows) >= SHOW_PROGRESS_FROM and sys.stderr.isatty()
    with quiet(show), cache_errors(config.cache_dir):
        table = rows.map(
            functools.partial(
                _tokenise_batch,
                source=source,
                template=template,
                tokenizer=tokenizer,
                max_length=config.max_length,
                train_on_prompt=config.train_on_prompt,
            )
            if classification is None
            else functools.partial(
                _tokenise_labelled,
                classification=classification,
                tokenizer=tokenizer,
                max_length=config.max_length,
            ),
            with_indices=True,
            batched=True,
            remove_columns=rows.column_names,
            features=FEATURES,
            num_proc=workers if workers > 1 else None,
            new_fingerprint=table_digest,
            desc=f"Tokenising {name}",
        )
    facts = table.select_columns(["length", "label", "truncated", "row"]).with_format("numpy")[:]
    kept = np.flatnonzero(facts["length"] > 0)
    dropped = np.flatnonzero(facts["length"] == 0)
    if not len(kept):
        raise DataError(
            f"{source.title}: no row has a target within max_length={config.max_length} tokens; "
            "raise it or shorten the prompts"
        )
    first = rows[int(facts["row"][dropped[0]])]["where"] if len(dropped) else None
    table = table.select_columns(["tokens", "loss_mask", "label"]).with_format("arrow")
    lengths = facts["length"][kept]
    content, largest_token = _content(table, lengths, source.expert_group)
    if classification is not None:
        content = digest_of_labels(content, facts["label"][kept])
    return TokenisedSource(
        name=name,
        table=table,
        kept=kept,
        lengths=lengths,
        digest=content,
        largest_token=largest_token,
        expert_group=source.expert_group,
        report=_report(name, config.max_length, len(rows), facts, first),
    )


def _content(table: datasets.Dataset, lengths: np.ndarray, expert_group: int) -> tuple[str, int]:
    """A digest of all ids, masks, kept rows' lengths and their group, and the largest id.

    A dropped row is empty, so that it leaves no trace here, as it leaves none in a batch.
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


def digest_of_labels(content: str, labels: np.ndarray) -> str:
    """A digest of `content`, itself one, and of the labels."""
    parts = [content.encode(), np.asarray(labels, np.float32).tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def flat_values(column: pa.ChunkedArray) -> np.ndarray:
    """The values of a column of lists, one list after the other, in one array."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _report(
    name: str, max_length: int, rows: int, facts: dict[str, np.ndarray], first_dropped: str | None
) -> str:
    lengths = facts["length"]
    kept, dropped = int((lengths > 0).sum()), int((lengths == 0).sum())
    parts = [f"{name}: {rows} rows"]
    if len(lengths) > rows:
        parts.append(f"{len(lengths)} after dividing long ones")
    parts.append(f"{int(facts['truncated'].sum())} truncated to {max_length} tokens")
    if dropped:
        parts.append(f"{dropped} dropped without a target left (first: {first_dropped})")
    if dropped * 10 > len(lengths):
        parts.append(
            f"WARNING: {dropped / len(lengths):.0%} of the rows are lost; raise max_length"
        )
    parts.append(f"{lengths.sum() / kept:.1f} tokens a row")
    return ", ".join(parts)


def _tokenise_batch(
    batch: dict[str, list[str]],
    indices: list[int],
    *,
    source: SourceConfig,
    template: PromptTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on_prompt: bool,
) -> dict[str, list]:
    examples, origins = [], []
    for place, index in enumerate(indices):
        row = {column: values[place] for column, values in batch.items()}
        for example in make_examples(row, source.schema, template, tokenizer):
            examples.append(example)
            origins.append(index)
    out: dict[str, list] = {column: [] for column in FEATURES}
    encoded = encode_examples(examples, tokenizer, train_on_prompt)
    for origin, (tokens, loss_mask) in zip(origins, encoded, strict=True):
        step = max_length - 1
        parts = range(0, max(len(tokens) - 1, 1), step) if source.schema == "text" else range(1)
        for start in parts:
            kept_tokens = tokens[start : start + max_length]
            # Nothing precedes a row's first token, so nothing predicts it.
            kept_mask = [False, *loss_mask[start + 1 : start + max_length]]
            has_target = any(kept_mask)
            out["tokens"].append(kept_tokens if has_target else [])
            out["loss_mask"].append(kept_mask if has_target else [])
            out["length"].append(len(kept_tokens) if has_target else 0)
            out["label"].append(0.0)
            out["truncated"].append(source.schema != "text" and len(tokens) > max_length)
            out["row"].append(origin)
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
    }


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool
) -> list[tuple[list[int], list[bool]]]:
    """Token ids and loss mask of each example, whole.

    The mask is true at tokens of a target piece and at the end-of-text token; with
    `train_on_prompt` at every token, whose first one still has nothing that could predict it.
    """
    grown = [text for example in examples for text in accumulate(p.text for p in example.pieces)]
    flat = iter(encode(tokenizer, grown))
    leading, end = leading_tokens(tokenizer), end_of_text(tokenizer)
    encoded = []
    for example in examples:
        tokens = list(leading) if example.leads else []
        loss_mask = [train_on_prompt] * len(tokens)
        ids_before: list[int] = []
        for piece in example.pieces:
            ids = next(flat)
            if ids[: len(ids_before)] == ids_before:
                new = ids[len(ids_before) :]
            else:
                new = _encode_continuation(ids_before, piece.text, ids, tokenizer)
            tokens += new
            loss_mask += [piece.is_target or train_on_prompt] * len(new)
            ids_before = ids
        if example.ends:
            tokens.append(end)
            loss_mask.append(True)
        encoded.append((tokens, loss_mask))
    return encoded


def _encode_continuation(
    ids_before: list[int], text: str, ids_joint: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Ids of `text` alone that read as its text where they follow `ids_before`.

    The first of three ways whose decoded text is right: by itself (byte-level tokenizers), after a
    line break, and after an end-of-text token (tokenizers that mark the start of a text). Unicode
    normalisation across the boundary can leave none of them exact; by itself is then the nearest.
    """
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    wanted = decode(ids_joint)
    alone, newline, after_newline, after_end = encode(
        tokenizer, [text, "\n", "\n" + text, str(tokenizer.eos_token) + text]
    )
    candidates = [alone]
    if after_newline[: len(newline)] == newline:
        candidates.append(after_newline[len(newline) :])
    if after_end[:1] == [end_of_text(tokenizer)]:
        candidates.append(after_end[1:])
    for candidate in candidates:
        if decode(ids_before + candidate) == wanted:
            return candidate
    return alone
