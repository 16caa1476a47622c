"""Training steps for benchmarks: the package's step with an adapter, and one of the frozen model.

Needs jax, flax, optax and numpy only.
"""

import dataclasses
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import layer_cost
from benchmarks.random_inputs import random_batch
from benchmarks.sizes import model_of
from moe_jax.adapters.method import AdapterMethod, NoAdapter
from moe_jax.adapters.routing.losses import LoadBalance
from moe_jax.adapters.tree import ATTENTION_MODULES, TARGET_MODULES
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import located, parse, suggest
from moe_jax.config.run import RunConfig
from moe_jax.errors import ConfigError
from moe_jax.layers.vocabulary import TokenEmbedding
from moe_jax.sharding.compiler_options import compiler_options
from moe_jax.sharding.rules import BATCH_SPEC
from moe_jax.training.records.plan import parameter_count
from moe_jax.training.step import step
from moe_jax.training.step.needed_flops import needed_flops
from moe_jax.training.step.program import BATCH_TYPES, Program, build_program

FROZEN = "frozen"
LORA = "lora"
LABELS = {
    label.removesuffix(", top-k").replace(", ", "_").replace("-", "_").lower(): label
    for label in layer_cost.METHODS
}
"""Names in `layer_cost.METHODS` by name on the command line."""

NAMES = (FROZEN, *LABELS)
ALPHA = 16.0
OPTIMIZER = {"learning_rate": 1e-4, "schedule": {"kind": "constant"}}
_ADAPTER = "measured"


def method_named(name: str, args: Namespace) -> AdapterMethod:
    """Returns the adapter method named `name`, with the ranks and experts of the flags.

    LoRA's and DoRA's rank on the FFN is the joint rank of all experts, for equal trainable
    parameters except for routers. Without a flag for dropout there is none.

    Raises:
      ConfigError: the method is unknown, or the flags are invalid for it.
    """
    if name not in LABELS:
        raise ConfigError(f"--methods: no method is called {name!r}; {suggest(name, NAMES)}")
    model = model_of(args.size, args.vocab)
    shape = layer_cost.Shape(
        width=model.hidden_size,
        ffn_width=model.intermediate_size,
        heads=model.num_heads,
        rank=args.rank,
        experts=args.experts,
        rows=args.rows,
        length=args.length,
        top_k=args.top_k,
    )
    with located(f"--methods {name}"):
        method = layer_cost.METHODS[LABELS[name]](shape)
        if any(field.name == "losses" for field in dataclasses.fields(method)):
            losses: Any = {"losses": {"load_balance": LoadBalance(coefficient=0.01)}}
            method = dataclasses.replace(method, **losses)
    return dataclasses.replace(method, dropout=getattr(args, "dropout", 0.0))


def ranks_of(method: AdapterMethod) -> dict[str, int]:
    """Rank on each projection of the method `lora` of `method_named`."""
    assert isinstance(method, layer_cost.EqualSizeLora)
    return {
        target: method.rank if target in ATTENTION_MODULES else method.ffn_rank
        for target in TARGET_MODULES
    }


def run_config(method: AdapterMethod, args: Namespace) -> RunConfig:
    """Configures a run that trains one adapter with the settings of the flags.

    Raises:
      ConfigError: a field set by a flag is invalid.
    """
    source = {"path": "random", "schema": "text"}
    adapter = {
        "method": method,
        "data": {"train": {"random": source}, "max_length": args.length},
        "optimizer": OPTIMIZER,
        "batch_size": args.rows,
    }
    has_experts = method.mlp_adapter() is not None
    experts = getattr(args, "expert_kernel", "einsum") if has_experts else "einsum"
    raw = {
        "base": {"path": "random", "param_dtype": args.param_dtype or args.dtype},
        "compute": {
            "dtype": args.dtype,
            "attention": args.attention,
            "remat": args.remat,
            "experts": experts,
        },
        "mesh": _mesh(args.mesh),
        "training": {"steps": 10**6, "micro_batches": args.micro_batches},
        "adapters": {_ADAPTER: adapter},
    }
    return parse(RunConfig, raw)


def _mesh(text: str | None) -> dict[str, int]:
    """Parses the sizes of `--mesh AXIS=N,...`; one device without the flag."""
    sizes = {"data": 1}
    for part in (text or "").split(","):
        axis, _, size = part.partition("=")
        if axis:
            if not size.removeprefix("-").isdigit():
                raise ConfigError(f"--mesh {text}: expected AXIS=N,... with whole numbers")
            sizes[axis] = int(size)
    return sizes


@dataclasses.dataclass
class CompiledStep:
    """A step that can be compiled, initialized and repeated.

    Attributes:
      name: name of the method.
      trainable: number of trainable weights.
      program: training program; for the frozen model, the program of a LoRA adapter.
      lower: function that traces the step from shapes.
      begin: function that creates the step's inputs from the base's weights, and returns a function
        that runs a step, waits for it and returns the loss.
      compiled: compiled step; None before `compile`.
      trace_seconds: seconds of tracing.
      compile_seconds: seconds of compiling.
      first_adapter: initial weights of the adapter on the host; None before `begin`.
    """

    name: str
    trainable: int
    program: Program
    lower: Callable[[], jax.stages.Lowered]
    begin: Callable[["CompiledStep", Any], Callable[[], float]]
    compiled: jax.stages.Compiled | None = None
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0
    first_adapter: Any = None

    def compile(self, options: dict[str, Any] | None = None) -> jax.stages.Compiled:
        """Traces and compiles the step, and records the seconds of both.

        Args:
          options: compiler options beside those of the program.
        """
        start = time.perf_counter()
        lowered = self.lower()
        middle = time.perf_counter()
        self.compiled = lowered.compile(compiler_options=options)
        self.trace_seconds = middle - start
        self.compile_seconds = time.perf_counter() - middle
        return self.compiled


def compiled_step(name: str, args: Namespace) -> CompiledStep:
    """Returns the step of the method named `name`, or of the frozen model, before compiling.

    Raises:
      UserError: the devices do not support the flags.
    """
    model = model_of(args.size, args.vocab)
    config = run_config(method_named(LORA if name == FROZEN else name, args), args)
    devices = jax.devices() if args.mesh else jax.devices()[:1]
    program = build_program(config, model, config.training.steps or 1, devices)
    if name == FROZEN:
        return CompiledStep(name, 0, program, lambda: _lower_frozen(program, args), _begin_frozen)
    trainable = parameter_count(program.abstract_state.adapters)
    lower = lambda: program.lower_train_step(args.length)
    return CompiledStep(name, trainable, program, lower, _begin_training)


def _begin_training(step: CompiledStep, params: Any) -> Callable[[], float]:
    program, compiled = step.program, step.compiled
    assert compiled is not None
    state = program.init_state(params)
    step.first_adapter = jax.device_get(state.adapters[_ADAPTER])
    batch = _put_batch(program)

    def run() -> float:
        nonlocal state
        state, metrics = compiled(state, params, batch)
        jax.block_until_ready((state, metrics))
        return float(metrics[f"{_ADAPTER}/loss"])

    return run


def _put_batch(program: Program) -> Any:
    adapter = program.config.adapters[_ADAPTER]
    rows, length = adapter.batch_size, adapter.data.max_length
    return program.put_train_batch(random_batch(program.model.config, rows, length))


def _lower_frozen(program: Program, args: Namespace) -> jax.stages.Lowered:
    """Traces forward and backward to the embedding's outputs, without adapters and optimizer.

    Every method computes at least these passes; the loss is the training loss.
    """
    model, micro = program.model, args.micro_batches
    hidden = jnp.dtype(args.dtype)

    def frozen_step(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        def loss(shift: jax.Array, micro_batch: Any) -> jax.Array:
            def shifted(call: Any, inputs: Any, named: Any, context: Any) -> Any:
                output = call(*inputs, **named)
                is_embedding = isinstance(context.module, TokenEmbedding)
                return (
                    output + shift if is_embedding and context.method_name == "__call__" else output
                )

            with nn.intercept_methods(shifted):
                total, targets = step.eval_step(model, {}, params, micro_batch)
            return total / targets / micro

        def accumulate(_: None, micro_batch: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
            shape = (*micro_batch.tokens.shape, model.config.hidden_size)
            value, gradient = jax.value_and_grad(loss)(jnp.zeros(shape, hidden), micro_batch)
            # The sum of squares uses the whole gradient, so that XLA cannot remove any of it.
            return None, (value, jnp.sum(jnp.square(gradient.astype(jnp.float32))))

        _, (losses, squares) = jax.lax.scan(accumulate, None, batch)
        return jnp.sum(losses), jnp.sum(squares)

    replicated = NamedSharding(program.mesh, PartitionSpec())
    rows = NamedSharding(program.mesh, PartitionSpec(None, *BATCH_SPEC))
    jitted = jax.jit(
        program.llama.traceable(frozen_step),
        in_shardings=(program.param_shardings, rows),
        out_shardings=replicated,
        compiler_options=compiler_options(program.mesh.devices.flat[0]),
    )
    shape = (micro, args.rows // micro, args.length)
    batch = type(BATCH_TYPES)(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in BATCH_TYPES))
    with jax.set_mesh(program.mesh):
        return jitted.lower(program.abstract_params, batch)


def _begin_frozen(step: CompiledStep, params: Any) -> Callable[[], float]:
    batch, compiled = _put_batch(step.program), step.compiled
    assert compiled is not None
    return lambda: float(jax.block_until_ready(compiled(params, batch))[0])


def needed_of_frozen(model: ModelConfig, rows: int, length: int) -> float:
    """FLOPs that every step on the frozen model needs; see `training.step.needed_flops`.

    Adapters and recomputation are not counted, so that methods and policies are compared by time.
    """
    needed = needed_flops(model, {FROZEN: NoAdapter()}, {FROZEN: {}})
    return needed.of_full_rows({FROZEN: rows}, length)
