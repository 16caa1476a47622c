"""One optimiser per adapter, and none for the frozen base.

Everything that reads a gradient (finite check, clipping, the rule itself) lives inside an adapter's
own branch: anything that read a frozen gradient would bring its matrix products back.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import optax

from moe_jax.config.optimizer import OptimizerConfig, ScheduleConfig
from moe_jax.layers.names import ADAPTERS, PARAMS

FROZEN = "frozen"
NEVER = 2**31 - 1


def learning_rate_schedule(
    schedule: ScheduleConfig, learning_rate: float, total_steps: int
) -> optax.Schedule:
    """Learning rate by optimiser step, from 0; the same as transformers' schedules of those names.

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
    if warmup == 0:
        return decay
    return optax.join_schedules(
        [optax.linear_schedule(0.0, learning_rate, warmup), decay], [warmup]
    )


def decay_mask(adapters: Any) -> Any:
    """True for the leaves that weight decay applies to: A and B, not routers and magnitudes."""
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
    """The transform of one adapter: finite check, clipping, rule, decay, learning rates.

    A gradient that is not finite changes nothing, neither the adapter nor the optimiser's state; it
    is counted (`ApplyIfFiniteState`), and the training loop decides when it has seen enough.
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
    return optax.apply_if_finite(chain, max_consecutive_errors=NEVER)


def label_leaves(tree: Any, rules: Sequence[tuple[str, str]]) -> Any:
    """Labels every leaf by the first rule whose pattern matches its path.

    Args:
      tree: any tree.
      rules: pairs of a regular expression, matched from the start of `a/b/c`, and a label.

    Raises:
      ValueError: a leaf that no rule covers.
    """

    def label(path: Any, _: Any) -> str:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, name in rules:
            if re.match(pattern, where):
                return name
        raise ValueError(f"no optimiser rule covers the parameter {where}")

    return jax.tree_util.tree_map_with_path(label, tree)


def build_optimizer(
    adapters: Mapping[str, OptimizerConfig], total_steps: int | Mapping[str, int]
) -> optax.GradientTransformation:
    """The optimiser of `{"params": base, "adapters": {name: tree}}`.

    Args:
      adapters: by name.
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
    """The counts of skipped steps of one adapter."""
    return opt_state.inner_states[f"adapter {adapter}"].inner_state
