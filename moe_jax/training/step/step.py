"""Pure functions to compile: the training step, evaluation losses, scores of a classifier."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.adapters.routing.statistics import RouterStatistics, collect_statistics
from moe_jax.adapters.rows import AdapterRows, take_rows
from moe_jax.adapters.score_head import is_classifier
from moe_jax.data.batch import Batch
from moe_jax.layers.names import ADAPTERS, PARAMS, ROUTER
from moe_jax.models.adapted import apply
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.step.loss import (
    adapter_losses,
    first_targets,
    head_outputs,
    label_losses,
    sum_by_row,
    target_counts,
)
from moe_jax.training.step.optimizer import LossScale, finite_check_state, next_loss_scale
from moe_jax.training.step.router_metrics import routing_summary
from moe_jax.training.step.state import TrainState

Metrics = dict[str, jax.Array]


def forward(
    model: LlamaForCausalLM,
    params: Any,
    adapters: Mapping[str, Any],
    batch: Batch,
    heads: Callable[[LlamaForCausalLM, jax.Array, Batch], Any] = head_outputs,
    *,
    dropout_key: jax.Array | None = None,
    packed: bool = False,
) -> tuple[Any, dict[str, dict[str, RouterStatistics]]]:
    """Runs the model on a batch.

    Args:
      model: with the adapter rows of `batch`.
      params: the frozen base parameters.
      adapters: adapter trees by name.
      batch: [B, S]; rows of one sequence each, padded on the right (causality hides the padding).
      heads: maps the bound model, its hidden states and the batch to the result.
      dropout_key: random key of dropout and jitter; None turns both off.
      packed: rows may hold several sequences, which attention then separates by a mask.

    Returns:
      The result of `heads`, and the router statistics of the adapters that route, by name and site.
    """

    def compute(module: LlamaForCausalLM) -> Any:
        hidden = module.hidden_states(
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids if packed else None,
            token_mask=batch.segment_ids != 0,
            expert_groups=batch.expert_groups,
        )
        return heads(module, hidden, batch)

    model = model.clone(deterministic=dropout_key is None)
    result, sown = apply(
        model, params, adapters, compute, mutable=[ROUTER], dropout_key=dropout_key
    )
    routed = any(rows.method.routes for rows in model.adapter_rows)
    return result, collect_statistics(sown) if routed else {}


def train_step(
    model: LlamaForCausalLM,
    optimizer: optax.GradientTransformation,
    dropout_seed: int,
    state: TrainState,
    params: Any,
    batch: Batch,
    *,
    packed: bool = False,
) -> tuple[TrainState, Metrics]:
    """One optimizer step over all micro-batches.

    The loss of an adapter is the mean cross-entropy over its target tokens of the whole batch (for
    a classifier the mean over its rows, for a regression the mean squared error), plus its router
    losses averaged over the micro-batches. The losses of different adapters are added: they share
    no parameter, so that neither affects the other.

    Args:
      model: with the adapter rows of one micro-batch.
      optimizer: transform from `build_optimizer`.
      dropout_seed: seed of dropout and jitter, which differ by step and micro-batch.
      state: training state.
      params: the frozen base parameters; not differentiated.
      batch: arrays [M, B, S]; M micro-batches.
      packed: see `forward`.

    Returns:
      The new state, and metrics named `adapter/metric`: scalars, and arrays by layer of the routers
      (see `routing_summary`).
    """
    step_key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)
    targets, firsts = (
        {
            rows.name: jnp.sum(target_counts(rows, _rows_of(rows, mask)))
            for rows in model.adapter_rows
        }
        for mask in (batch.loss_mask, first_targets(batch.loss_mask))
    )

    def objective(adapters: Any, micro: Batch, index: jax.Array) -> tuple[jax.Array, Metrics]:
        key = jax.random.fold_in(step_key, index)
        outputs, statistics = forward(
            model, params, adapters, micro, dropout_key=key, packed=packed
        )
        losses = adapter_losses(model.adapter_rows, outputs, micro)
        first_micro = micro._replace(loss_mask=first_targets(micro.loss_mask))
        first_losses = adapter_losses(model.adapter_rows, outputs, first_micro)
        total, metrics = jnp.float32(0.0), Metrics()
        for rows in model.adapter_rows:
            loss = jnp.sum(losses[rows.name][0]) / jnp.maximum(targets[rows.name], 1.0)
            sites = statistics.get(rows.name, {})
            router_loss, router_metrics = _router_terms(rows, sites, batch.tokens.shape[0])
            metrics |= {f"{rows.name}/loss": loss, **router_metrics}
            if not is_classifier(rows.method):
                first_loss = jnp.sum(jax.lax.stop_gradient(first_losses[rows.name][0]))
                metrics[f"{rows.name}/first_token_loss"] = first_loss / jnp.maximum(
                    firsts[rows.name], 1.0
                )
            scale = state.loss_scale.get(rows.name)
            loss = loss + router_loss
            total = total + (loss if scale is None else loss * scale.scale)
        return total, metrics

    gradients, metrics = _accumulate(objective, state.adapters, batch)
    gradients = {
        name: _unscaled(tree, state.loss_scale.get(name)) for name, tree in gradients.items()
    }
    new_state = apply_gradients(optimizer, state, params, gradients)
    return new_state, metrics | _step_metrics(model, new_state, gradients, batch, targets)


def _accumulate(
    objective: Callable[..., tuple[jax.Array, Metrics]], adapters: Any, batch: Batch
) -> tuple[Any, Metrics]:
    """Gradients and metrics of `objective(adapters, micro_batch, index)`, summed over batches."""

    def add(gradients: Any, scanned: tuple[Batch, jax.Array]) -> tuple[Any, Metrics]:
        new, metrics = jax.grad(objective, has_aux=True)(adapters, *scanned)
        return jax.tree.map(jnp.add, gradients, new), metrics

    zeros = jax.tree.map(jnp.zeros_like, adapters)
    gradients, parts = jax.lax.scan(add, zeros, (batch, jnp.arange(batch.tokens.shape[0])))
    return gradients, {name: jnp.sum(values, axis=0) for name, values in parts.items()}


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


def _unscaled(gradients: Any, scale: LossScale | None) -> Any:
    return gradients if scale is None else jax.tree.map(lambda g: g / scale.scale, gradients)
