"""Between the engine's rows and a call: rows as arrays, and results as records of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.serving.adapter_slots import FilledSlots, SlotLayout, fill_slots
from moe_jax.serving.answer import AnswerRequest, TokenExperts, TokenRecord
from moe_jax.serving.model_calls import Call, Routed
from moe_jax.serving.row_sampling import Chosen, RowSettings
from moe_jax.serving.row_table import Row, RowTable
from moe_jax.serving.serving_model import ServingModel


class CallRows(NamedTuple):
    """The rows of a call, with the arrays that stay the same while none joins, grows or leaves.

    They are arrays of numpy: jit copies these faster to the device than `device_put`.

    Attributes:
      rows: rows in the order of the call.
      slots: adapters of the call.
      places, tables, windows: see `Call`.
      settings: settings of the rows.
    """

    rows: tuple[Row, ...]
    slots: FilledSlots
    places: Any
    tables: Any
    windows: Any
    settings: RowSettings

    def prompt_call(self, parts: Sequence[Sequence[int]], width: int) -> Call:
        """The call with a part of each row's prompt, padded to the layout and to `width`."""
        size = self.slots.layout.size
        tokens, mask = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
        for index, part in enumerate(parts):
            tokens[index, : len(part)] = part
            mask[index, : len(part)] = True
        return self._call(tokens, mask)

    def decoding_call(self, newest: jax.Array | None = None) -> Call:
        """The call with one token of each row: `newest`, int32 [B], or the last of its answer."""
        size, count = self.slots.layout.size, len(self.rows)
        if newest is not None:
            tokens: Any = newest
        else:
            tokens = np.zeros(size, np.int32)
            tokens[:count] = [row.answer.generated[row.chosen - 1] for row in self.rows]
        return self._call(tokens, (np.arange(size) < count)[:, None])

    def _call(self, tokens: Any, mask: np.ndarray) -> Call:
        lengths, prompts = np.zeros((2, len(mask)), np.int32)
        count = len(self.rows)
        lengths[:count] = [row.cached for row in self.rows]
        prompts[:count] = [len(row.answer.request.tokens) for row in self.rows]
        known = np.maximum(prompts, lengths + mask.sum(axis=1, dtype=np.int32))
        return Call(tokens, mask, self.places, self.tables, lengths, known, self.windows)


def call_rows(
    model: ServingModel, table: RowTable, layouts: Sequence[SlotLayout], rows: Sequence[Row]
) -> CallRows:
    """Orders rows by their adapters, in the first of these layouts that holds them."""
    requests = [row.answer.request for row in rows]
    slots = fill_slots(layouts, model.methods, [request.adapter for request in requests])
    places = dict(zip(slots.order, rows, strict=True))
    ordered = tuple(places[place] for place in range(len(rows)))
    size = slots.layout.size
    return CallRows(
        ordered,
        slots,
        table.slots(ordered, size),
        table.tables(ordered, size),
        slots.windows,
        row_settings([row.answer.request for row in ordered], size, model.vocab_size),
    )


def row_settings(requests: Sequence[AnswerRequest], size: int, vocab_size: int) -> RowSettings:
    """Settings of a call's rows; rows of padding are greedy."""
    padding = size - len(requests)

    def array(values: Sequence[Any], filler: Any, dtype: Any) -> np.ndarray:
        return np.array([*values, *[filler] * padding], dtype)

    def floats(name: str, filler: float) -> np.ndarray:
        return array([getattr(request, name) for request in requests], filler, np.float32)

    return RowSettings(
        temperature=floats("temperature", 0),
        top_k=array(
            [min(r.top_k or vocab_size, vocab_size) for r in requests], vocab_size, np.int32
        ),
        top_p=floats("top_p", 1),
        min_p=floats("min_p", 0),
        repetition_penalty=floats("repetition_penalty", 1),
        presence_penalty=floats("presence_penalty", 0),
        frequency_penalty=floats("frequency_penalty", 0),
        seed=array([request.seed for request in requests], 0, np.uint32),
        sample=array([request.sample for request in requests], 0, np.int32),
        wants_logprobs=array([r.logprobs is not None for r in requests], False, bool),
    )


def chosen_record(chosen: Chosen, place: int, wanted: int) -> TokenRecord:
    """The token of the row at `place` of a call, with `wanted` alternatives."""
    return _record(int(chosen.tokens[place]), tuple(field[place] for field in chosen[1:]), wanted)


def scored_record(scores: tuple[np.ndarray, ...], place: int, wanted: int) -> TokenRecord:
    """The token of a prompt at `place` of the results of `ServingModel.score`."""
    targets, *fields = scores
    return _record(int(targets[0, place]), tuple(field[0, place] for field in fields), wanted)


def _record(token: int, scores: tuple[Any, ...], wanted: int) -> TokenRecord:
    logprob, top_tokens, top_logprobs = scores
    top = zip(top_tokens[:wanted].tolist(), top_logprobs[:wanted].tolist(), strict=True)
    return TokenRecord(token, float(logprob), tuple(top))


def token_routing(
    slots: FilledSlots, routing: Mapping[str, Routed], place: int
) -> TokenExperts | None:
    """Routing of the row at `place` of a call; None if its adapter has no router."""
    for name, window in slots.windows.items():
        row = place - int(window.first)
        if name not in routing or not 0 <= row < len(window.mask) or not window.mask[row]:
            continue
        weights, load = (part[:, row] for part in routing[name])
        experts, shares = [], []
        for layer_weights, layer_load in zip(weights, load, strict=True):
            order = np.argsort(-layer_weights, kind="stable")
            chosen = order[layer_load[order] > 0]
            experts.append(chosen.tolist())
            shares.append(layer_weights[chosen].tolist())
        return TokenExperts(experts, shares)
    return None
