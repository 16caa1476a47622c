"""Where training text comes from and how it becomes batches."""

from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config.parse import require

Schema = Literal["instruction", "completion", "chat", "text", "classification", "task"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set.

    Attributes:
      path: a `.json`, `.jsonl`, `.parquet` or `.txt` file, a folder of such files, or the id of a
        hub data set. With `task` the file or folder of its rows, if not those of `tasks_folder` or
        of the hub.
      name: the hub data set's configuration, where it has several.
      split: which split of a hub data set or of a folder with one file per split.
      revision: the hub data set's revision.
      schema: what a row holds. `instruction`: instruction, input, output. `completion`: prompt,
        completion. `chat`: messages, a list of `{role, content}`. `text`: text.
        `classification`: text, text_pair (may be absent), label (the name or the index of a class,
        or a number), for adapters with `method.classification`. `task`: what the task says; where
        `task` is given, it is left out.
      task: the task whose questions these are, as `moe-jax evaluate --tasks` names it: the prompt
        is the one that evaluation asks with. An adapter with `method.classification` learns the
        rows of a GLUE task as they are.
      answer: what follows a task's prompt. `label`: the label of the right option, after the prompt
        that lists them, as the protocol `labels` asks. `choice`: the option's own words, as the
        protocol `choices` asks.
      columns: the row's own name for a field of the schema, where it differs.
      prompt: the prompt template for `instruction` rows, a file in `moe_jax/data/prompts/` without
        its ending, or the path of a template file.
      weight: this data set's share of the rows, relative to the other data sets.
      expert_group: which group of experts, from 0, this kind of data belongs to; only the loss
        `localized_balance` reads it.
    """

    path: str = ""
    schema: Schema = "task"
    task: str | None = None
    answer: Literal["label", "choice"] = "label"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    prompt: str = "instruction"
    weight: float = 1.0
    expert_group: int = 0

    def __post_init__(self):
        is_task = self.task is not None
        require(
            is_task or self.path != "",
            "path",
            "is empty; name a file, a folder or a hub data set, or give a task",
        )
        require(
            is_task or self.schema != "task",
            "schema",
            "is not given; say what a row holds, or name a task",
        )
        require(
            not is_task or self.schema == "task",
            "schema",
            "a task says itself what its rows hold; leave schema out",
        )
        require(
            not is_task or not self.columns, "columns", "a task knows its columns; leave it out"
        )
        require(self.weight > 0, "weight", "must be positive")
        require(self.expert_group >= 0, "expert_group", "must not be negative")

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.path or f"task {self.task!r}"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of one adapter.

    Attributes:
      train: data sets to train on, by a name of the user's choice.
      validation: data sets to measure the loss on, each by itself.
      max_length: tokens per row; a longer row of a data set loses the end of its completion.
      train_on_prompt: count the prompt's tokens in the loss too.
      buckets: the padded row lengths that may occur, ascending, at most `max_length`, which is
        always added as the last one. Each is one compilation of the step.
      packing: what a row of a training batch holds. `none`: one row of a data set, padded to one of
        the lengths above. `first_fit`: as many as fit into `max_length` tokens, each attending to
        itself alone, so that next to nothing is padding; `batch_size` then counts rows of
        `max_length` tokens, and `buckets` holds for validation only, which is never packed. Not for
        classifiers. Types of RoPE that adapt to the longest sequence (`dynamic`, `longrope`) adapt
        to that of the whole batch, packed or not.
      sort_window: batches whose rows are sorted by length together, so that a batch holds rows of
        like length. 1 leaves the shuffled order as it is. With `packing`, how many batches are
        packed at once: the more, the less is padding.
      num_workers: processes that tokenise; 0 tokenises in the main process.
      cache_dir: where tokenised data sets are kept; None leaves it to the `datasets` library.
    """

    train: dict[str, SourceConfig]
    max_length: int
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    train_on_prompt: bool = False
    buckets: tuple[int, ...] = ()
    packing: Literal["none", "first_fit"] = "none"
    sort_window: int = 32
    num_workers: int = 0
    cache_dir: str | None = None

    def __post_init__(self):
        require(bool(self.train), "train", "names no data set")
        require(self.max_length > 1, "max_length", "must be at least 2 tokens")
        require(list(self.buckets) == sorted(set(self.buckets)), "buckets", "must ascend strictly")
        require(
            all(0 < b <= self.max_length for b in self.buckets),
            "buckets",
            f"must lie between 1 and max_length ({self.max_length})",
        )
        require(self.sort_window > 0, "sort_window", "must be positive")
        require(self.num_workers >= 0, "num_workers", "must not be negative")

    @property
    def is_packed(self) -> bool:
        """Whether a row of a training batch may hold several rows of a data set."""
        return self.packing != "none"

    @property
    def lengths(self) -> tuple[int, ...]:
        """The padded lengths that may occur of rows that hold one row of a data set, ascending."""
        return tuple(sorted({*self.buckets, self.max_length}))
