"""Names and semantics of the metrics in `metrics.jsonl`.

A metric of one adapter is written as `ADAPTER/NAME`, one of the whole batch as `NAME`, and a
measurement on held-out data as `validation/ADAPTER/SET/NAME` or `evaluation/ADAPTER/TASK/MEASURE`.
"""

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """Semantics of a metric.

    Attributes:
      aggregation: value of a line over its steps: their mean, their sum, or that of the last step.
      unit: unit of the value; empty for a pure number.
      printed: printed under its own name in the lines on the console. The console shows loss,
        gradient norm and the like in a fixed form instead; the rest is in the file only.
    """

    aggregation: Literal["mean", "sum", "last"]
    unit: str = ""
    printed: bool = False


METRICS = {
    # One value for an adapter.
    "loss": Metric("mean", "nats per target token"),  # see records.plots.loss_unit
    "first_token_loss": Metric("mean", "nats per first target token of an answer"),
    "grad_norm": Metric("mean"),
    "learning_rate": Metric("last"),
    "loss_scale": Metric("last"),
    "skipped_in_a_row": Metric("last", "steps"),
    "skipped_total": Metric("last", "steps"),
    "sequences": Metric("sum", "sequences"),
    "target_tokens": Metric("sum", "tokens"),
    # Preference training of an adapter; see training.step.preference_loss.
    "preference_loss": Metric("mean", "per example"),
    "sft_loss": Metric("mean", "nats per token of a chosen answer"),
    "reward_chosen": Metric("mean"),
    "reward_rejected": Metric("mean"),
    "reward_margin": Metric("mean", printed=True),
    "reward_accuracy": Metric("mean", "share of examples", printed=True),
    "log_prob_chosen": Metric("mean", "nats per answer"),
    "log_prob_rejected": Metric("mean", "nats per answer"),
    "kl": Metric("mean", "nats per answer", printed=True),
    "reference_kl": Metric("mean", "nats per answer", printed=True),
    # Routing of an adapter, over all of its routers.
    "mean_entropy": Metric("mean", "share of the uniform distribution's"),
    "busiest_expert": Metric("mean", "equal shares"),
    "dead_experts": Metric("mean", "experts", printed=True),
    "effective_experts": Metric("mean", "experts per token"),
    "overflow": Metric("mean", "share of tokens", printed=True),
    # Routing of an adapter, one row for each router.
    "expert_load": Metric("mean", "equal shares"),
    "layer_entropy": Metric("mean", "share of the uniform distribution's"),
    "layer_effective_experts": Metric("mean", "experts per token"),
    "layer_overflow": Metric("mean", "share of tokens"),
    "sites": Metric("last"),
    # The whole batch.
    "tokens": Metric("sum", "tokens"),
    "padding_share": Metric("mean", "share of positions"),
}
"""Metrics by name, except router losses; a router loss cannot have one of these names."""

UNPRINTED_LOSSES = frozenset({"router_z", "importance_cv"})
"""Router losses that are in the file only."""


def metric_semantics(name: str) -> Metric:
    """Semantics of the metric `NAME` or `ADAPTER/NAME`; other names are those of router losses."""
    kind = name.rpartition("/")[2]
    return METRICS.get(kind) or Metric("mean", printed=kind not in UNPRINTED_LOSSES)
