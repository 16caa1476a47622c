"""The tasks of GLUE (arXiv:1804.07461) as facts: columns, labels and metrics of `nyu-mll/glue`."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_jax.config.parse import require

GlueName = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]
MetricName = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]

GLUE_HUB_ID = "nyu-mll/glue"


class GlueTask(NamedTuple):
    """One task.

    Attributes:
      columns: of the text, or of the two texts.
      labels: names of the classes, in the order of the data set's numbers; none where the label is
        itself a number to be predicted.
      metrics: that the benchmark reports (arXiv:1804.07461, table 1).
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[MetricName, ...]


_TWO_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": GlueTask(_TWO_SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": GlueTask(_TWO_SENTENCES, (), ("pearson", "spearman")),
    "mnli": GlueTask(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)
    ),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT, ("accuracy",)),
    "rte": GlueTask(_TWO_SENTENCES, _ENTAILMENT, ("accuracy",)),
}
"""By the name that the data set's configuration has."""


# FIXME docstring of the merged config.classification:
# """What an adapter with a score head, in the place of the language model's, tells apart.
#
# A task of GLUE brings its labels, columns and metrics along:
#
#     adapter.method.classification = {"glue": "sst2"}
#     adapter.data.train = ConfigDict({"sst2": {"task": "sst2"}})
#
# Rows of one's own have the schema `classification`, `text`, perhaps `text_pair`, and `label`: a
# name, an index from 0, or a number.
#
#     adapter.method.classification = {"labels": ("spam", "ham")}
#     adapter.data.train = ConfigDict({"mine": {"path": "mail.jsonl", "schema": "classification"}})
#
# `moe-jax export --to peft` writes a LoRA with its head as `SEQ_CLS`; generating text, other formats
# and other tasks refuse such an adapter.
# """


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Classes, or a number to be predicted. One of `labels`, `glue` and `regression` is enough.

    Attributes:
      labels: names of the classes, in the order of the head's scores.
      glue: a task of GLUE, whose labels and metrics these then are.
      regression: one score, the predicted number, in the place of classes.
      metrics: what validation measures besides the loss; by default those of the GLUE task, the
        accuracy, or for a number the two correlations. `f1` is that of the second of two labels.
      init_std: standard deviation of the head's normal initialisation; transformers' default.
    """

    labels: tuple[str, ...] = ()
    glue: GlueName | None = None
    regression: bool = False
    metrics: tuple[MetricName, ...] = ()
    init_std: float = 0.02

    def __post_init__(self):
        if self.glue is not None:
            task = GLUE[self.glue]
            self._fill("labels", task.labels)
            self._fill("metrics", task.metrics)
            # A task without labels is one with a number.
            require(not (self.regression and task.labels), "regression", f"{self.glue} has labels")
            object.__setattr__(self, "regression", not task.labels)
            require(
                self.labels == task.labels,
                "labels",
                f"those of {self.glue} are {', '.join(task.labels) or 'none: it has a number'}; "
                "leave them out, or leave out glue",
            )
        require(
            bool(self.labels) != self.regression,
            "labels",
            "give labels, or glue, or regression=True for a number, and not two of them",
        )
        require(len(self.labels) != 1, "labels", "give at least two")
        require(len(set(self.labels)) == len(self.labels), "labels", "names one twice")
        require(all(map(str.strip, self.labels)), "labels", "names a blank one")
        self._fill("metrics", ("pearson", "spearman") if self.regression else ("accuracy",))
        correlations = {"pearson", "spearman"}
        for metric in self.metrics:
            require(
                (metric in correlations) == self.regression,
                "metrics",
                f"{metric} is for {'numbers' if metric in correlations else 'labels'}",
            )
            require(metric != "f1" or len(self.labels) == 2, "metrics", "f1 is for two labels only")
        require(self.init_std >= 0, "init_std", "must not be negative")

    @property
    def num_scores(self) -> int:
        """Outputs of the head."""
        return len(self.labels) or 1

    def describe(self) -> str:
        """What is told apart, for messages."""
        return ", ".join(self.labels) if self.labels else "a number"

    def _fill(self, field: str, value: tuple[str, ...]) -> None:
        if not getattr(self, field):
            object.__setattr__(self, field, value)
