"""Pure functions to compile: the training step, and what validation measures."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.adapters.routing.statistics import RouterStatistics
from moe_jax.adapters.rows import AdapterRows, take_rows
from moe_jax.adapters.score_head import is_classifier
from moe_jax.config.preference import ROWS_PER_EXAMPLE, PreferenceConfig
from moe_jax.data.batch import Batch
from moe_jax.layers.names import ADAPTERS, PARAMS
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.step.forward import forward
from moe_jax.training.step.frozen_pass import (
    FrozenLogProbs,
    Preferences,
    frozen_log_probs,
    learned_batch,
    learned_rows,
)
from moe_jax.training.step.loss import (
    adapter_losses,
    first_targets,
    label_losses,
    sum_by_row,
    target_counts,
)
from moe_jax.training.step.optimizer import LossScale, finite_check_state, next_loss_scale
from moe_jax.training.step.preference_loss import (
    Sums,
    answer_log_probs,
    example_sums,
    kl_estimate,
    loss_of_sums,
    preference_metrics,
    preference_totals,
)
from moe_jax.training.step.router_metrics import routing_summary
from moe_jax.training.step.state import TrainState

Metrics = dict[str, jax.Array]


def train_step(
    model: LlamaForCausalLM,
    optimizer: optax.GradientTransformation,
    dropout_seed: int,
    state: TrainState,
    params: Any,
    batch: Batch,
    *,
    packed: bool = False,
    preferences: Preferences = MappingProxyType({}),
) -> tuple[TrainState, Metrics]:
    """One optimizer step over all micro-batches.

    The loss of an adapter is the mean cross-entropy over its target tokens of the whole batch (for
    a classifier the mean over its rows, for a regression the mean squared error, with a preference
    loss the mean over its examples), plus its router losses averaged over the micro-batches. The
    losses of different adapters are added: they share no parameter, so that neither affects the
    other.

    Args:
      model: with the adapter rows of one micro-batch.
      optimizer: transform from `build_optimizer`.
      dropout_seed: seed of dropout and jitter, which differ by step and micro-batch.
      state: training state.
      params: the frozen base parameters; not differentiated.
      batch: arrays [M, B, S]; M micro-batches.
      packed: see `forward`.
      preferences: losses of the adapters that learn from preference data.

    Returns:
      The new state, and metrics named `adapter/metric`: scalars, and arrays by layer of the routers
      (see `routing_summary`).
    """
    step_key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)
    frozen = _frozen_log_probs(model, state, params, preferences, batch, packed)
    whole, whole_model = batch, model
    if preferences:
        batch = jax.vmap(functools.partial(learned_batch, model.adapter_rows, preferences))(batch)
        model = model.clone(adapter_rows=learned_rows(model.adapter_rows, preferences))
    totals = _totals(model, preferences, batch, frozen)

    def objective(
        adapters: Any, micro: Batch, scores: dict[str, FrozenLogProbs], index: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, dict[str, Sums]]]:
        key = jax.random.fold_in(step_key, index)
        outputs, statistics = forward(
            model, params, adapters, micro, dropout_key=key, packed=packed
        )
        losses = adapter_losses(model.adapter_rows, outputs, micro)
        first_micro = micro._replace(loss_mask=first_targets(micro.loss_mask))
        first_losses = adapter_losses(model.adapter_rows, outputs, first_micro)
        total, metrics, sums = jnp.float32(0.0), Metrics(), dict[str, Sums]()
        for rows in model.adapter_rows:
            name = rows.name
            if name in preferences:
                loss, found, sums[name] = _preference_loss(
                    rows, preferences[name], losses[name], scores[name], micro, totals
                )
            else:
                loss, found = _supervised_loss(rows, losses[name], first_losses[name], totals)
            sites = statistics.get(name, {})
            router_loss, router_metrics = _router_terms(rows, sites, batch.tokens.shape[0])
            metrics |= found | router_metrics
            scale = state.loss_scale.get(name)
            loss = loss + router_loss
            total = total + (loss if scale is None else loss * scale.scale)
        return total, (metrics, sums)

    gradients, (metrics, sums) = _accumulate(objective, state.adapters, batch, frozen)
    for name, of_adapter in sums.items():
        means = preference_metrics(of_adapter)
        metrics |= {f"{name}/{metric}": value for metric, value in means.items()}
    gradients = _unscaled(gradients, state.loss_scale)
    new_state = apply_gradients(optimizer, state, params, gradients)
    return new_state, metrics | _step_metrics(
        whole_model, new_state, gradients, whole, totals.targets
    )


class _Totals(NamedTuple):
    """Numbers of a whole batch [M, B, S] that losses are divided by or compared with, by adapter.

    Attributes:
      targets: number of targets, see `target_counts`.
      firsts: number of first tokens of answers.
      preferences: see `preference_totals`.
      kl: see `AnswerLogProbs.kl`.
    """

    targets: dict[str, jax.Array]
    firsts: dict[str, jax.Array]
    preferences: dict[str, dict[str, jax.Array]]
    kl: dict[str, jax.Array]


def _totals(
    model: LlamaForCausalLM,
    preferences: Preferences,
    batch: Batch,
    frozen: Mapping[str, FrozenLogProbs],
) -> _Totals:
    targets, firsts = (
        {
            rows.name: jnp.sum(target_counts(rows, _rows_of(rows, mask)))
            for rows in model.adapter_rows
        }
        for mask in (batch.loss_mask, first_targets(batch.loss_mask))
    )
    counted = {
        rows.name: preference_totals(
            preferences[rows.name], _rows_of(rows, batch.loss_mask), _rows_of(rows, batch.labels)
        )
        for rows in model.adapter_rows
        if rows.name in preferences
    }
    kl = {
        name: kl_estimate(scores.mismatched, scores.reference[:, 1::ROWS_PER_EXAMPLE])
        if preferences[name].estimates_kl
        else jnp.float32(0.0)
        for name, scores in frozen.items()
    }
    return _Totals(targets, firsts, counted, kl)


def _supervised_loss(
    rows: AdapterRows,
    losses: tuple[jax.Array, jax.Array],
    first_losses: tuple[jax.Array, jax.Array],
    totals: _Totals,
) -> tuple[jax.Array, Metrics]:
    """A micro-batch's share of an adapter's loss without router losses, and its metrics.

    Args:
      rows: rows of the adapter.
      losses: see `adapter_losses`.
      first_losses: the same of the first tokens of answers alone.
      totals: numbers of the whole batch.
    """
    name = rows.name
    loss = jnp.sum(losses[0]) / jnp.maximum(totals.targets[name], 1.0)
    metrics = {f"{name}/loss": loss}
    if not is_classifier(rows.method):
        first_loss = jnp.sum(jax.lax.stop_gradient(first_losses[0]))
        metrics[f"{name}/first_token_loss"] = first_loss / jnp.maximum(totals.firsts[name], 1.0)
    return loss, metrics


def _preference_loss(
    rows: AdapterRows,
    preference: PreferenceConfig,
    losses: tuple[jax.Array, jax.Array],
    scores: FrozenLogProbs,
    batch: Batch,
    totals: _Totals,
) -> tuple[jax.Array, Metrics, Sums]:
    """A micro-batch's share of an adapter's preference loss, its metrics, and sums of others."""
    labels, kl = take_rows(rows, batch.labels), totals.kl[rows.name]
    answers = answer_log_probs(preference, losses, scores.reference, labels, kl)
    sums = example_sums(preference, answers)
    loss = loss_of_sums(preference, sums, totals.preferences[rows.name])
    return loss, {f"{rows.name}/loss": loss}, sums


def _frozen_log_probs(
    model: LlamaForCausalLM,
    state: TrainState,
    params: Any,
    preferences: Preferences,
    batch: Batch,
    packed: bool,
) -> dict[str, FrozenLogProbs]:
    """`frozen_log_probs` of each micro-batch, with a leading axis [M]."""
    if not preferences:
        return {}

    def score(micro: Batch) -> dict[str, FrozenLogProbs]:
        return frozen_log_probs(
            model, params, state.adapters, state.references, preferences, micro, packed=packed
        )

    return jax.lax.map(score, batch)


def _accumulate(objective: Callable[..., Any], adapters: Any, *scanned: Any) -> tuple[Any, Any]:
    """Gradients and results of `objective(adapters, *scanned[m], m)`, summed over micro-batches m.

    Args:
      objective: function to a loss and further results.
      adapters: adapter trees, by which it is differentiated.
      *scanned: arrays with a leading axis of micro-batches.
    """

    def add(gradients: Any, scanned: Any) -> tuple[Any, Any]:
        new, results = jax.grad(objective, has_aux=True)(adapters, *scanned)
        return jax.tree.map(jnp.add, gradients, new), results

    zeros = jax.tree.map(jnp.zeros_like, adapters)
    count = jax.tree.leaves(scanned)[0].shape[0]
    gradients, parts = jax.lax.scan(add, zeros, (*scanned, jnp.arange(count)))
    return gradients, jax.tree.map(lambda values: jnp.sum(values, axis=0), parts)


def _step_metrics(
    model: LlamaForCausalLM,
    state: TrainState,
    gradients: Mapping[str, Any],
    batch: Batch,
    targets: Mapping[str, jax.Array],
) -> Metrics:
    """Metrics of the optimizer step and of the batch [M, B, S]."""
    metrics = Metrics()
    starts = (batch.segment_ids != 0) & (batch.positions == 0)
    for rows in model.adapter_rows:
        name = rows.name
        check = finite_check_state(state.opt_state, name)
        metrics[f"{name}/grad_norm"] = optax.tree.norm(gradients[name])
        metrics[f"{name}/target_tokens"] = targets[name]
        metrics[f"{name}/sequences"] = jnp.sum(_rows_of(rows, starts), dtype=jnp.float32)
        metrics[f"{name}/skipped_in_a_row"] = check.notfinite_count
        metrics[f"{name}/skipped_total"] = check.total_notfinite
        if name in state.loss_scale:
            metrics[f"{name}/loss_scale"] = state.loss_scale[name].scale
    metrics["tokens"] = jnp.sum(batch.segment_ids != 0, dtype=jnp.float32)
    metrics["padding_share"] = 1.0 - metrics["tokens"] / batch.tokens.size
    return metrics


def _rows_of(rows: AdapterRows, array: jax.Array) -> jax.Array:
    """An adapter's rows of an array [M, B, ...]."""
    return jax.vmap(functools.partial(take_rows, rows))(array)


def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, params: Any, gradients: Any
) -> TrainState:
    """The state after one optimizer step with the adapters' gradients `{name: tree}`."""
    # The branch of the base is `set_to_zero`, which never reads its gradient. The parameters only
    # give the tree its structure, and XLA removes the unused zeros.
    updates: Any
    updates, opt_state = optimizer.update(
        {PARAMS: params, ADAPTERS: gradients},
        state.opt_state,
        {PARAMS: params, ADAPTERS: state.adapters},
    )
    loss_scale = {
        name: next_loss_scale(scale, finite_check_state(opt_state, name).last_finite)
        for name, scale in state.loss_scale.items()
    }
    adapters: Any = optax.apply_updates(state.adapters, updates[ADAPTERS])
    return TrainState(
        step=state.step + 1,
        adapters=adapters,
        opt_state=opt_state,
        loss_scale=loss_scale,
        references=state.references,
    )


def eval_step(
    model: LlamaForCausalLM, adapters: Mapping[str, Any], params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Summed loss and number of targets of a batch [B, S] of one adapter or of the base; scalars.

    The loss is the cross-entropy in nats, or the squared error of a regression.
    """
    outputs, _ = forward(model, params, adapters, batch)
    if model.adapter_rows:
        ((losses, counts),) = adapter_losses(model.adapter_rows, outputs, batch).values()
    else:
        losses, counts = sum_by_row(outputs.token_losses, batch)
    return jnp.sum(losses), jnp.sum(counts)


def answer_step(
    model: LlamaForCausalLM, adapters: Mapping[str, Any], params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and number of tokens of the answer of each row of a batch [B, S].

    All rows belong to one adapter, or to the base.

    Returns:
      Two float32 [B].
    """
    outputs, _ = forward(model, params, adapters, batch)
    losses, counts = sum_by_row(outputs.token_losses, batch)
    return -losses, counts


def score_step(
    model: LlamaForCausalLM, adapters: Mapping[str, Any], params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Loss and scores of each row of a batch [B, S] of one classification adapter.

    Returns:
      float32 [B], 0 for rows without a label, and float32 [B, N].
    """
    outputs, _ = forward(model, params, adapters, batch)
    (scores,) = outputs.scores.values()
    losses, _ = label_losses(scores, batch)
    return losses, scores


def _router_terms(
    rows: AdapterRows, sites: dict[str, RouterStatistics], micro_batches: int
) -> tuple[jax.Array, Metrics]:
    """A micro-batch's share of an adapter's router losses, weighted and summed, and its metrics."""
    name, total, metrics = rows.name, jnp.float32(0.0), Metrics()
    if not rows.method.routes:
        return total, metrics
    if not sites:
        raise ValueError(f"adapter {name!r} routes, but sowed no statistics")
    for label, loss in rows.method.router_losses.items():
        value = sum(loss.total_loss(site) for site in sites.values()) / len(sites)
        value = jnp.asarray(value) / micro_batches
        metrics[f"{name}/{label}"] = value
        total = total + loss.coefficient * value
    for label, value in routing_summary(sites).items():
        metrics[f"{name}/{label}"] = value / micro_batches
    return total, metrics


def _unscaled(gradients: Mapping[str, Any], scales: Mapping[str, LossScale]) -> dict[str, Any]:
    """Gradients by adapter, divided by the adapter's loss scale where it has one."""
    unscaled = {
        name: jax.tree.map(lambda g, scale=scale: g / scale.scale, gradients[name])
        for name, scale in scales.items()
    }
    return {**gradients, **unscaled}
