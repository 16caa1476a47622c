"""Optimizers of the adapters, and dynamic loss scaling for float16.

Each adapter has its own branch of `optax.multi_transform`, with its finite check, clipping and
update rule. Nothing outside the branches reads a gradient: reading a gradient of the frozen base
would make XLA compute it.
"""

import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.config.optimizer import OptimizerConfig, ScheduleConfig
from moe_jax.layers.names import ADAPTERS, PARAMS

FROZEN = "frozen"
NEVER = 2**31 - 1


def learning_rate_schedule(
    schedule: ScheduleConfig, learning_rate: float, total_steps: int
) -> optax.Schedule:
    """Learning rate by optimizer step, from 0; equal to transformers' schedules of the same name.

    Args:
      schedule: warm-up and decay.
      learning_rate: the peak.
      total_steps: steps of the whole run.
    """
    warmup = schedule.warmup(total_steps)
    decay_steps = max(total_steps - warmup, 1)
    final = schedule.final_fraction
    decay = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, final * learning_rate, decay_steps),
        "cosine": optax.cosine_decay_schedule(learning_rate, decay_steps, alpha=final),
    }[schedule.kind]
    if warmup > 0:
        rise = optax.linear_schedule(0.0, learning_rate, warmup)
        decay = optax.join_schedules([rise, decay], [warmup])
    return _standard_promotion(decay)


def _standard_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under JAX's default dtype promotion: optax multiplies step counts with floats."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **options)

    return call


def decay_mask(adapters: Any) -> Any:
    """True for leaves with weight decay: A and B, not routers, magnitudes and new tokens."""
    return _leaves_named(adapters, "lora_A", "lora_B")


def _lora_plus_mask(adapters: Any) -> Any:
    return _leaves_named(adapters, "lora_B")


def _leaves_named(tree: Any, *names: str) -> Any:
    def is_named(path: Any, _: Any) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) in names

    return jax.tree_util.tree_map_with_path(is_named, tree)


def _rule(config: OptimizerConfig) -> optax.GradientTransformation:
    if config.name == "adamw":
        return optax.scale_by_adam(config.b1, config.second_decay, config.eps)
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.second_decay)
    if config.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    return optax.trace(config.momentum) if config.momentum > 0 else optax.identity()


def adapter_transform(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The transform of one adapter: finite check, clipping, update rule, decay and learning rate.

    A gradient that is not finite changes neither the adapter nor the optimizer's state. It is only
    counted (`ApplyIfFiniteState`); the training loop decides after how many it stops.
    """
    schedule = learning_rate_schedule(config.schedule, config.learning_rate, total_steps)
    clip, ratio = config.clip_norm, config.lora_plus_ratio
    chain = optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        _rule(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
        optax.masked(optax.scale(ratio), _lora_plus_mask),
    )
    transform = optax.apply_if_finite(chain, max_consecutive_errors=NEVER)
    return optax.GradientTransformation(transform.init, _standard_promotion(transform.update))


def label_leaves(tree: Any, rules: Sequence[tuple[str, str]]) -> Any:
    """Labels every leaf by the first rule whose pattern matches its path.

    Args:
      tree: any tree.
      rules: pairs of a regular expression, matched from the start of `a/b/c`, and a label.

    Raises:
      ValueError: no rule matches a leaf.
    """

    def label(path: Any, _: Any) -> str:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, name in rules:
            if re.match(pattern, where):
                return name
        raise ValueError(f"no optimizer rule matches the parameter {where}")

    return jax.tree_util.tree_map_with_path(label, tree)


def build_optimizer(
    adapters: Mapping[str, OptimizerConfig], total_steps: int | Mapping[str, int]
) -> optax.GradientTransformation:
    """The optimizer of `{"params": base, "adapters": {name: tree}}`.

    Args:
      adapters: settings by adapter name.
      total_steps: steps of the whole run, of all adapters or by adapter.
    """
    steps = dict.fromkeys(adapters, total_steps) if isinstance(total_steps, int) else total_steps
    rules = [(f"{PARAMS}/", FROZEN)]
    rules += [(f"{ADAPTERS}/{re.escape(name)}/", f"adapter {name}") for name in adapters]
    transforms: dict[Hashable, optax.GradientTransformation] = {
        f"adapter {name}": adapter_transform(config, steps[name])
        for name, config in adapters.items()
    }
    transforms[FROZEN] = optax.set_to_zero()
    return optax.multi_transform(transforms, lambda tree: label_leaves(tree, rules))


def finite_check_state(opt_state: Any, adapter: str) -> optax.ApplyIfFiniteState:
    """Counts of the skipped steps of one adapter."""
    return opt_state.inner_states[f"adapter {adapter}"].inner_state


# Dynamic loss scaling for float16 (arXiv:1710.03740, section 3.2).

GROWTH_INTERVAL = 2000
"""Number of consecutive finite steps after which the scale doubles."""


class LossScale(NamedTuple):
    """Loss scale of one adapter. Each adapter has its own, so that adapters stay independent.

    Attributes:
      scale: float32 [], factor of the loss before differentiation.
      finite_steps: int32 [], steps with a finite gradient since the last change.
    """

    scale: jax.Array
    finite_steps: jax.Array


def initial_loss_scale(scale: float) -> LossScale:
    """The loss scale at the start of training."""
    return LossScale(jnp.float32(scale), jnp.int32(0))


def next_loss_scale(state: LossScale, finite: jax.Array) -> LossScale:
    """Halves the scale after a gradient that is not finite; doubles it after enough finite ones."""
    grown = state.finite_steps + 1 >= GROWTH_INTERVAL
    after_finite = LossScale(
        jnp.where(grown, state.scale * 2.0, state.scale),
        jnp.where(grown, 0, state.finite_steps + 1),
    )
    after_overflow = LossScale(
        jnp.maximum(state.scale / 2.0, 1.0), jnp.zeros_like(grown, jnp.int32)
    )
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), after_finite, after_overflow)
