"""A run's compiled functions and where their arrays live; needs neither weights nor data."""

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

from moe_jax.adapters.rows import Segment, segments_of
from moe_jax.config.model import ModelConfig
from moe_jax.config.run import RunConfig
from moe_jax.data.batch import Batch
from moe_jax.layers.names import ADAPTERS, PARAMS
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.models.fresh import fresh_adapter
from moe_jax.sharding.mesh import make_mesh, require_platform
from moe_jax.sharding.rules import BATCH_SPEC, shardings_of
from moe_jax.training.run.checks import require_divisible_rows, require_fitting_methods
from moe_jax.training.step import step
from moe_jax.training.step.evaluate import Evaluate, make_evaluate, twins, with_rules
from moe_jax.training.step.loss_scale import initial_loss_scale
from moe_jax.training.step.micro_batches import in_micro_batches, require_single_sequences
from moe_jax.training.step.optimizer import build_optimizer, learning_rate_schedule
from moe_jax.training.step.state import TrainState, state_shardings

BATCH_TYPES = Batch(
    tokens=jnp.int32,
    loss_mask=jnp.bool,
    segment_ids=jnp.int32,
    positions=jnp.int32,
    expert_groups=jnp.int32,
    labels=jnp.float32,
)


@dataclass(frozen=True)
class Program:
    """See `build_program`.

    Attributes:
      config: the run's configuration, of the adapters that train.
      mesh: the devices.
      segments: which rows of a whole batch belong to which adapter.
      abstract_params: shapes and types of the frozen base.
      param_shardings: where its leaves live.
      abstract_state: shapes and types of the training state.
      state_shardings: where its leaves live.
      model: the language model, without segments.
      optimizer: the transform of `{"params": base, "adapters": {name: tree}}`.
      total_steps: optimiser steps of the whole run, by adapter.
      evaluate: the jitted evaluation step.
      score: the same of classification adapters, row by row.
      compiled: the training steps compiled so far, by row length.
    """

    config: RunConfig
    mesh: Mesh
    segments: tuple[Segment, ...]
    abstract_params: Any
    param_shardings: Any
    abstract_state: TrainState
    state_shardings: TrainState
    model: LlamaForCausalLM
    optimizer: optax.GradientTransformation
    total_steps: Mapping[str, int]
    evaluate: Evaluate
    score: Evaluate
    compiled: dict[int, jax.stages.Compiled] = field(default_factory=dict)

    def init_state(self, params: Any, starts: Mapping[str, Any] | None = None) -> TrainState:
        """A fresh training state, made in place; the same, to rounding, on every mesh.

        An adapter depends on its method, its seed and the base, not on what is beside it.

        Args:
          params: the frozen base, some of which methods like DoRA start from.
          starts: by name, the weights of adapters that do not begin fresh.
        """
        init = jax.jit(self._fresh_state, out_shardings=self.state_shardings)
        with self._mesh_context():
            return init(_keys(self.config), params, dict(starts or {}))

    def narrowed(self, names: Collection[str]) -> "Program":
        """The program that trains these of the adapters alone, for the rest of the same run.

        Evaluation is not compiled a second time.
        """
        config = self.config.narrowed(names)
        functions = self.evaluate, self.score
        return _program(config, self.model.config, self.total_steps, self.mesh, functions)

    def train_step(
        self, state: TrainState, params: Any, batch: Batch
    ) -> tuple[TrainState, step.Metrics]:
        """One optimiser step; see `step.train_step`. `state` is donated: do not use it again.

        Args:
          state: where training stands.
          params: the frozen base.
          batch: what `put_train_batch` returned.
        """
        return self.compiled_train_step(batch.tokens.shape[-1])(state, params, batch)

    def compiled_train_step(self, row_length: int) -> jax.stages.Compiled:
        """The training step for rows of `row_length` tokens, compiled once and without arrays."""
        if row_length not in self.compiled:
            self.compiled[row_length] = self.lower_train_step(row_length).compile()
        return self.compiled[row_length]

    def eval_step(
        self, name: str | None, adapters: Mapping[str, Any], params: Any, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Summed loss in nats and number of target tokens.

        Args:
          name: the adapter that all rows belong to, or None for the base as it is.
          adapters: `{name: tree}`; may hold others too.
          params: the frozen base.
          batch: what `put_eval_batch` returned.
        """
        with self._mesh_context():
            return self.evaluate(name, adapters, params, batch)

    def score_step(
        self, name: str, adapters: Mapping[str, Any], params: Any, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Each row's loss [B] and scores [B, N] by the classification adapter `name`.

        Args:
          name, adapters, params, batch: see `eval_step`.
        """
        with self._mesh_context():
            return self.score(name, adapters, params, batch)

    def put_train_batch(self, batch: Batch) -> Batch:
        """A batch of NumPy arrays [B, S], cut into micro-batches, as global arrays [M, b, S].

        Every process gives the whole batch, rows in the order of the segments, and keeps those of
        its own devices. Each adapter's rows are spread evenly over micro-batches and devices.
        """
        micro = self.config.training.micro_batches
        batch = in_micro_batches(batch, self.segments, micro)
        return self._put(batch, PartitionSpec(None, *BATCH_SPEC), packed=self.packed)

    def put_eval_batch(self, batch: Batch) -> Batch:
        """A batch of NumPy arrays [B, S] as global arrays."""
        return self._put(batch, BATCH_SPEC)

    def learning_rates(self, done: int) -> dict[str, float]:
        """Each adapter's learning rate for the optimiser step after `done` applied ones."""
        return {name: rates[done].item() for name, rates in self._learning_rates.items()}

    def lower_train_step(self, row_length: int) -> jax.stages.Lowered:
        """The training step for rows of `row_length` tokens, lowered without any weights."""
        micro = self.config.training.micro_batches
        rows = sum(segment.rows for segment in self.segments)
        shape = (micro, rows // micro, row_length)
        batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in BATCH_TYPES))
        with self._mesh_context():
            return self._train_step.lower(self.abstract_state, self.abstract_params, batch)

    @functools.cached_property
    def sites(self) -> dict[str, list[str]]:
        """Where each adapter that routes has its routers, in the order of its metrics' rows."""
        found: dict[str, list[str]] = {}

        def trace(params: Any, adapters: Any, batch: Batch) -> None:
            model = self.model.clone(segments=self._micro_segments)
            _, statistics = step.forward(model, params, adapters, batch, dropout_key=None)
            found.update({name: list(sites) for name, sites in statistics.items()})

        rows = sum(segment.rows for segment in self._micro_segments)
        batch = Batch(*(jax.ShapeDtypeStruct((rows, 2), dtype) for dtype in BATCH_TYPES))
        with self._mesh_context():
            jax.eval_shape(
                with_rules(trace), self.abstract_params, self.abstract_state.adapters, batch
            )
        return found

    @property
    def packed(self) -> bool:
        """Whether rows of training batches may hold several sequences.

        Attention is over all rows of a batch at once, so that one adapter's packed rows are enough.
        """
        return any(adapter.data.is_packed for adapter in self.config.adapters.values())

    def _put(self, batch: Batch, spec: PartitionSpec, *, packed: bool = False) -> Batch:
        if not packed:
            require_single_sequences(batch)
        sharding = NamedSharding(self.mesh, spec)

        def put(array: Any) -> jax.Array:
            array = np.asarray(array)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return Batch(*(put(array) for array in batch))

    def _mesh_context(self) -> Any:
        return jax.set_mesh(self.mesh)

    @functools.cached_property
    def _learning_rates(self) -> dict[str, np.ndarray]:
        # All at once: a schedule evaluated between two steps would queue behind the first of them,
        # and the host would wait for the device.
        rates = {}
        for name, adapter in self.config.adapters.items():
            own, total = adapter.optimizer, self.total_steps[name]
            schedule = learning_rate_schedule(own.schedule, own.learning_rate, total)
            rates[name] = np.asarray(jax.vmap(schedule)(jnp.arange(total + 1)))
        return rates

    def _fresh_state(
        self, keys: Mapping[str, jax.Array], params: Any, starts: Mapping[str, Any]
    ) -> TrainState:
        twin_of = twins({segment.name: segment.method for segment in self.segments})
        fresh = {
            name: jax.jit(functools.partial(fresh_adapter, self.model, method))
            for name, method, *_ in self.segments
        }
        # Of equal methods, the model is traced for one of them only.
        adapters = {
            name: starts[name] if name in starts else nn.meta.unbox(fresh[twin](params, keys[name]))
            for name, twin in twin_of.items()
        }
        scales = {}
        if self.config.compute.dtype == "float16":
            scale = self.config.training.initial_loss_scale
            scales = {segment.name: initial_loss_scale(scale) for segment in self.segments}
        return TrainState(
            step=jnp.int32(0),
            adapters=adapters,
            opt_state=self.optimizer.init({PARAMS: self.abstract_params, ADAPTERS: adapters}),
            loss_scale=scales,
        )

    @functools.cached_property
    def _micro_segments(self) -> tuple[Segment, ...]:
        """Which rows of a micro-batch belong to which adapter."""
        micro = self.config.training.micro_batches
        methods = {segment.name: segment.method for segment in self.segments}
        rows = {segment.name: segment.rows // micro for segment in self.segments}
        return segments_of(methods, rows, self.segments[0].shards)

    @functools.cached_property
    def _train_step(self) -> Any:
        model = self.model.clone(segments=self._micro_segments)
        seed = self.config.training.seed
        function = functools.partial(
            step.train_step, model, self.optimizer, seed, packed=self.packed
        )
        batch_sharding = NamedSharding(self.mesh, PartitionSpec(None, *BATCH_SPEC))
        return jax.jit(
            with_rules(function),
            in_shardings=(self.state_shardings, self.param_shardings, batch_sharding),
            out_shardings=(self.state_shardings, NamedSharding(self.mesh, PartitionSpec())),
            donate_argnums=0,
        )


def build_program(
    config: RunConfig,
    model_config: ModelConfig,
    total_steps: int | Mapping[str, int],
    devices: Sequence[Any] | None = None,
) -> Program:
    """Everything compiled or compilable of a run, from shapes alone.

    Args:
      config: the run's configuration; all of its adapters train.
      model_config: the base model's architecture.
      total_steps: optimiser steps of the whole run, which the schedules need; of all adapters, or
        by adapter.
      devices: for the mesh; all of all processes by default.

    Raises:
      DeviceError: the devices do not fit the mesh or the attention, or the mesh not the model.
      ConfigError: a batch does not divide over the mesh.
    """
    require_platform(config.compute, devices)
    mesh = make_mesh(config.mesh, devices)
    require_fitting_methods(config, model_config)
    require_divisible_rows(config, mesh)
    if isinstance(total_steps, int):
        total_steps = dict.fromkeys(config.adapters, total_steps)
    return _program(config, model_config, total_steps, mesh)


def _program(
    config: RunConfig,
    model_config: ModelConfig,
    total_steps: Mapping[str, int],
    mesh: Mesh,
    functions: tuple[Evaluate, Evaluate] | None = None,
) -> Program:
    methods = {name: adapter.method for name, adapter in config.adapters.items()}
    rows = {name: adapter.batch_size for name, adapter in config.adapters.items()}
    segments = segments_of(methods, rows, mesh.shape["data"] * mesh.shape["fsdp"])
    model = LlamaForCausalLM(model_config, config.compute, param_dtype=config.base.param_dtype)
    optimizers = {name: adapter.optimizer for name, adapter in config.adapters.items()}
    boxed = jax.eval_shape(functools.partial(_init, model), jax.random.key(0))[PARAMS]
    abstract_params = nn.meta.unbox(boxed)
    shapes = {
        name: jax.eval_shape(
            functools.partial(fresh_adapter, model, methods[name]),
            abstract_params,
            jax.random.key(0),
        )
        for name in set(twins(methods).values())
    }
    boxed_adapters = {name: shapes[twin] for name, twin in twins(methods).items()}
    if functions is None:
        make = functools.partial(make_evaluate, model, methods, mesh)
        functions = make(), make(by_row=True)
    partial = functools.partial(
        Program,
        config=config,
        mesh=mesh,
        segments=segments,
        abstract_params=abstract_params,
        param_shardings=shardings_of(boxed, mesh),
        model=model,
        optimizer=build_optimizer(optimizers, total_steps),
        total_steps=total_steps,
        evaluate=functions[0],
        score=functions[1],
    )
    empty: Any = None
    draft = partial(abstract_state=empty, state_shardings=empty)
    abstract_state = jax.eval_shape(draft._fresh_state, _keys(config), abstract_params, {})
    shardings = state_shardings(abstract_state, shardings_of(boxed_adapters, mesh), mesh)
    return partial(abstract_state=abstract_state, state_shardings=shardings)


def _keys(config: RunConfig) -> dict[str, jax.Array]:
    """What each adapter's initialisation draws from."""
    return {name: jax.random.key(config.seed(name)) for name in config.adapters}


def _init(model: LlamaForCausalLM, key: jax.Array) -> Any:
    """Fresh variables of the base, boxed with their logical axes."""
    return model.init(key, jnp.zeros((1, 2), jnp.int32))
