"""Runs texts through an adapter and keeps what its routers did."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import SavedAdapter, load_adapter
from moe_jax.config.data import Schema, SourceConfig
from moe_jax.config.model import FloatType, ModelConfig
from moe_jax.config.parse import FieldError, parse, suggest
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import CheckpointError, ConfigError, DataError
from moe_jax.hf.base_model import BaseModel, open_base, resolve_adapter
from moe_jax.inspection.forward import Batches, route_rows, routing_sites
from moe_jax.inspection.routing_report import RoutedRow, RoutingReport, Tally, merged, tally_tokens
from moe_jax.inspection.token_rows import TokenRow, read_texts, token_pieces
from moe_jax.loaded.model import build_model, load_adapters, load_params
from moe_jax.tasks.task import Task

KEEP_TOKENS = 2000
"""Of how many tokens the routing of each by itself is kept, unless told otherwise."""
MAX_LENGTH = 512
"""Tokens of a row, unless told otherwise or the base was trained on fewer."""


def inspect_routing(
    adapter: str | Path | SavedAdapter,
    data: Mapping[str, Any],
    base: str | Path | BaseModel | None = None,
    *,
    revision: str | None = None,
    site: str | None = None,
    schema: Schema = "text",
    prompt: str = "instruction",
    columns: Mapping[str, str] | None = None,
    limit: int = 200,
    max_length: int | None = None,
    keep_tokens: int = KEEP_TOKENS,
    batch_size: int = 8,
    dtype: FloatType = "float32",
) -> RoutingReport:
    """What the routers of an adapter do with texts; on one device, without dropout and jitter.

    Every token of a row counts, those of the prompt too; padding never does.

    Args:
      adapter: its folder, its hub id, or the adapter.
      data: data sets by name: a path or hub id, a `SourceConfig` or its fields, a `Task`, or a list
        of texts.
      base: its folder, its hub id, or itself in memory; None is the path it was trained with.
      revision: of a hub id.
      site: which of several routers of a layer, for example `mlp/down_proj` or `down_proj`. None is
        the first that there is of `mlp/moe`, `mlp/gate_proj`, `mlp/up_proj`, `mlp/down_proj`, and
        `q_proj`, `k_proj`, `v_proj` and `o_proj` of `self_attn`.
      schema, prompt, columns: of data sets given by their path; see `SourceConfig`.
      limit: rows of each data set, the first ones.
      max_length: tokens of a row; None is 512, or what the base was trained on if that is less.
      keep_tokens: of how many tokens, at most, the routing of each by itself is kept: the first
        ones of each data set, of all data sets equally many.
      batch_size: rows at once.
      dtype: of weights and computation.

    Raises:
      ConfigError: the adapter does not route, there is no such site, or a number is out of range.
      CheckpointError: base or adapter are missing or damaged, or do not belong together.
      DataError: a data set cannot be read, holds no text, or an id that the base has no embedding
        for.
    """
    for field, value in (("limit", limit), ("batch_size", batch_size), ("max_length", max_length)):
        if value is not None and value < 1:
            raise FieldError(field, f"must be positive, got {value}")
    if keep_tokens < 0:
        raise FieldError("keep_tokens", f"must not be negative, got {keep_tokens}")
    sources = {
        name: _source(name, value, {"schema": schema, "prompt": prompt, "columns": columns or {}})
        for name, value in data.items()
    }
    saved = adapter if isinstance(adapter, SavedAdapter) else load_adapter(resolve_adapter(adapter))
    method_name = METHODS.name_of(saved.method)
    name = method_name if isinstance(adapter, SavedAdapter) else Path(adapter).resolve().name
    if not saved.method.routes:
        raise ConfigError(
            f"adapter {name!r}: its method {method_name!r} has no router, so that there is no "
            "routing to see; give an adapter with experts"
        )
    files = _open_base(base, saved, revision)
    model = build_model(files, dtype)
    load_adapters({name: saved}, files, model, None)  # refuses the adapter of another base
    # The score head of a classifier comes after all routers.
    method = dataclasses.replace(saved.method, classification=None)
    tree = {"layers": saved.tree["layers"]}
    sites = routing_sites(model, method, tree)
    site = _choose(site, sites, name)

    length, longest = max_length or MAX_LENGTH, files.config.max_position_embeddings
    if max_length is not None and max_length > longest:
        raise FieldError(
            "max_length",
            f"{max_length} tokens, but the base was trained on {longest} positions",
        )
    tokenizer = load_tokenizer(files.folder)
    texts = read_texts(sources, tokenizer, limit=limit, max_length=min(length, longest))
    _check_tokens(texts.rows, files.config)
    params = load_params(files, model, None)
    batches = route_rows(model, method, site, params, tree, texts.rows, batch_size)
    kept = _kept(texts.rows, keep_tokens // len(data))
    tallies, parts = _gather(texts.rows, batches, kept)
    rows = []
    for place, length in kept.items():
        row = texts.rows[place]
        pieces = token_pieces(tokenizer, row.tokens.tolist())[:length]
        rows.append(RoutedRow(row.data, row.where, row.tokens[:length], pieces, *parts[place]))
    return RoutingReport(
        adapter=name,
        base=files.identity.path,
        method=method_name,
        site=site,
        sites=tuple(sites),
        data=tallies,
        rows=rows,
        notes=texts.report,
    )


def _open_base(
    base: str | Path | BaseModel | None, saved: SavedAdapter, revision: str | None
) -> BaseModel:
    if base is not None:
        return open_base(base, revision)
    try:
        return open_base(saved.base.path, revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; the adapter was trained with this path, so give the base (--base) where it "
            "is now"
        ) from None


def _source(
    name: str, value: Any, fields: Mapping[str, Any]
) -> SourceConfig | Task | Sequence[str]:
    if isinstance(value, SourceConfig | Task):
        return value
    if isinstance(value, str | Path):
        return parse(SourceConfig, {"path": str(value), **fields}, f"data.{name}")
    if isinstance(value, Mapping):
        return parse(SourceConfig, value, f"data.{name}")
    if not all(isinstance(text, str) for text in value):
        raise ConfigError(f"data.{name}: expected a path, a source's fields or a list of texts")
    return list(value)


def _choose(site: str | None, sites: Sequence[str], adapter: str) -> str:
    """The site that is meant by its name, or by the end of its name."""
    if site is None:
        return sites[0]
    meant = [known for known in sites if site in (known, known.rpartition("/")[2])]
    if not meant:
        raise ConfigError(
            f"site: adapter {adapter!r} has no router at {site!r}; {suggest(site, sites)}"
        )
    return meant[0]


def _check_tokens(rows: Sequence[TokenRow], model: ModelConfig) -> None:
    for row in rows:
        if row.tokens.max() >= model.vocab_size:
            raise DataError(
                f"{row.where}: holds the token id {row.tokens.max()}, but the base has embeddings "
                f"for {model.vocab_size} tokens only; give a base whose embeddings cover its "
                "tokenizer"
            )


def _kept(rows: Sequence[TokenRow], tokens: int) -> dict[int, int]:
    """By place, how many tokens of a row are kept, for `tokens` of each data set in all."""
    left: dict[str, int] = {}
    kept = {}
    for place, row in enumerate(rows):
        room = left.setdefault(row.data, tokens)
        if room > 0:
            kept[place] = min(room, len(row.tokens))
            left[row.data] = room - kept[place]
    return kept


def _gather(
    rows: Sequence[TokenRow], batches: Batches, kept: Mapping[int, int]
) -> tuple[dict[str, Tally], dict[int, tuple[np.ndarray, np.ndarray]]]:
    """The tally of each data set, and the weights and probabilities [L, S, E] of the kept rows."""
    tallies: dict[str, list[Tally]] = {row.data: [] for row in rows}
    parts = {}
    for places, routing, mask in batches:
        owners = [rows[place].data for place in places]
        for name in dict.fromkeys(owners):
            own = np.zeros_like(mask)
            own[: len(owners)] = np.array([owner == name for owner in owners])[:, None]
            tallies[name].append(tally_tokens(routing, mask & own))
        for number, place in enumerate(places):
            if place in kept:
                part = (slice(None), number, slice(kept[place]))
                weights, probabilities = routing.weights[part], routing.probabilities[part]
                parts[place] = (np.array(weights), np.array(probabilities))
    return {name: merged(own) for name, own in tallies.items()}, parts
