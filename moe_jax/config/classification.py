"""Classifiers: classes, metrics, and the tasks of GLUE that supply them.

An adapter with `method.classification` has a score head in place of the language-model head. A task
of GLUE supplies labels, columns and metrics:

    adapter.method.classification = {"glue": "sst2"}
    adapter.data.train = ConfigDict({"sst2": {"task": "sst2"}})

Rows from a file have the schema `classification`: `text`, optionally `text_pair`, and `label`,
which is a class name, a class index from 0, or a number.

    adapter.method.classification = {"labels": ("spam", "ham")}
    adapter.data.train = ConfigDict({"mine": {"path": "mail.jsonl", "schema": "classification"}})

`moe-jax export --to peft` writes a LoRA with its head as `SEQ_CLS`. Text generation, other export
formats and other tasks refuse such an adapter.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_jax.config.parse import require

GlueName = Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"]
MetricName = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]

GLUE_HUB_ID = "nyu-mll/glue"


class GlueTask(NamedTuple):
    """A task of GLUE (arXiv:1804.07461): columns, labels and metrics of `nyu-mll/glue`.

    Attributes:
      columns: columns of the text, or of the two texts.
      labels: class names, in the order of the data set's indices; empty for a regression task.
      metrics: metrics that the benchmark reports (arXiv:1804.07461, table 1).
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
"""Tasks by the name of the data set's configuration on the hub."""


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Classes of a classifier, or regression. Give one of `labels`, `glue` and `regression`.

    Attributes:
      labels: class names, in the order of the head's scores. Default: the labels of `glue`. Set
        them for data other than GLUE's.
      glue: name of a GLUE task, which sets `labels`, `regression` and `metrics`. Default None.
      regression: predict one number in place of classes. Default False, or True for a GLUE task
        whose label is a number (`stsb`).
      metrics: validation metrics besides the loss: `accuracy`, `f1` (of the second of two labels)
        and `matthews` for classes; `pearson` and `spearman` for regression. Default: those of the
        GLUE task; else `accuracy`, or for regression both correlations.
      init_std: standard deviation of the head's normal initialization. Default 0.02, as in
        transformers.
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
            # A GLUE task without labels is a regression task.
            require(not (self.regression and task.labels), "regression", f"{self.glue} has labels")
            object.__setattr__(self, "regression", not task.labels)
            require(
                self.labels == task.labels,
                "labels",
                f"those of {self.glue} are {', '.join(task.labels) or 'a number'}; "
                "leave out labels, or leave out glue",
            )
        require(
            bool(self.labels) != self.regression,
            "labels",
            "give one of labels, glue and regression=True",
        )
        require(len(self.labels) != 1, "labels", "give at least two")
        require(len(set(self.labels)) == len(self.labels), "labels", "names a label twice")
        require(all(map(str.strip, self.labels)), "labels", "names a blank label")
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
        """Number of outputs of the head."""
        return len(self.labels) or 1

    def describe(self) -> str:
        """Class names, or `a number`, for messages."""
        return ", ".join(self.labels) if self.labels else "a number"

    def _fill(self, field: str, value: tuple[str, ...]) -> None:
        if not getattr(self, field):
            object.__setattr__(self, field, value)
