"""Routing of texts through an adapter: `inspect_routing`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from moe_jax.adapters import METHODS
from moe_jax.adapters.new_tokens import total_vocab_size
from moe_jax.checkpoints.adapter_files import SavedAdapter, load_adapter
from moe_jax.config.data import SourceConfig
from moe_jax.config.model import FloatType, ModelConfig
from moe_jax.config.parse import FieldError, parse, suggest
from moe_jax.data.new_tokens import load_extended_tokenizer
from moe_jax.errors import ConfigError, DataError
from moe_jax.hf.base_model import BaseModel, open_base, resolve_recorded
from moe_jax.inspection.forward import Batches, route_rows, routing_sites
from moe_jax.inspection.routing_report import (
    RoutedRow,
    RoutingReport,
    RoutingStatistics,
    batch_statistics,
    merge_statistics,
)
from moe_jax.inspection.token_rows import TokenRow, TokenRows, read_token_rows, token_texts
from moe_jax.loaded.inference_model import build_model, load_adapters, load_params
from moe_jax.loaded.run_adapters import resolve_adapter
from moe_jax.tasks.task import Task

_MAX_LENGTH = 512
"""Default for `InspectionOptions.max_length`, if the base was trained on at least as many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectionOptions:
    """Settings of `inspect_routing`.

    Attributes:
      limit: number of rows of each data set, from the start.
      max_length: maximum number of tokens of a row; None is 512, or the context length of the base
        if that is less.
      keep_tokens: maximum number of tokens whose routing the report keeps one by one: the first of
        each data set, in equal parts.
      batch_size: number of rows in a batch.
      dtype: dtype of weights and computation.
    """

    limit: int = 200
    max_length: int | None = None
    keep_tokens: int = 2000
    batch_size: int = 8
    dtype: FloatType = "float32"

    def __post_init__(self):
        for field in ("limit", "batch_size", "max_length"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise FieldError(field, f"must be positive, got {value}")
        if self.keep_tokens < 0:
            raise FieldError("keep_tokens", f"must not be negative, got {self.keep_tokens}")


def inspect_routing(
    adapter: str | Path | SavedAdapter,
    data: Mapping[str, Any],
    base: str | Path | BaseModel | None = None,
    *,
    revision: str | None = None,
    site: str | None = None,
    options: InspectionOptions | None = None,
) -> RoutingReport:
    """Records how the routers of an adapter distribute the tokens of texts over the experts.

    All tokens of a row count, including those of the prompt. The computation runs on one device,
    without dropout and jitter.

    Args:
      adapter: folder, hub id, or result of `moe_jax.load_adapter`.
      data: data sets by name: a path or hub id, a `SourceConfig` or its fields, a `Task`, or a
        list of texts.
      base: folder, hub id, or result of `moe_jax.load_base`; None is the path that the adapter was
        trained with.
      revision: revision of a hub id.
      site: routers to record, for example `mlp/down_proj` or `down_proj`. None is the first site
        of the adapter among `mlp/moe`, `mlp/gate_proj`, `mlp/up_proj`, `mlp/down_proj`, and
        `q_proj`, `k_proj`, `v_proj` and `o_proj` of `self_attn`.
      options: rows and computation; None is `InspectionOptions()`.

    Raises:
      ConfigError: the adapter has no router, or none at `site`, or an option is out of range.
      CheckpointError: base or adapter are missing or damaged, or do not belong together.
      DataError: a data set cannot be read, is empty, or does not fit the base's vocabulary.
    """
    options = options or InspectionOptions()
    sources = {name: _source(name, value) for name, value in data.items()}
    saved = adapter if isinstance(adapter, SavedAdapter) else load_adapter(resolve_adapter(adapter))
    method_name = METHODS.name_of(saved.method)
    name = method_name if isinstance(adapter, SavedAdapter) else Path(adapter).resolve().name
    if not saved.method.routes:
        raise ConfigError(
            f"adapter {name!r}: its method {method_name!r} has no router; give an adapter with "
            "experts"
        )
    if base is None:
        resolve_recorded(saved.base, revision)
        base = saved.base.path
    files = open_base(base, revision)
    model = build_model(files, options.dtype)
    load_adapters({name: saved}, files, model, None)  # rejects the adapter of another base
    method, tree = saved.method, saved.tree
    sites = routing_sites(model, method, tree)
    site = _select_site(site, sites, name)
    tokenizer = load_extended_tokenizer(files.folder, files.config, [method])
    vocab_size = total_vocab_size(files.config.vocab_size, [method])
    rows = _token_rows(sources, tokenizer, files.config, vocab_size, options)
    params = load_params(files, model, None)
    batches = route_rows(model, method, site, params, tree, rows.rows, options.batch_size)
    kept_lengths = _kept_lengths(rows.rows, options.keep_tokens // len(data))
    statistics, kept_routing = _collect(rows.rows, batches, kept_lengths)
    return RoutingReport(
        adapter=name,
        base=files.path,
        method=method_name,
        site=site,
        sites=tuple(sites),
        data=statistics,
        rows=_routed_rows(rows.rows, tokenizer, kept_lengths, kept_routing),
        notes=rows.report,
    )


def _source(name: str, value: Any) -> SourceConfig | Task | Sequence[str]:
    if isinstance(value, SourceConfig | Task):
        return value
    if isinstance(value, str | Path):
        value = {"path": str(value)}
    if isinstance(value, Mapping):
        return parse(SourceConfig, value, f"data.{name}")
    if not all(isinstance(text, str) for text in value):
        raise ConfigError(f"data.{name}: expected a path, a source's fields or a list of texts")
    return list(value)


def _select_site(site: str | None, sites: Sequence[str], adapter: str) -> str:
    """The site with this name, or with this last part of its name."""
    if site is None:
        return sites[0]
    matching = [known for known in sites if site in (known, known.rpartition("/")[2])]
    if not matching:
        raise FieldError(
            "site", f"adapter {adapter!r} has no router at {site!r}; {suggest(site, sites)}"
        )
    return matching[0]


def _token_rows(
    sources: Mapping[str, SourceConfig | Task | Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    model: ModelConfig,
    vocab_size: int,
    options: InspectionOptions,
) -> TokenRows:
    context = model.max_position_embeddings
    if options.max_length is not None and options.max_length > context:
        raise FieldError(
            "max_length",
            f"{options.max_length} tokens, but the base was trained on {context} positions",
        )
    length = min(options.max_length or _MAX_LENGTH, context)
    rows = read_token_rows(sources, tokenizer, limit=options.limit, max_length=length)
    for row in rows.rows:
        if row.tokens.max() >= vocab_size:
            raise DataError(
                f"{row.where}: holds the token id {row.tokens.max()}, but the base has embeddings "
                f"for {vocab_size} tokens only; give a base whose embeddings cover its "
                "tokenizer"
            )
    return rows


def _kept_lengths(rows: Sequence[TokenRow], max_tokens: int) -> dict[int, int]:
    """Number of kept tokens of each kept row, by index; at most `max_tokens` of a data set."""
    remaining: dict[str, int] = {}
    lengths = {}
    for index, row in enumerate(rows):
        available = remaining.setdefault(row.data, max_tokens)
        if available > 0:
            lengths[index] = min(available, len(row.tokens))
            remaining[row.data] = available - lengths[index]
    return lengths


def _collect(
    rows: Sequence[TokenRow], batches: Batches, kept_lengths: Mapping[int, int]
) -> tuple[dict[str, RoutingStatistics], dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Statistics of each data set, and weights and probabilities [L, S, E] of the kept rows."""
    statistics: dict[str, list[RoutingStatistics]] = {row.data: [] for row in rows}
    kept_routing = {}
    with tqdm(total=len(rows), desc="routing", unit="row", leave=False, disable=None) as bar:
        for indices, routing, mask in batches:
            data_names = [rows[index].data for index in indices]
            for name in dict.fromkeys(data_names):
                in_set = np.zeros_like(mask)
                in_set[: len(indices)] = np.array([other == name for other in data_names])[:, None]
                statistics[name].append(batch_statistics(routing, mask & in_set))
            for position, index in enumerate(indices):
                if index in kept_lengths:
                    tokens = (slice(None), position, slice(kept_lengths[index]))
                    weights, probabilities = routing.weights[tokens], routing.probabilities[tokens]
                    kept_routing[index] = (np.array(weights), np.array(probabilities))
            bar.update(len(indices))
    return {name: merge_statistics(parts) for name, parts in statistics.items()}, kept_routing


def _routed_rows(
    rows: Sequence[TokenRow],
    tokenizer: PreTrainedTokenizerBase,
    kept_lengths: Mapping[int, int],
    kept_routing: Mapping[int, tuple[np.ndarray, np.ndarray]],
) -> list[RoutedRow]:
    routed = []
    for index, length in kept_lengths.items():
        row = rows[index]
        texts = token_texts(tokenizer, row.tokens.tolist())[:length]
        routed.append(
            RoutedRow(row.data, row.where, row.tokens[:length], texts, *kept_routing[index])
        )
    return routed
