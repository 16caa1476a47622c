"""How an adapter is measured on tasks, during training and at its end."""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import DataConfig
from moe_jax.config.expand import expand_sweep, select_adapters
from moe_jax.config.model import ComputeConfig, StorageType
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.config.parse import (
    NOT_NONE,
    ROOT,
    Registry,
    parse,
    parse_member,
    require,
    to_plain,
    within,
)

ProtocolName = Literal["labels", "choices"]

_END_ONLY = "0 measures at the end only"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The tasks that an adapter is measured on, as by `moe-jax evaluate`.

    Attributes:
      tasks: their names. Their rows are those of `tasks_folder`, or else of the hub.
      every: steps between two measurements while training; 0 measures at the end only, once all
        adapters have finished.
      limit: only so many of each task's first rows.
      limit_between: the same for the measurements before the end; None is `limit`.
      protocols: how the tasks are asked. `labels` gives `label_acc`, `choices` gives `acc` and
        `acc_norm`. A task that a protocol does not fit is left out of it.
      split: another split than each task's own.
      shots: answered examples before each question; None leaves each task's own number.
      batch_size: sequences computed at once, over all devices.
      buckets: ascending lengths that sequences are padded to; by default 32, 64, ... The base's
        context is always the last one. Each is one compilation.
      truncate: cuts the start off a prompt longer than the base's context, which is refused else.
      with_base: at the end, the base without an adapter is measured on these tasks too.
    """

    tasks: tuple[str, ...]
    every: int = field(default=0, metadata={NOT_NONE: _END_ONLY})
    limit: int | None = None
    limit_between: int | None = None
    protocols: tuple[ProtocolName, ...] = ("labels", "choices")
    split: str | None = None
    shots: int | None = None
    batch_size: int = 16
    buckets: tuple[int, ...] = ()
    truncate: bool = False
    with_base: bool = False

    def __post_init__(self):
        for given in ("tasks", "protocols"):
            names = getattr(self, given)
            require(bool(names), given, "names none")
            repeated = sorted({name for name in names if names.count(name) > 1})
            require(not repeated, given, f"names {', '.join(repeated)} more than once")
        require(self.every >= 0, "every", f"must not be negative; {_END_ONLY}")
        for given in ("limit", "limit_between"):
            number = getattr(self, given)
            require(number is None or number > 0, given, "must be positive, or None for all")
        require(self.shots is None or self.shots >= 0, "shots", "must not be negative")
        require(self.batch_size > 0, "batch_size", "must be positive")
        ascends = list(self.buckets) == sorted(set(self.buckets))
        require(ascends and all(b > 0 for b in self.buckets), "buckets", "must ascend strictly")


# FIXME docstring of the merged config.run:
# """The whole configuration of a training run, parsed once from a `configs/*.py` file."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The frozen base model.

    Attributes:
      path: a folder with a Hugging Face checkpoint, or a hub id.
      param_dtype: the type in which the frozen parameters are kept on the device: a float type, or
        quantised while loading to `int8` or `fp8` (a scale for each output), `nf4` (a scale for 64
        inputs of an output) or `nf4_double` (the scales in eight bits too). The parameters beside
        the layers' projections are then bfloat16.
      revision: the hub revision.
      hf_config: the fields of the checkpoint's `config.json`, where they are to be known without
        the checkpoint (`train.py --plan`). A run compares them with the checkpoint's own.
    """

    path: str
    param_dtype: StorageType
    revision: str | None = None
    hf_config: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices along each axis of the mesh; -1 takes all that the others leave.

    Attributes:
      data: copies of the model, each with its own rows of a batch.
      fsdp: devices that share one copy of the parameters and also split the rows.
      tensor: devices that split each matrix product.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            require(size == -1 or size > 0, name, "must be positive, or -1 for the rest")
        require(list(sizes.values()).count(-1) <= 1, "data", "only one axis may be -1")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """One adapter: what it is, what it learns from, and how.

    Attributes:
      method: the method's own configuration (for example `LoraConfig`), chosen by `method.name`.
      data: its data sets.
      optimizer: its optimiser and schedule.
      batch_size: its rows in one optimiser step, over all devices and micro-batches.
      steps: its optimiser steps; exclusive with `epochs`. Without either, `training`'s length. All
        adapters begin together, and one that ends earlier leaves the batch.
      epochs: passes over its training rows.
      seed: of its initialisation and of the order of its rows; None is `training.seed`.
      evaluation: the tasks that it is measured on; None measures on none.
      start_from: a saved adapter's folder, whose weights training begins with; of the same base and
        method, but for what only training reads, such as dropout and losses. None begins fresh.
    """

    method: Any
    data: DataConfig
    optimizer: OptimizerConfig
    batch_size: int
    steps: int | None = None
    epochs: float | None = None
    seed: int | None = None
    evaluation: EvaluationConfig | None = None
    start_from: str | None = None

    def __post_init__(self):
        require(self.batch_size > 0, "batch_size", "must be positive")
        _require_length(self, "or neither for those of training")
        require(self.seed is None or self.seed >= 0, "seed", "must not be negative")
        with within("data"):
            _check_labels(self.method.classification, self.data)
            groups = {name: source.expert_group for name, source in self.data.train.items()}
            self.method.check_expert_groups(groups)
        require(
            self.evaluation is None or self.method.classification is None,
            "evaluation",
            "a classifier answers no questions; name its task's validation rows in data.validation",
        )


def _check_labels(classification: ClassificationConfig | None, data: DataConfig) -> None:
    """Refuses data sets without labels for a classifier, and with labels for a language model."""
    require(
        classification is None or not data.is_packed,
        "packing",
        "a classifier has one answer for each row, which can then hold one sequence only; "
        "leave packing out, and set buckets",
    )
    for split, sources in (("train", data.train), ("validation", data.validation)):
        for name, source in sources.items():
            has_labels = source.schema == "classification"
            require(
                has_labels or classification is None or source.task is not None,
                f"{split}.{name}.schema",
                f"{source.schema!r}, but method.classification learns rows of the schema "
                "'classification' or of a GLUE task",
            )
            require(
                not has_labels or classification is not None,
                f"{split}.{name}.schema",
                "'classification' needs method.classification, which names the labels",
            )


_NOT_BETWEEN = "0 measures only before the first step and after the last"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length and bookkeeping of the run.

    Attributes:
      steps: optimiser steps of the adapters that do not say it themselves; exclusive with `epochs`.
      epochs: passes over the adapter's training rows.
      micro_batches: parts into which a batch is cut; their gradients are summed before the one
        optimiser step.
      max_batch_rows: how many rows a step may have over all adapters; None sets no bound.
      seed: of dropout and jitter, of the order of batches by length, which all adapters share, and
        of the initialisation and the rows' order of adapters that have no seed of their own.
      log_every: steps between two lines of metrics.
      eval_every: steps between two measurements of the validation losses; 0 measures only before
        the first step and after the last.
      max_skipped_steps: consecutive steps with a gradient that is not finite before the run stops.
      initial_loss_scale: of the dynamic loss scaling; read with compute.dtype 'float16' only.
    """

    steps: int | None = None
    epochs: float | None = None
    micro_batches: int = 1
    max_batch_rows: int | None = None
    seed: int = 0
    log_every: int = 10
    eval_every: int = field(default=0, metadata={NOT_NONE: _NOT_BETWEEN})
    max_skipped_steps: int = 10
    initial_loss_scale: float = 65536.0

    def __post_init__(self):
        _require_length(self, _NONE_FOR_THE_OTHER)
        rows = self.max_batch_rows
        require(rows is None or rows > 0, "max_batch_rows", "must be positive, or None")
        for name in ("micro_batches", "log_every", "max_skipped_steps"):
            require(getattr(self, name) > 0, name, "must be positive")
        require(self.eval_every >= 0, "eval_every", f"must not be negative; {_NOT_BETWEEN}")
        require(self.seed >= 0, "seed", "must not be negative")
        require(self.initial_loss_scale >= 1.0, "initial_loss_scale", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When and how many training states are kept.

    Attributes:
      every: steps between two saves; the last step is always saved.
      keep: how many are kept, the newest ones.
    """

    every: int = 200
    keep: int = 2

    def __post_init__(self):
        require(self.every > 0, "every", "must be positive")
        require(self.keep > 0, "keep", "must be positive")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where metrics go besides the console and `metrics.jsonl`."""

    tensorboard: bool = False
    wandb_project: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything `train.py` needs to know.

    Attributes:
      tasks_folder: a folder that has a folder of rows for each task, as `moe-jax evaluate --data`
        takes it; None takes them from the hub.
    """

    base: BaseConfig
    compute: ComputeConfig
    adapters: dict[str, AdapterConfig]
    training: TrainingConfig
    mesh: MeshConfig = MeshConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    tasks_folder: str | None = None

    def __post_init__(self):
        require(bool(self.adapters), "adapters", "names no adapter")
        self._check_names()
        for name, adapter in self.adapters.items():
            _, length = self.length_group(name)
            require(
                length.steps is not None or length.epochs is not None,
                "training.steps",
                f"give either steps or epochs, {_NONE_FOR_THE_OTHER}",
            )
            require(
                adapter.batch_size % self.training.micro_batches == 0,
                f"adapters.{name}.batch_size",
                f"{adapter.batch_size} rows cannot be cut into "
                f"training.micro_batches={self.training.micro_batches} equal parts",
            )
        rows, most = sum(a.batch_size for a in self.adapters.values()), self.training.max_batch_rows
        require(
            most is None or rows <= most,
            "training.max_batch_rows",
            f"the adapters take {rows} rows of a step, more than {most}; lower a batch_size, or "
            "raise it",
        )

    def length_group(self, name: str) -> tuple[str, AdapterConfig | TrainingConfig]:
        """What says how long adapter `name` trains: the group's path, and the group."""
        own = self.adapters[name]
        if own.steps is None and own.epochs is None:
            return "training", self.training
        return f"adapters.{name}", own

    def seed(self, name: str) -> int:
        """The seed of adapter `name`."""
        own = self.adapters[name].seed
        return self.training.seed if own is None else own

    def narrowed(self, names: Collection[str]) -> "RunConfig":
        """The same run with these of its adapters alone."""
        kept = {name: adapter for name, adapter in self.adapters.items() if name in names}
        return dataclasses.replace(self, adapters=kept)

    def _check_names(self) -> None:
        """A name is a folder's, and a part of metrics' names."""
        folded: dict[str, str] = {}
        for name in self.adapters:
            where = f"adapters.{name}"
            require(
                re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.=+-]*[A-Za-z0-9_=+-])?", name) is not None,
                where,
                "an adapter's name holds letters, digits, '_', '-', '+', '=' and inner '.' only, "
                "and begins with a letter or digit",
            )
            require(
                name not in ("validation", "evaluation", "time"),
                where,
                "is the name of a group of metrics; give the adapter another one",
            )
            require(len(name) <= 128, where, "an adapter's name has at most 128 characters")
            other = folded.setdefault(name.casefold(), name)
            require(
                other == name,
                where,
                f"differs from {other!r} in upper and lower case only, which is the same folder on "
                "some file systems; rename one",
            )


_NONE_FOR_THE_OTHER = "and None for the other (--config.training.epochs=None)"


def _require_length(group: AdapterConfig | TrainingConfig, instead: str) -> None:
    both = group.steps is not None and group.epochs is not None
    require(not both, "steps", f"give either steps or epochs, {instead}")
    require(group.steps is None or group.steps > 0, "steps", "must be positive")
    require(group.epochs is None or group.epochs > 0, "epochs", "must be positive")


def parse_run_config(raw: Mapping[str, Any], methods: Registry) -> RunConfig:
    """Builds a `RunConfig` from what a config file's `get_config()` returned.

    Of the adapters, `only` keeps those that it names; None keeps all. A group `sweep` is then
    expanded into adapters; see `expand_sweep`.

    Args:
      raw: nested mappings; an `ml_collections.ConfigDict` is given as `.to_dict()`.
      methods: the adapter methods (`adapters.METHODS`).

    Raises:
      ConfigError: with the path of the offending field.
    """
    raw = {**expand_sweep(select_adapters(raw), AdapterConfig, methods)}
    adapters = raw.get("adapters")
    if isinstance(adapters, Mapping):
        raw["adapters"] = {
            name: _with_parsed_method(adapter, methods, f"{ROOT}.adapters.{name}")
            for name, adapter in adapters.items()
        }
    return parse(RunConfig, raw)


def _with_parsed_method(adapter: Any, methods: Registry, path: str) -> Any:
    if not isinstance(adapter, Mapping) or "method" not in adapter:
        return adapter  # `parse` says what is wrong with it
    return {**adapter, "method": parse_member(methods, adapter["method"], f"{path}.method")}


def to_json(config: RunConfig) -> str:
    """`config` as JSON that `parse_run_config` reads back to an equal `RunConfig`."""
    return json.dumps(to_plain(config), indent=2)
