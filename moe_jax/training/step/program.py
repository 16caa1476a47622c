"""The compiled functions of a training run and the shardings of its arrays, from shapes alone."""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.rows import AdapterRows, divide_rows
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import located
from moe_jax.config.run import RunConfig
from moe_jax.data.batch import Batch
from moe_jax.layers.frozen import check_storage, storage_of
from moe_jax.layers.names import ADAPTERS, PARAMS
from moe_jax.models.adapted import (
    SINGLE,
    CompiledLlama,
    abstract_params,
    single_adapter,
    untrained_adapter,
)
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.compiler_options import compiler_options
from moe_jax.sharding.mesh import make_mesh
from moe_jax.sharding.platform import require_platform
from moe_jax.sharding.rules import BATCH_SPEC, num_row_shards, shardings_of
from moe_jax.training.step import step
from moe_jax.training.step.micro_batches import require_single_sequences, split_into_micro_batches
from moe_jax.training.step.optimizer import (
    build_optimizer,
    initial_loss_scale,
    learning_rate_schedule,
)
from moe_jax.training.step.program_checks import (
    require_divisible_rows,
    require_fitting_methods,
    require_fusible_experts,
)
from moe_jax.training.step.state import TrainState, state_shardings

BATCH_TYPES = Batch(
    tokens=jnp.int32,
    loss_mask=jnp.bool,
    segment_ids=jnp.int32,
    positions=jnp.int32,
    expert_groups=jnp.int32,
    labels=jnp.float32,
    reference_log_probs=jnp.float32,
)


@dataclass(frozen=True)
class Program:
    """The compiled functions of the adapters that train; see `build_program`.

    Attributes:
      config: configuration of the run, with the adapters that train.
      llama: the model on the mesh, with its compiled functions.
      adapter_rows: rows of each adapter in a whole batch.
      abstract_params: shapes and dtypes of the frozen base.
      param_shardings: shardings of the frozen base.
      abstract_state: shapes and dtypes of the training state.
      state_shardings: shardings of the training state.
      optimizer: transform of `{"params": base, "adapters": {name: tree}}`.
      total_steps: optimizer steps of the whole run, by adapter.
      compiled: training steps compiled so far, by row length.
    """

    config: RunConfig
    llama: CompiledLlama
    adapter_rows: tuple[AdapterRows, ...]
    abstract_params: Any
    param_shardings: Any
    abstract_state: TrainState
    state_shardings: TrainState
    optimizer: optax.GradientTransformation
    total_steps: Mapping[str, int]
    compiled: dict[int, jax.stages.Compiled] = field(default_factory=dict)

    @property
    def model(self) -> LlamaForCausalLM:
        """The model without adapter rows."""
        return self.llama.model

    @property
    def mesh(self) -> Mesh:
        """The mesh of devices."""
        assert self.llama.mesh is not None
        return self.llama.mesh

    @property
    def packed(self) -> bool:
        """True if rows of training batches may hold several sequences.

        Attention runs on all rows of a batch at once, so that the packed rows of one adapter
        suffice.
        """
        return any(adapter.data.is_packed for adapter in self.config.adapters.values())

    def narrowed(self, names: Collection[str]) -> "Program":
        """The program that trains only these adapters, for the rest of the same run.

        Compiled evaluation functions are shared with it.
        """
        return _program(self.config.narrowed(names), self.llama, self.total_steps)

    def init_state(self, params: Any, starts: Mapping[str, Any] | None = None) -> TrainState:
        """A new training state, created on its devices; equal on every mesh up to rounding.

        An adapter depends on its method, its seed and the base, not on the other adapters.

        Args:
          params: the frozen base, which for example DoRA's magnitudes start from.
          starts: weights of adapters that do not start untrained, by name.
        """
        init = functools.partial(_new_state, self.config, self.model, self.optimizer)
        init = jax.jit(init, out_shardings=self.state_shardings)
        with self.llama.context():
            return init(_keys(self.config), params, dict(starts or {}))

    def train_step(
        self, state: TrainState, params: Any, batch: Batch
    ) -> tuple[TrainState, step.Metrics]:
        """One optimizer step; see `step.train_step`. `state` is donated and must not be used again.

        Args:
          state: training state.
          params: the frozen base.
          batch: batch from `put_train_batch`.
        """
        return self.compiled_train_step(batch.tokens.shape[-1])(state, params, batch)

    def compiled_train_step(self, row_length: int) -> jax.stages.Compiled:
        """The training step for rows of `row_length` tokens, compiled once and without arrays."""
        if row_length not in self.compiled:
            self.compiled[row_length] = self.lower_train_step(row_length).compile()
        return self.compiled[row_length]

    def lower_train_step(self, row_length: int) -> jax.stages.Lowered:
        """The training step for rows of `row_length` tokens, lowered without any weights."""
        micro = self.config.training.micro_batches
        rows = sum(rows.total for rows in self.micro_rows)
        shape = (micro, rows, row_length)
        batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in BATCH_TYPES))
        with self.llama.context():
            return self._train_step.lower(self.abstract_state, self.abstract_params, batch)

    def eval_step(
        self, name: str | None, adapters: Mapping[str, Any], params: Any, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Summed loss in nats and number of target tokens; see `step.eval_step`.

        Args:
          name: adapter of all rows; None for the base model.
          adapters: adapter trees by name; may hold others too.
          params: the frozen base.
          batch: batch from `put_eval_batch`.
        """
        return self._evaluate(step.eval_step, name, adapters, params, batch)

    def score_step(
        self, name: str, adapters: Mapping[str, Any], params: Any, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Loss [B] and scores [B, N] of each row by the classification adapter `name`.

        Args:
          name, adapters, params, batch: see `eval_step`.
        """
        return self._evaluate(step.score_step, name, adapters, params, batch)

    def answer_step(
        self, method: AdapterMethod | None, tree: Any, params: Any, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probability and number of tokens of each row's answer; see `step.answer_step`.

        Args:
          method: method of the adapter of all rows; None for the base model.
          tree: weights of the adapter; not read for the base.
          params: the frozen base.
          batch: batch from `put_eval_batch`.
        """
        model = self.llama.with_rows(single_adapter(method, batch.tokens.shape[0]))
        trees = {} if method is None else {SINGLE: tree}
        return self.llama.jit(step.answer_step, model, replicate=True)(trees, params, batch)

    def put_train_batch(self, batch: Batch) -> Batch:
        """Splits a batch of NumPy arrays [B, S] into micro-batches, as global arrays [M, b, S].

        Every process passes the whole batch, rows in the order of the adapters, and keeps the rows
        of its own devices. The rows of each adapter are spread evenly over micro-batches and
        devices.
        """
        batch = split_into_micro_batches(
            batch, self.adapter_rows, self.config.training.micro_batches
        )
        return self._put(batch, PartitionSpec(None, *BATCH_SPEC), packed=self.packed)

    def put_eval_batch(self, batch: Batch) -> Batch:
        """A batch of NumPy arrays [B, S] as global arrays."""
        return self._put(batch, BATCH_SPEC)

    def learning_rates(self, done: int) -> dict[str, float]:
        """Learning rate of each adapter for the optimizer step after `done` applied ones."""
        return {name: rates[done].item() for name, rates in self._learning_rates.items()}

    @functools.cached_property
    def sites(self) -> dict[str, list[str]]:
        """Sites of the routers of each adapter that routes, in the order of its metrics' rows."""
        found: dict[str, list[str]] = {}
        model = self.model.clone(adapter_rows=self.micro_rows)

        def trace(params: Any, adapters: Any, batch: Batch) -> None:
            _, statistics = step.forward(model, params, adapters, batch)
            found.update({name: list(sites) for name, sites in statistics.items()})

        rows = sum(rows.total for rows in self.micro_rows)
        batch = Batch(*(jax.ShapeDtypeStruct((rows, 2), dtype) for dtype in BATCH_TYPES))
        with self.llama.context():
            adapters = self.abstract_state.adapters
            jax.eval_shape(self.llama.traceable(trace), self.abstract_params, adapters, batch)
        return found

    @functools.cached_property
    def micro_rows(self) -> tuple[AdapterRows, ...]:
        """Rows of each adapter in a micro-batch."""
        micro = self.config.training.micro_batches
        methods = {rows.name: rows.method for rows in self.adapter_rows}
        counts = {rows.name: rows.total // micro for rows in self.adapter_rows}
        return divide_rows(methods, counts, self.adapter_rows[0].shards)

    def _evaluate(
        self,
        function: Any,
        name: str | None,
        adapters: Mapping[str, Any],
        params: Any,
        batch: Batch,
    ) -> tuple[jax.Array, jax.Array]:
        method = None if name is None else self.config.adapters[name].method
        model = self.llama.with_rows(single_adapter(method, batch.tokens.shape[0]))
        tree = {} if name is None else {SINGLE: adapters[name]}
        return self.llama.jit(function, model, replicate=True)(tree, params, batch)

    def _put(self, batch: Batch, spec: PartitionSpec, *, packed: bool = False) -> Batch:
        if not packed:
            require_single_sequences(batch)
        sharding = NamedSharding(self.mesh, spec)

        def put(array: Any) -> jax.Array:
            array = np.asarray(array)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return Batch(*(put(array) for array in batch))

    @functools.cached_property
    def _learning_rates(self) -> dict[str, np.ndarray]:
        # All at once: a schedule evaluated between two steps would queue behind the first of them,
        # and the host would wait for the device.
        rates = {}
        for name, adapter in self.config.adapters.items():
            settings, total = adapter.optimizer, self.total_steps[name]
            schedule = learning_rate_schedule(settings.schedule, settings.learning_rate, total)
            rates[name] = np.asarray(jax.vmap(schedule)(jnp.arange(total + 1)))
        return rates

    @functools.cached_property
    def _train_step(self) -> Any:
        model = self.model.clone(adapter_rows=self.micro_rows)
        seed = self.config.training.seed
        function = functools.partial(
            step.train_step,
            model,
            self.optimizer,
            seed,
            packed=self.packed,
            preferences=self.config.preferences,
        )
        batch_sharding = NamedSharding(self.mesh, PartitionSpec(None, *BATCH_SPEC))
        return jax.jit(
            self.llama.traceable(function),
            in_shardings=(self.state_shardings, self.param_shardings, batch_sharding),
            out_shardings=(self.state_shardings, NamedSharding(self.mesh, PartitionSpec())),
            donate_argnums=0,
            compiler_options=compiler_options(self.mesh.devices.flat[0]),
        )


def build_program(
    config: RunConfig,
    model_config: ModelConfig,
    total_steps: int | Mapping[str, int],
    devices: Sequence[Any] | None = None,
) -> Program:
    """Builds the program of a run; needs neither weights nor data.

    Args:
      config: configuration of the run; all of its adapters train.
      model_config: architecture of the base model.
      total_steps: optimizer steps of the whole run, for the schedules; of all adapters or by
        adapter.
      devices: devices of the mesh, which may be abstract; by default all of all processes.

    Raises:
      DeviceError: the devices do not fit the mesh or the kernels, or the mesh does not fit the
        model.
      ConfigError: a batch does not divide over the mesh, or the settings cannot compute the model.
    """
    require_platform(config.compute, devices)
    mesh = make_mesh(config.mesh, devices)
    require_fitting_methods(config, model_config)
    require_fusible_experts(config, mesh)
    require_divisible_rows(config, mesh)
    with located("config.compute"):
        config.compute.check_model(model_config)
    with located("config.base"):
        check_storage(storage_of(config.base.param_dtype), model_config)
    model = LlamaForCausalLM(model_config, config.compute, param_dtype=config.base.param_dtype)
    if isinstance(total_steps, int):
        total_steps = dict.fromkeys(config.adapters, total_steps)
    return _program(config, CompiledLlama(model, mesh), total_steps)


def _program(config: RunConfig, llama: CompiledLlama, total_steps: Mapping[str, int]) -> Program:
    mesh, model = llama.mesh, llama.model
    assert mesh is not None
    methods = config.methods
    rows = {name: adapter.batch_size for name, adapter in config.adapters.items()}
    optimizers = {name: adapter.optimizer for name, adapter in config.adapters.items()}
    optimizer = build_optimizer(optimizers, total_steps)
    boxed = abstract_params(model)
    params = nn.meta.unbox(boxed)
    abstract_adapters = {
        method: jax.eval_shape(
            functools.partial(untrained_adapter, model, method), params, jax.random.key(0)
        )
        for method in set(methods.values())
    }
    adapter_shardings = shardings_of(
        {name: abstract_adapters[m] for name, m in methods.items()}, mesh
    )
    new_state = functools.partial(_new_state, config, model, optimizer)
    state = jax.eval_shape(new_state, _keys(config), params, {})
    return Program(
        config=config,
        llama=llama,
        adapter_rows=divide_rows(methods, rows, num_row_shards(mesh)),
        abstract_params=params,
        param_shardings=shardings_of(boxed, mesh),
        abstract_state=state,
        state_shardings=state_shardings(state, adapter_shardings, mesh),
        optimizer=optimizer,
        total_steps=total_steps,
    )


def _new_state(
    config: RunConfig,
    model: LlamaForCausalLM,
    optimizer: optax.GradientTransformation,
    keys: Mapping[str, jax.Array],
    params: Any,
    starts: Mapping[str, Any],
) -> TrainState:
    # Jitted with a static method: of equal methods, the model is traced for one only.
    untrained = jax.jit(untrained_adapter, static_argnums=(0, 1))
    adapters = {
        name: starts[name]
        if name in starts
        else nn.meta.unbox(untrained(model, method, params, keys[name]))
        for name, method in config.methods.items()
    }
    scales = {}
    if config.compute.dtype == "float16":
        scale = config.training.initial_loss_scale
        scales = {name: initial_loss_scale(scale) for name in adapters}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    references = {
        name: adapters[name]
        for name, preference in config.preferences.items()
        if preference.step_reference == "start"
    }
    return TrainState(
        step=jnp.int32(0),
        adapters=adapters,
        references=references,
        opt_state=optimizer.init({PARAMS: shapes, ADAPTERS: adapters}),
        loss_scale=scales,
    )


def _keys(config: RunConfig) -> dict[str, jax.Array]:
    """Random key of each adapter's initialization."""
    return {name: jax.random.key(config.seed(name)) for name in config.adapters}
