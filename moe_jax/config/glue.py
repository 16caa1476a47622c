"""The tasks of GLUE (arXiv:1804.07461) as facts: columns, labels and metrics of `nyu-mll/glue`."""

from typing import Literal, NamedTuple

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
