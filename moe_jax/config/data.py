"""Data sets of an adapter, and the batches made from them."""

import datetime
from dataclasses import dataclass, field
from typing import Literal

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.parse import NONE_ADVICE, require
from moe_jax.config.preference import PreferenceConfig

Schema = Literal[
    "instruction",
    "completion",
    "chat",
    "text",
    "classification",
    "preference",
    "feedback",
    "task",
]

PREFERENCE_SCHEMAS: tuple[Schema, ...] = ("preference", "feedback")
"""Schemas of preference data, for adapters with `preference`."""

TEMPLATE_DATE = "2024-07-26"
"""Default of `DataConfig.date`; Llama 3's template prints it where it cannot know the date."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set: local files, a data set on the hub, or a task.

    Attributes:
      path: a file, a folder, a pattern such as `data/part*.json` or `data/**/*.csv`, a tuple of
        several of these, or the id of a data set on the hub. Files are `.json`, `.jsonl` or
        `.ndjson` (a list of objects, or one object per line), `.csv` or `.tsv` (with a header; all
        values are text), `.txt` (blocks between blank lines), `.parquet`, `.arrow` or `.feather`;
        those of text may be compressed (`.gz`, `.bz2`, `.xz`, `.zst`). A folder may also be one of
        `save_to_disk`. `hf://datasets/OWNER/NAME[@REVISION][/FILES]` names a data set on the hub,
        or a file, a folder or a pattern of its repository. Required without `task`. With `task`,
        the file or folder of its rows; the default is then that of `tasks_folder`, or the hub.
      schema: fields of a row. `instruction`: instruction, input, output. `completion`: prompt,
        completion. `chat`: messages, a list of `{role, content}`, and optionally system, tools,
        documents, chat_template_kwargs. `text`: text. `classification`: text, text_pair (optional),
        label (class name, class index or number), for adapters with `method.classification`.
        `preference`: prompt, chosen, rejected, as texts or messages; and `feedback`: prompt,
        completion, label (true or false); for adapters with `preference`. Default None: the only
        schema whose fields are all columns of the first row. Leave it out with `task`.
      task: name of a task, as in `moe-jax evaluate --tasks`. Its questions are the rows, with the
        prompts of evaluation. An adapter with `method.classification` is trained on the rows of a
        GLUE task directly. Default None.
      answer: completion of a task's prompt. `label`: label of the right option, after a prompt that
        lists the options, as in the protocol `labels`. `choice`: text of the right option, as in
        the protocol `choices`. Default `label`.
      name: configuration (subset) of a data set on the hub that has several, or subfolder of a
        folder. Default None.
      split: split of a data set on the hub, or of a folder with a file for each split. Parts, of a
        file or pattern too, are written as `train[:90%]`. Default `train`.
      revision: revision of a data set on the hub. Default None: the newest. Set it to pin the data.
      columns: column names by field of the schema, where they differ. An empty name leaves an
        optional field out. Default: the fields' names.
      prompt: prompt template of `instruction` rows: the name of a file in `moe_jax/data/prompts/`
        without extension, or the path of a template file. Default `instruction`.
      weight: share of this data set among the training rows, relative to the other data sets.
        Default 1. Ignored for validation.
      expert_group: group of experts of this data set, from 0; read by the loss
        `localized_balance` alone. Default 0.
    """

    path: str | tuple[str, ...] = ""
    schema: Schema | None = None
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
            is_task or (bool(self.paths) and all(self.paths)),
            "path",
            "is empty; name a file, a folder or a hub data set, or give a task",
        )
        require(
            not is_task or isinstance(self.path, str),
            "path",
            "names several; with a task, name one file or folder",
        )
        require(
            is_task or self.schema != "task",
            "schema",
            "'task' is that of a task; give one, or leave the schema out",
        )
        require(
            not is_task or self.schema in (None, "task"),
            "schema",
            "is set by the task; leave it out",
        )
        if is_task:
            object.__setattr__(self, "schema", "task")
        require(not is_task or not self.columns, "columns", "are set by the task; leave them out")
        require(self.weight > 0, "weight", "must be positive")
        require(self.expert_group >= 0, "expert_group", "must not be negative")

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths in their order; one if `path` is a string."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def title(self) -> str:
        """Name of the data set in messages."""
        if self.task is not None and not self.path:
            return f"task {self.task!r}"
        first, *others = self.paths
        return first + (f" and {len(others)} more" if others else "")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data of one adapter.

    Attributes:
      train: training data sets, by names of your choice. Required.
      validation: validation data sets, by name; the loss is measured on each of them separately.
        Default: none.
      max_length: largest number of tokens of a row. Required. A longer row loses the end of its
        completion; raise it if the start-up report shows many truncated rows.
      train_on_prompt: include the prompt's tokens in the loss. Default False.
      date: date, as YYYY-MM-DD, that chat templates take for today while the data is made, so that
        a run has the same data on every day. Generation takes the true date. Default `2024-07-26`.
      buckets: padded row lengths in tokens, ascending and at most `max_length`, which is always
        added. Default: empty, so that every row is padded to `max_length`. Each length is one
        compilation of the step; a few short ones save the work on padding.
      packing: contents of a row of a training batch. `none`: one row of a data set, padded to one
        of the lengths above. `first_fit`: all rows that fit into `max_length` tokens, each
        attending to itself alone, which leaves almost no padding. `batch_size` then counts rows of
        `max_length` tokens, and `buckets` applies to validation only, which is never packed. Not
        for classifiers. RoPE types that adapt to the longest sequence (`dynamic`, `longrope`) adapt
        to the longest one of the batch, packed or not. Default `none`.
      sort_window: number of batches whose rows are sorted by length together, so that the rows of a
        batch have similar length. 1 keeps the shuffled order. With `packing`, number of batches
        packed together; more of them leave less padding. Default 32.
      num_workers: number of processes that tokenize. Default 0: the main process, where a fast
        tokenizer uses all cores.
      cache_dir: cache folder of tokenized data sets. Default None: that of the `datasets` library.
      streaming: read and tokenize the training rows during training, from local files or a data
        set on the hub, and keep nothing of them on disk, for data larger than the disk. Files named
        within a repository of the hub are downloaded first. Needs `steps`. Not for classifiers,
        tasks and parts of splits. Default False.
      shuffle_buffer: with `streaming`, number of consecutive rows of a data set that are shuffled
        together; their tokens are held in memory. The order of local files is shuffled too.
        Default 10000.
    """

    train: dict[str, SourceConfig]
    max_length: int
    validation: dict[str, SourceConfig] = field(
        default_factory=dict, metadata={NONE_ADVICE: "write {} for none"}
    )
    train_on_prompt: bool = False
    date: str = TEMPLATE_DATE
    buckets: tuple[int, ...] = ()
    packing: Literal["none", "first_fit"] = "none"
    sort_window: int = 32
    num_workers: int = 0
    cache_dir: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 10_000

    def __post_init__(self):
        require(bool(self.train), "train", "names no data set")
        require(self.max_length > 1, "max_length", "must be at least 2 tokens")
        require(_is_date(self.date), "date", f"must be a date as YYYY-MM-DD, got {self.date!r}")
        require(list(self.buckets) == sorted(set(self.buckets)), "buckets", "must ascend strictly")
        require(
            all(0 < b <= self.max_length for b in self.buckets),
            "buckets",
            f"must lie between 1 and max_length ({self.max_length})",
        )
        require(self.sort_window > 0, "sort_window", "must be positive")
        require(self.num_workers >= 0, "num_workers", "must not be negative")
        require(self.shuffle_buffer > 0, "shuffle_buffer", "must be positive")
        if self.streaming:
            self._check_streaming()

    def _check_streaming(self) -> None:
        require(self.num_workers == 0, "num_workers", "must be 0 with streaming; leave it out")
        for name, source in self.train.items():
            require(
                source.task is None,
                f"train.{name}.task",
                "cannot be streamed; leave streaming out, or give the rows as files",
            )
            require(
                "[" not in source.split,
                f"train.{name}.split",
                f"{source.split!r} is a part of a split, which cannot be streamed",
            )

    @property
    def is_packed(self) -> bool:
        """True if a row of a training batch can hold several rows of a data set."""
        return self.packing != "none"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Padded lengths of rows that are not packed, ascending."""
        return tuple(sorted({*self.buckets, self.max_length}))

    def check_labels(self, classification: ClassificationConfig | None) -> None:
        """Refuses, with `require`, data sets whose labels do not fit the adapter's head."""
        require(
            classification is None or not self.is_packed,
            "packing",
            "a classifier has one answer for each row, which can then hold one sequence only; "
            "leave packing out, and set buckets",
        )
        require(
            classification is None or not self.streaming,
            "streaming",
            "is for language models; leave it out for a classifier",
        )
        for split, sources in (("train", self.train), ("validation", self.validation)):
            for name, source in sources.items():
                has_labels = source.schema == "classification"
                require(
                    has_labels
                    or classification is None
                    or source.task is not None
                    or source.schema is None,
                    f"{split}.{name}.schema",
                    f"{source.schema!r}, but method.classification learns rows of the schema "
                    "'classification' or of a GLUE task",
                )
                require(
                    not has_labels or classification is not None,
                    f"{split}.{name}.schema",
                    "'classification' needs method.classification, which names the labels",
                )

    def check_preference(self, preference: PreferenceConfig | None) -> None:
        """Refuses, with `require`, data sets that do not fit the adapter's preference loss."""
        if preference is not None:
            require(
                not self.is_packed,
                "packing",
                "each answer of preference data has a row of its own; leave packing out, and set "
                "buckets",
            )
            require(
                not self.streaming,
                "streaming",
                "reads rows one by one, and preference losses need all of them before the first "
                "step, for the scores of the reference and for answers to other prompts; leave it "
                "out",
            )
            require(
                not self.train_on_prompt,
                "train_on_prompt",
                "preference losses compare answers alone; leave it out",
            )
        for split, sources in (("train", self.train), ("validation", self.validation)):
            for name, source in sources.items():
                if preference is None:
                    require(
                        source.schema not in PREFERENCE_SCHEMAS,
                        f"{split}.{name}.schema",
                        f"{source.schema!r} needs the adapter's preference, which names the loss",
                    )
                    continue
                registry = preference.registry
                require(
                    source.schema in (None, preference.schema),
                    f"{split}.{name}.{'task' if source.task else 'schema'}",
                    f"{source.task or source.schema!r}, but the preference loss "
                    f"{registry.name_of(preference)!r} learns rows of the schema "
                    f"{preference.schema!r}; give such rows, or another loss",
                )


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
