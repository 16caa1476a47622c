"""Losses, rewards and metrics of preference training, from log-probabilities of answers.

Notation: log p is the log-probability of an answer under the trained adapter, log r that under the
reference, n its number of tokens, with the end-of-text token where the answer has one. Prompts and
padding are in none of them. The formulas are those of TRL 1.16 where the docstrings say nothing
else.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config.preference import (
    ROWS_PER_EXAMPLE,
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    PreferenceConfig,
    ReferencedPreferenceConfig,
    SimpoConfig,
)


class AnswerLogProbs(NamedTuple):
    """Log-probabilities of the answers of E examples, all float32.

    Attributes:
      log_probs: sums over the tokens of the answers, [E, A]: chosen and rejected (A = 2), or of
        `feedback` the answer alone (A = 1).
      reference: the same under the reference, [E, A]; not read by losses without one.
      counts: tokens of the answers, [E, A]; 0 for an example of padding.
      labels: 1 for desirable answers, [E]; only read for `feedback`.
      kl: estimate of KL(trained || reference) that `kto` compares with, [].
    """

    log_probs: jax.Array
    reference: jax.Array
    counts: jax.Array
    labels: jax.Array
    kl: jax.Array

    @property
    def is_example(self) -> jax.Array:
        """1 for examples and 0 for padding, float32 [E]."""
        return (self.counts[:, 0] > 0).astype(jnp.float32)

    @property
    def log_ratios(self) -> jax.Array:
        """Log p - log r, [E, A]."""
        return self.log_probs - self.reference

    @property
    def mean_log_probs(self) -> jax.Array:
        """Log p / n, [E, A]."""
        return self.log_probs / jnp.maximum(self.counts, 1.0)


Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Sum of a metric over examples, and the number that it is divided by, [] each, by name."""


def answer_log_probs(
    preference: PreferenceConfig,
    row_losses: tuple[jax.Array, jax.Array],
    reference: jax.Array,
    labels: jax.Array,
    kl: jax.Array,
) -> AnswerLogProbs:
    """Log-probabilities of the answers in an adapter's rows, two rows an example.

    Args:
      preference: the loss.
      row_losses: cross-entropy in nats and number of tokens of the answer of each row, two float32
        [b]; of `feedback`, of the first row of each example, [b / 2].
      reference: log-probabilities under the reference, float32 [b].
      labels: `Batch.labels` of the same rows as `row_losses`, [b or b / 2, S].
      kl: see `AnswerLogProbs`.
    """
    size = preference.answers_per_example
    losses, counts = (array.reshape(-1, size) for array in row_losses)
    reference = reference.reshape(-1, ROWS_PER_EXAMPLE)[:, :size]
    is_desirable = jnp.sum(labels, axis=-1).reshape(-1, size)[:, 0]
    return AnswerLogProbs(-losses, reference, counts, is_desirable, kl)


def preference_totals(
    preference: PreferenceConfig, loss_mask: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
    """Numbers of examples and of tokens of chosen answers of a whole batch; see `loss_of_sums`.

    Args:
      preference: the loss.
      loss_mask: `Batch.loss_mask` of the adapter's learned rows, [M, b, S].
      labels: `Batch.labels` of the same rows.
    """
    size = preference.answers_per_example
    tokens = jnp.sum(loss_mask[..., 1:], axis=-1, dtype=jnp.float32)[:, ::size]
    examples = jnp.sum(tokens > 0, dtype=jnp.float32)
    if size == 1:
        tokens = tokens * jnp.sum(labels, axis=-1)
    return {"preference_loss": examples, "sft_loss": jnp.sum(tokens)}


def kl_estimate(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """Estimate of KL(trained || reference), [], as `kto` compares with it.

    The mean of log p - log r over answers to other prompts, at least 0 (arXiv:2402.01306, section
    4.1). TRL pairs the prompts of a batch with the answers one place before them in the batch; here
    the answers are those one place before in the data set (`moe_jax.data.examples`), so that the
    reference scores them once. The mean is over the whole batch of an optimizer step, not over a
    micro-batch or a device.

    Args:
      log_probs: log-probabilities of the mismatched answers, [E].
      reference: the same under the reference, [E].
    """
    return jnp.maximum(jnp.mean(log_probs - reference), 0.0)


@functools.singledispatch
def rewards_and_losses(
    preference: PreferenceConfig, answers: AnswerLogProbs
) -> tuple[jax.Array, jax.Array]:
    """Rewards [E, A] and loss [E] of each example, without the term of `sft_weight`."""
    raise TypeError(f"no loss is registered for {type(preference).__name__}")


@rewards_and_losses.register
def _(preference: DpoConfig, answers: AnswerLogProbs) -> tuple[jax.Array, jax.Array]:
    """DPO, with d = (log p - log r) of chosen less rejected.

    `sigmoid`: -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), with e the label smoothing
    (TRL's DPOTrainer has none in this loss). `hinge`: max(0, 1 - beta d). `ipo`:
    (d' - 1 / (2 beta))^2, where the log ratios in d' are divided by n.
    """
    beta, ratios = preference.beta, answers.log_ratios
    rewards = beta * ratios
    margin = rewards[:, 0] - rewards[:, 1]
    match preference.loss_type:
        case "sigmoid":
            losses = _smoothed(margin, preference.label_smoothing)
        case "hinge":
            losses = jax.nn.relu(1.0 - margin)
        case "ipo":
            means = ratios / jnp.maximum(answers.counts, 1.0)
            losses = jnp.square(means[:, 0] - means[:, 1] - 1.0 / (2.0 * beta))
    return rewards, losses


@rewards_and_losses.register
def _(preference: OrpoConfig, answers: AnswerLogProbs) -> tuple[jax.Array, jax.Array]:
    """ORPO's odds ratio: -beta log sigmoid(log odds of chosen - log odds of rejected).

    The odds are P / (1 - P) with log P = log p / n. Its cross-entropy is the term of `sft_weight`,
    over the answer alone; TRL's is over prompt and answer.
    """
    means = answers.mean_log_probs
    # Log P rounds to 0 where an answer is certain, and is 0 without tokens: the odds are infinite.
    bounded = jnp.minimum(means, -jnp.finfo(means.dtype).eps)
    log_odds = bounded - _log_one_minus_exp(bounded)
    losses = -preference.beta * jax.nn.log_sigmoid(log_odds[:, 0] - log_odds[:, 1])
    return preference.beta * means, losses


@rewards_and_losses.register
def _(preference: SimpoConfig, answers: AnswerLogProbs) -> tuple[jax.Array, jax.Array]:
    """SimPO: -log sigmoid(beta (log p / n of chosen - log p / n of rejected) - gamma)."""
    rewards = preference.beta * answers.mean_log_probs
    margin = rewards[:, 0] - rewards[:, 1] - preference.gamma
    return rewards, -jax.nn.log_sigmoid(margin)


@rewards_and_losses.register
def _(preference: KtoConfig, answers: AnswerLogProbs) -> tuple[jax.Array, jax.Array]:
    """KTO: w (1 - sigmoid(z)) of desirable answers and w (1 - sigmoid(-z)) of undesirable ones.

    z is beta (log p - log r - KL), and w the weight of the label. The estimate of KL has no
    gradient.
    """
    beta = preference.beta
    above = beta * (answers.log_ratios[:, 0] - jax.lax.stop_gradient(answers.kl))
    desirable = answers.labels
    losses = desirable * preference.desirable_weight * jax.nn.sigmoid(-above) + (
        1.0 - desirable
    ) * preference.undesirable_weight * jax.nn.sigmoid(above)
    return beta * answers.log_ratios, losses


def example_sums(preference: PreferenceConfig, answers: AnswerLogProbs) -> Sums:
    """Sums over examples of the loss and of the metrics.

    Returns:
      `preference_loss` per example; `sft_loss` per token of a chosen answer, if `sft_weight` is not
      0; `reward_chosen`, `reward_rejected`, `log_prob_chosen` and `log_prob_rejected` per answer;
      `reward_accuracy`, the share of pairs whose chosen answer has the higher reward, or for `kto`
      of answers whose reward is above beta KL if desirable and below it if undesirable; and
      with a reference `kl` for `kto`, see `kl_estimate`, else `reference_kl`: the mean of log r -
      log p over all answers, which estimates KL(reference || trained) if the reference wrote them.
    """
    rewards, losses = rewards_and_losses(preference, answers)
    is_example = answers.is_example
    number = jnp.sum(is_example)
    chosen, rejected = is_example, is_example
    if preference.answers_per_example == 1:
        chosen, rejected = is_example * answers.labels, is_example * (1.0 - answers.labels)
        level = preference.beta * answers.kl
        above, below = rewards[:, 0] > level, rewards[:, 0] < level
        right = jnp.where(answers.labels > 0, above, below)
    else:
        right = rewards[:, 0] > rewards[:, 1]
    sums: Sums = {"preference_loss": (jnp.sum(losses * is_example), number)}
    if preference.sft_weight:
        tokens = chosen * answers.counts[:, 0]
        sums["sft_loss"] = -jnp.sum(chosen * answers.log_probs[:, 0]), jnp.sum(tokens)
    for name, values in (("reward", rewards), ("log_prob", answers.log_probs)):
        for kind, weights, column in (("chosen", chosen, 0), ("rejected", rejected, -1)):
            total = jnp.sum(values[:, column] * weights)
            sums[f"{name}_{kind}"] = total, jnp.sum(weights)
    sums["reward_accuracy"] = jnp.sum(right.astype(jnp.float32) * is_example), number
    if preference.estimates_kl:
        sums["kl"] = answers.kl * number, number
    elif isinstance(preference, ReferencedPreferenceConfig):
        size = answers.log_probs.shape[1]
        below = (answers.reference - answers.log_probs) * is_example[:, None]
        sums["reference_kl"] = jnp.sum(below), size * number
    return sums


def loss_of_sums(
    preference: PreferenceConfig, sums: Sums, totals: dict[str, jax.Array]
) -> jax.Array:
    """Share of the loss of a batch, [].

    Args:
      preference: the loss.
      sums: sums of a part of the batch.
      totals: the numbers that `preference_loss` and `sft_loss` are divided by, of the whole batch.
    """
    loss = sums["preference_loss"][0] / jnp.maximum(totals["preference_loss"], 1.0)
    if preference.sft_weight:
        mean = sums["sft_loss"][0] / jnp.maximum(totals["sft_loss"], 1.0)
        loss = loss + preference.sft_weight * mean
    return loss


def preference_metrics(sums: Sums) -> dict[str, jax.Array]:
    """Means of all metrics, and the margin of the rewards; NaN where there is no such answer."""
    means = {name: total / number for name, (total, number) in sums.items()}
    means["reward_margin"] = means["reward_chosen"] - means["reward_rejected"]
    if "sft_loss" not in means:
        del means["preference_loss"]  # which is the loss
    return means


@functools.partial(jax.jit, static_argnums=0)
def measured_answers(
    preference: PreferenceConfig,
    log_probs: jax.Array,
    counts: jax.Array,
    reference: jax.Array,
    labels: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of a data set.

    Args:
      preference: the loss.
      log_probs: of the answers of all rows, two an example, float32 [2 E].
      counts: tokens of the answers, [2 E].
      reference: log-probabilities under the reference, [2 E]; not read without one.
      labels: 1 for desirable answers, [2 E].
    """
    kl = jnp.float32(0.0)
    if preference.estimates_kl:
        kl = kl_estimate(log_probs[1::2], reference[1::2])
    if preference.answers_per_example == 1:
        log_probs, counts, labels = (array[::2] for array in (log_probs, counts, labels))
    answers = answer_log_probs(preference, (-log_probs, counts), reference, labels[:, None], kl)
    sums = example_sums(preference, answers)
    totals = {name: number for name, (_, number) in sums.items()}
    return loss_of_sums(preference, sums, totals), preference_metrics(sums)


def _smoothed(margin: jax.Array, smoothing: float) -> jax.Array:
    losses = -jax.nn.log_sigmoid(margin)
    if not smoothing:
        return losses
    return (1.0 - smoothing) * losses - smoothing * jax.nn.log_sigmoid(-margin)


def _log_one_minus_exp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, without cancellation (Mächler, 2012)."""
    is_near = x > -0.6931472  # log 1/2
    near = jnp.log(-jnp.expm1(jnp.where(is_near, x, -1.0)))
    return jnp.where(is_near, near, jnp.log1p(-jnp.exp(jnp.where(is_near, -1.0, x))))
