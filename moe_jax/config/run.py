"""Configuration of a training run, parsed once from a `configs/*.py` file."""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_jax.config.data import DataConfig
from moe_jax.config.evaluation import EvaluationConfig
from moe_jax.config.expand import expand_sweep, select_adapters
from moe_jax.config.model import ComputeConfig, StorageType
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.config.parse import (
    NONE_ADVICE,
    ROOT,
    Registry,
    field_prefix,
    parse,
    require,
    to_plain,
)
from moe_jax.config.preference import ROWS_PER_EXAMPLE, PreferenceConfig
from moe_jax.config.rank_match import check_matches, parse_method
from moe_jax.errors import ConfigError
from moe_jax.terminal import describe_value


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The frozen base model.

    Attributes:
      path: folder with a Hugging Face checkpoint, or a hub id. Required.
      param_dtype: dtype of the frozen parameters on the device. Required. `float32`, `bfloat16` or
        `float16`; or quantized while loading to `int8` or `fp8` (one scale for each output), `nf4`
        (one scale for 64 inputs of an output) or `nf4_double` (with 8-bit scales). Quantization
        applies to the layers' projections; all other parameters are then bfloat16. Choose a
        quantized type if the weights do not fit into the device's memory.
      revision: revision on the hub. Default None: the newest.
      hf_config: fields of the checkpoint's `config.json`, for `train.py --plan` without the
        checkpoint. A run compares them with the checkpoint's. Default None.
    """

    path: str
    param_dtype: StorageType
    revision: str | None = None
    hf_config: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each axis of the mesh; -1 takes all remaining devices.

    Attributes:
      data: number of copies of the model, each with its own rows of a batch. Default -1.
      fsdp: number of devices that share one copy of the parameters and split the rows. Default 1;
        raise it if one device cannot hold the model.
      tensor: number of devices that split each matrix product. Default 1; raise it where `fsdp`
        alone does not suffice, on devices with fast links.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            require(size == -1 or size > 0, name, "must be positive, or -1 for the rest")
        rest = [name for name, size in sizes.items() if size == -1]
        reason = f"only one axis may be -1, but {' and '.join(rest)} are; give one of them a size"
        require(len(rest) <= 1, rest[-1] if rest else "data", reason)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """One adapter: method, data and optimizer.

    Attributes:
      method: configuration of the method (for example `LoraConfig`), chosen by `method.name`.
        Required. Its `rank` may also be `match:NAME`, the rank at which the adapter's number of
        parameters is nearest to that of the adapter NAME, or `parameters:N`; its `alpha` may be a
        multiple of the rank, such as `2*rank`.
      data: see `DataConfig`. Required.
      optimizer: see `OptimizerConfig`. Required.
      batch_size: rows of this adapter in one optimizer step, over all devices and micro-batches.
        Required. An example of preference data takes two rows: the chosen and the rejected answer,
        or for `kto` the answer and another example's, for the estimate of KL.
      preference: the preference loss, chosen by `preference.name`; see `PreferenceConfig`. Default
        None: the adapter learns to write the answers of its data.
      steps: number of optimizer steps. Exclusive with `epochs`. Default None: the length of
        `training`, unless `epochs` is given. All adapters start together; one that ends earlier
        leaves the batch.
      epochs: number of passes over the adapter's training rows. Default None.
      seed: seed of the initialization and of the order of rows. Default None: `training.seed`.
      evaluation: see `EvaluationConfig`. Default None: no evaluation on tasks.
      start_from: folder of a saved adapter whose weights training starts from. It must have the
        same base and method; settings that only training reads, such as dropout and losses, may
        differ. Default None: a new adapter.
    """

    method: Any
    data: DataConfig
    optimizer: OptimizerConfig
    batch_size: int
    preference: PreferenceConfig | None = None
    steps: int | None = None
    epochs: float | None = None
    seed: int | None = None
    evaluation: EvaluationConfig | None = None
    start_from: str | None = None

    def __post_init__(self):
        require(self.batch_size > 0, "batch_size", "must be positive")
        _require_length(self, "or neither for those of training")
        require(self.seed is None or self.seed >= 0, "seed", "must not be negative")
        with field_prefix("data"):
            self.data.check_labels(self.method.classification)
            self.data.check_preference(self.preference)
            groups = {name: source.expert_group for name, source in self.data.train.items()}
            self.method.check_expert_groups(groups)
        require(
            self.evaluation is None or self.method.classification is None,
            "evaluation",
            "a classifier answers no questions; name its task's validation rows in data.validation",
        )
        if self.preference is not None:
            require(
                self.method.classification is None,
                "preference",
                "a classifier writes no answers; leave out preference or method.classification",
            )
            self.preference.check_adapter(self.batch_size, self.start_from, self.method.new_tokens)

    @property
    def rows_per_example(self) -> int:
        """Rows of a batch for each example of the data."""
        return 1 if self.preference is None else ROWS_PER_EXAMPLE


_NOT_BETWEEN = "0 measures only before the first step and after the last"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length of the run, and intervals of its records.

    Attributes:
      steps: number of optimizer steps of adapters without `steps` or `epochs`. Exclusive with
        `epochs`.
      epochs: number of passes over an adapter's training rows, for the same adapters.
      micro_batches: number of parts of a batch that are computed one after another; their gradients
        are summed before the optimizer step. Default 1; raise it if a step runs out of memory.
      max_batch_rows: largest number of rows of a step over all adapters. Default None: no limit.
      seed: seed of dropout and jitter, of the order of batches by length, which all adapters share,
        and of the adapters without a seed. Default 0.
      log_every: steps between two lines of metrics. Default 10.
      eval_every: steps between two measurements of the validation losses. Default 0: only before
        the first step and after the last.
      max_skipped_steps: number of consecutive steps with a non-finite gradient after which the run
        stops. Default 10.
      initial_loss_scale: first value of dynamic loss scaling, for `compute.dtype` `float16` alone.
        Default 65536.
    """

    steps: int | None = None
    epochs: float | None = None
    micro_batches: int = 1
    max_batch_rows: int | None = None
    seed: int = 0
    log_every: int = 10
    eval_every: int = field(default=0, metadata={NONE_ADVICE: _NOT_BETWEEN})
    max_skipped_steps: int = 10
    initial_loss_scale: float = 65536.0

    def __post_init__(self):
        _require_length(self, _SET_OTHER_TO_NONE)
        rows = self.max_batch_rows
        require(rows is None or rows > 0, "max_batch_rows", "must be positive, or None")
        for name in ("micro_batches", "log_every", "max_skipped_steps"):
            require(getattr(self, name) > 0, name, "must be positive")
        require(self.eval_every >= 0, "eval_every", f"must not be negative; {_NOT_BETWEEN}")
        require(self.seed >= 0, "seed", "must not be negative")
        require(self.initial_loss_scale >= 1.0, "initial_loss_scale", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving of training states, from which a run resumes.

    Attributes:
      every: steps between two saves. Default 200. The last step is always saved.
      minutes: minutes after the last save at which the state is saved too; 0 saves by steps only.
        Default 10.
      keep: number of states that are kept, the newest ones. Default 2.
      fall_back: whether a run whose newest state is damaged resumes from the one before it; if
        not, that is an error. Default True.
    """

    every: int = 200
    minutes: float = 10.0
    keep: int = 2
    fall_back: bool = True

    def __post_init__(self):
        require(self.every > 0, "every", "must be positive")
        require(self.minutes >= 0, "minutes", "must not be negative")
        require(self.keep > 0, "keep", "must be positive")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Destinations of metrics besides the console and `metrics.jsonl`.

    Attributes:
      tensorboard: write event files for TensorBoard to the work directory. Default False.
      wandb_project: project on Weights & Biases. Default None: not used.
      matrix_tflops: TFLOP/s of matrix products of one device, which the operations of the model are
        compared with (MFU). Default None: the peak of the data sheet for known chips (H200, H100,
        A100 80GB, TPU v5p, TPU v6e), and the rate of a product measured at the start for others.
    """

    tensorboard: bool = False
    wandb_project: str | None = None
    matrix_tflops: float | None = None

    def __post_init__(self):
        rate = self.matrix_tflops
        require(rate is None or rate > 0, "matrix_tflops", "must be positive")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Configuration of `train.py`.

    Attributes:
      base: see `BaseConfig`. Required.
      compute: see `ComputeConfig`. Required.
      adapters: adapters by name; see `AdapterConfig`. At least one is required. All of them train
        in the same step on one base model.
      training: see `TrainingConfig`. Required.
      mesh: see `MeshConfig`. Default: every device holds a copy of the model.
      checkpoints: see `CheckpointConfig`.
      logging: see `LoggingConfig`.
      tasks_folder: folder with a folder of rows for each task, as for `moe-jax evaluate --data`.
        Default None: tasks come from the hub.
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
            group, length = self.length_group(name)
            require(
                length.epochs is None or not adapter.data.streaming,
                f"{group}.epochs",
                f"adapters.{name}.data.streaming reads data of unknown length; give steps instead",
            )
            require(
                length.steps is not None or length.epochs is not None,
                "training.steps",
                f"give either steps or epochs, {_SET_OTHER_TO_NONE}",
            )
            parts = self.training.micro_batches
            of_pairs = "" if adapter.preference is None else " of whole examples, two rows each"
            require(
                adapter.batch_size % (parts * adapter.rows_per_example) == 0,
                f"adapters.{name}.batch_size",
                f"{adapter.batch_size} rows cannot be cut into "
                f"training.micro_batches={parts} equal parts{of_pairs}; make it a multiple of "
                f"{parts * adapter.rows_per_example}",
            )
        first, *others = self.adapters
        for name in others:
            tokens, former = (self.adapters[n].method.new_tokens for n in (name, first))
            require(
                tokens == former,
                f"adapters.{name}.method.new_tokens",
                f"{tokens}, but {first!r} has {former}; all adapters of a run have the same tokens",
            )
        rows = sum(adapter.batch_size for adapter in self.adapters.values())
        max_rows = self.training.max_batch_rows
        require(
            max_rows is None or rows <= max_rows,
            "training.max_batch_rows",
            f"the adapters take {rows} rows of a step, more than {max_rows}; lower a batch_size, "
            "or raise it",
        )

    def length_group(self, name: str) -> tuple[str, AdapterConfig | TrainingConfig]:
        """Path and group of the configuration that sets the length of adapter `name`."""
        adapter = self.adapters[name]
        if adapter.steps is None and adapter.epochs is None:
            return "training", self.training
        return f"adapters.{name}", adapter

    @property
    def methods(self) -> dict[str, Any]:
        """Method of each adapter by name; a `MatchedMethod` until its rank is chosen."""
        return {name: adapter.method for name, adapter in self.adapters.items()}

    @property
    def preferences(self) -> dict[str, PreferenceConfig]:
        """Preference loss of each adapter that has one, by name."""
        losses = {name: adapter.preference for name, adapter in self.adapters.items()}
        return {name: loss for name, loss in losses.items() if loss is not None}

    def seed(self, name: str) -> int:
        """Seed of adapter `name`."""
        seed = self.adapters[name].seed
        return self.training.seed if seed is None else seed

    def narrowed(self, names: Collection[str]) -> "RunConfig":
        """The same configuration with only these adapters."""
        kept = {name: adapter for name, adapter in self.adapters.items() if name in names}
        return dataclasses.replace(self, adapters=kept)

    def _check_names(self) -> None:
        """Refuses names of adapters that are invalid names of folders or of metrics."""
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


_SET_OTHER_TO_NONE = "and None for the other (--config.training.epochs=None)"


def _require_length(group: AdapterConfig | TrainingConfig, hint: str) -> None:
    both = group.steps is not None and group.epochs is not None
    require(not both, "steps", f"give either steps or epochs, {hint}")
    require(group.steps is None or group.steps > 0, "steps", "must be positive")
    require(group.epochs is None or group.epochs > 0, "epochs", "must be positive")


def parse_run_config(raw: Mapping[str, Any], methods: Registry) -> RunConfig:
    """Creates a `RunConfig` from the result of a config file's `get_config()`.

    The fields `train_only` and `sweep` are applied first; see `select_adapters` and
    `expand_sweep`.

    Args:
      raw: nested mappings; convert an `ml_collections.ConfigDict` with `.to_dict()`.
      methods: adapter methods (`adapters.METHODS`).

    Raises:
      ConfigError: a field is invalid; the message has its path.
    """
    try:
        return _parse_run_config(raw, methods)
    except RecursionError:
        raise ConfigError(f"{ROOT}: a value is nested too deeply, or holds itself") from None


def _parse_run_config(raw: Mapping[str, Any], methods: Registry) -> RunConfig:
    if not isinstance(raw, Mapping):  # a `config.json` may hold anything
        raise ConfigError(f"{ROOT}: expected a group of fields, got {describe_value(raw)}")
    given, selected = raw, select_adapters(raw)
    raw = {**expand_sweep(selected, AdapterConfig, methods)}
    adapters = raw.get("adapters")
    if isinstance(adapters, Mapping):
        parsed = {
            name: _with_parsed_method(adapter, methods, f"{ROOT}.adapters.{name}")
            for name, adapter in adapters.items()
        }
        left_out = given["adapters"].keys() - selected["adapters"].keys()
        raw["adapters"] = check_matches(parsed, selected["adapters"], left_out)
    return parse(RunConfig, raw)


def _with_parsed_method(adapter: Any, methods: Registry, path: str) -> Any:
    if not isinstance(adapter, Mapping) or "method" not in adapter:
        return adapter  # `parse` refuses it with a message
    return {**adapter, "method": parse_method(adapter["method"], methods, f"{path}.method")}


def to_json(config: RunConfig) -> str:
    """Writes `config` as JSON, from which `parse_run_config` creates an equal `RunConfig`."""
    return json.dumps(to_plain(config), indent=2)
