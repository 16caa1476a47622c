"""The two functions that are compiled: a training step and an evaluation step, both pure."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.adapters.routing.statistics import RouterStatistics, collect_statistics
from moe_jax.adapters.rows import Segment, take_rows
from moe_jax.adapters.score_head import Predictions
from moe_jax.adapters.tree import to_collection
from moe_jax.data.batch import Batch
from moe_jax.layers.names import ADAPTERS, PARAMS, ROUTER
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.step.loss import (
    label_losses,
    next_tokens,
    segment_losses,
    summed_by_row,
    target_counts,
)
from moe_jax.training.step.loss_scale import LossScale, updated
from moe_jax.training.step.optimizer import finite_check_state
from moe_jax.training.step.router_metrics import routing_summary
from moe_jax.training.step.state import TrainState

Metrics = dict[str, jax.Array]


def forward(
    model: LlamaForCausalLM,
    params: Any,
    adapters: Mapping[str, Any],
    batch: Batch,
    dropout_key: jax.Array | None,
    *,
    targets: jax.Array | None = None,
    packed: bool = False,
) -> tuple[Any, dict[str, dict[str, RouterStatistics]]]:
    """What the model computes, and the routing statistics of the adapters that route.

    Args:
      model: with segments that fit the rows of `batch`.
      params: the frozen base parameters.
      adapters: `{name: tree}`.
      batch: rows of one sequence each, padded on the right: causality alone hides the padding.
      dropout_key: None computes deterministically.
      targets: int [B, S], to compute their losses and no logits.
      packed: rows may hold several sequences, which a mask then keeps apart.
    """
    variables = {PARAMS: params, ADAPTERS: to_collection(adapters)}
    predictions, sown = model.apply(
        variables,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids if packed else None,
        token_mask=batch.segment_ids != 0,
        expert_groups=batch.expert_groups,
        deterministic=dropout_key is None,
        targets=targets,
        rngs={} if dropout_key is None else {"dropout": dropout_key},
        mutable=[ROUTER],
    )
    routed = any(segment.method.routes for segment in model.segments)
    return predictions, collect_statistics(sown) if routed else {}


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
    """One optimiser step over all micro-batches.

    The loss of an adapter is its cross-entropy over all its target tokens of the whole batch, or
    over its rows where it classifies (the squared error where it predicts a number), plus its
    routers' losses averaged over the micro-batches. Losses of different adapters are added:
    they share no parameter, so neither sees the other.

    Args:
      model: with segments that fit the rows of one micro-batch.
      optimizer: `build_optimizer`'s.
      dropout_seed: of dropout and jitter; each step and micro-batch draws anew.
      state: where training stands.
      params: the frozen base parameters; not differentiated.
      batch: arrays [M, B, S]; M micro-batches.
      packed: see `forward`.

    Returns:
      The new state, and metrics named `adapter/metric`: scalars, and per-layer arrays of what the
      routers did (see `routing_summary`).
    """
    micro_batches = batch.tokens.shape[0]
    step_key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)

    def own(segment: Segment, array: jax.Array) -> jax.Array:
        """An adapter's rows of `array` [M, B, ...]."""
        return jax.vmap(functools.partial(take_rows, segment))(array)

    targets = {s.name: jnp.sum(target_counts(s, own(s, batch.loss_mask))) for s in model.segments}
    begins = (batch.segment_ids != 0) & (batch.positions == 0)
    sequences = {s.name: jnp.sum(own(s, begins), dtype=jnp.float32) for s in model.segments}

    def objective(adapters: Any, micro: Batch, index: jax.Array) -> tuple[jax.Array, Metrics]:
        key = jax.random.fold_in(step_key, index)
        predictions, statistics = forward(
            model, params, adapters, micro, key, targets=next_tokens(micro), packed=packed
        )
        losses = segment_losses(model.segments, predictions, micro)
        total, metrics = jnp.float32(0.0), Metrics()
        for segment in model.segments:
            name = segment.name
            share = jnp.sum(losses[name][0]) / jnp.maximum(targets[name], 1.0)
            terms, parts = _router_terms(segment, statistics.get(name, {}), micro_batches)
            terms = terms + share
            metrics |= {f"{name}/loss": share, **parts}
            scale = state.loss_scale.get(name)
            total = total + (terms if scale is None else terms * scale.scale)
        return total, metrics

    def accumulate(gradients: Any, scanned: tuple[Batch, jax.Array]) -> tuple[Any, Metrics]:
        new, metrics = jax.grad(objective, has_aux=True)(state.adapters, *scanned)
        return jax.tree.map(jnp.add, gradients, new), metrics

    zeros = jax.tree.map(jnp.zeros_like, state.adapters)
    indices = jnp.arange(micro_batches)
    gradients, parts = jax.lax.scan(accumulate, zeros, (batch, indices))
    metrics = {name: jnp.sum(values, axis=0) for name, values in parts.items()}
    gradients = {
        name: _unscaled(tree, state.loss_scale.get(name)) for name, tree in gradients.items()
    }
    new_state = apply_gradients(optimizer, state, params, gradients)

    for name, tree in gradients.items():
        check = finite_check_state(new_state.opt_state, name)
        metrics[f"{name}/grad_norm"] = optax.tree.norm(tree)
        metrics[f"{name}/target_tokens"] = targets[name]
        metrics[f"{name}/sequences"] = sequences[name]
        metrics[f"{name}/skipped_in_a_row"] = check.notfinite_count
        metrics[f"{name}/skipped_total"] = check.total_notfinite
        if name in new_state.loss_scale:
            metrics[f"{name}/loss_scale"] = new_state.loss_scale[name].scale
    metrics["tokens"] = jnp.sum(batch.segment_ids != 0, dtype=jnp.float32)
    metrics["padding_share"] = 1.0 - metrics["tokens"] / batch.tokens.size
    return new_state, metrics


def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, params: Any, gradients: Any
) -> TrainState:
    """The state after one optimiser step with the adapters' gradients `{name: tree}`."""
    # The frozen branch is `set_to_zero`, which never reads its gradient: handing it the parameters
    # gives the tree its shape, and XLA drops the zeros that come back, since nobody uses them.
    updates: Any
    updates, opt_state = optimizer.update(
        {PARAMS: params, ADAPTERS: gradients},
        state.opt_state,
        {PARAMS: params, ADAPTERS: state.adapters},
    )
    loss_scale = {
        name: updated(scale, finite_check_state(opt_state, name).last_finite)
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
    """Summed loss and number of targets of a batch [B, S] of one adapter or of none; scalars.

    The loss is the cross-entropy in nats, or the squared error of a number.
    """
    targets = next_tokens(batch)
    predictions, _ = forward(model, params, adapters, batch, None, targets=targets)
    if model.segments:
        ((losses, counts),) = segment_losses(model.segments, predictions, batch).values()
    else:
        losses, counts = summed_by_row(predictions, batch)
    return jnp.sum(losses), jnp.sum(counts)


def score_step(
    model: LlamaForCausalLM, adapters: Mapping[str, Any], params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Loss and scores of each row of a batch [B, S] of one classification adapter.

    Returns:
      float32 [B], 0 for rows without a label, and float32 [B, N].
    """
    predictions, _ = forward(model, params, adapters, batch, dropout_key=None)
    assert isinstance(predictions, Predictions)
    (scores,) = predictions.scores.values()
    losses, _ = label_losses(scores, batch)
    return losses, scores


def _router_terms(
    segment: Segment, sites: dict[str, RouterStatistics], micro_batches: int
) -> tuple[jax.Array, Metrics]:
    """This micro-batch's share of an adapter's router losses, and of what is reported of them."""
    name, total, metrics = segment.name, jnp.float32(0.0), Metrics()
    if not segment.method.routes:
        return total, metrics
    if not sites:
        raise ValueError(f"adapter {name!r} routes, but sowed no statistics")
    for label, loss in segment.method.router_losses.items():
        value = sum(loss.over_layers(site) for site in sites.values()) / len(sites)
        value = jnp.asarray(value) / micro_batches
        metrics[f"{name}/{label}"] = value
        total = total + loss.coefficient * value
    for label, value in routing_summary(sites).items():
        metrics[f"{name}/{label}"] = value / micro_batches
    return total, metrics


def _unscaled(gradients: Any, scale: LossScale | None) -> Any:
    return gradients if scale is None else jax.tree.map(lambda g: g / scale.scale, gradients)
