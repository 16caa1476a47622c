"""Applies and compiles a model with its parameters, adapters, rows and mesh.

`apply` assembles the variables of an adapted model and calls a function of it. `CompiledLlama`
enters the mesh and keeps the compiled functions; models, methods and settings are hashable and
serve as static arguments. Only programs that train are compiled elsewhere: the training step and
its initial state (`moe_jax.training.step.program`), with shardings of inputs and outputs, and the
demo's pre-training, which trains the base.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.rows import AdapterRows
from moe_jax.adapters.tree import split_by_adapter, to_collection
from moe_jax.layers.names import ADAPTERS, CACHE, PARAMS, ROUTER
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding import axes
from moe_jax.sharding.compiler_options import compiler_options
from moe_jax.sharding.platform import resolve_attention
from moe_jax.sharding.rules import RULES

SINGLE = "fresh"
"""Name of the adapter where a program has one: adapters of equal methods share the program.

The value is fixed: Linen derives initial values from names, so that another one would change the
initial weights of every seed."""


def single_adapter(method: AdapterMethod | None, rows: int) -> tuple[AdapterRows, ...]:
    """All `rows` of a batch for one adapter, named `SINGLE`; with None for the base model."""
    return () if method is None else (AdapterRows(SINGLE, method, 0, rows),)


def apply(
    model: LlamaForCausalLM,
    params: Any,
    adapters: Mapping[str, Any],
    function: Callable[..., Any],
    *args: Any,
    mutable: Collection[str] = (),
    cache: Any = None,
    dropout_key: jax.Array | None = None,
    **kwargs: Any,
) -> Any:
    """Calls a function of the bound model.

    Args:
      model: with the adapter rows of the batch.
      params: the frozen base parameters.
      adapters: adapter trees by name, `{name: tree}`.
      function: a method of `LlamaForCausalLM`, or a function whose first argument is the model.
      *args: further arguments of `function`.
      mutable: collections to return, for example `["router"]`.
      cache: collection `cache` of earlier tokens.
      dropout_key: random key of dropout and jitter.
      **kwargs: keyword arguments of `function`.

    Returns:
      The result of `function`; with `mutable`, a pair of it and these collections.
    """
    dtype = jnp.dtype(model.compute.dtype)
    adapters = {name: pairs_in_dtype(dtype, tree) for name, tree in adapters.items()}
    variables = {PARAMS: params, ADAPTERS: to_collection(adapters)}
    if cache is not None:
        variables[CACHE] = cache
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    collections: Any = list(mutable) if mutable else False
    options: Any = {"method": function, "mutable": collections, "rngs": rngs, **kwargs}
    return model.apply(variables, *args, **options)


def pairs_in_dtype(dtype: jnp.dtype, tree: Any) -> Any:
    """The tree with its low-rank pairs in `dtype`, once for all layers.

    In the layers, each would be converted by a kernel of its own, forward and backward. DoRA
    computes the norms of its pairs in float32.
    """
    if not isinstance(tree, Mapping):
        return tree
    has_norms = "magnitude" in tree
    return {
        name: leaf.astype(dtype)
        if name in ("lora_A", "lora_B") and not has_norms
        else pairs_in_dtype(dtype, leaf)
        for name, leaf in tree.items()
    }


def untrained_adapter(
    model: LlamaForCausalLM, method: AdapterMethod, params: Any, key: jax.Array
) -> Any:
    """The initial weights of one adapter; B is zero, so that the model equals the base.

    They depend on the method, the base and the key alone, not on other adapters.

    Args:
      model: the model; its own adapter rows are not read.
      method: method of the adapter.
      params: the frozen base parameters, which for example DoRA's magnitudes start from.
      key: random key.

    Returns:
      The adapter's tree, leaves boxed with their logical axes (see `nn.meta.unbox`).
    """

    def all_heads(module: LlamaForCausalLM, tokens: jax.Array) -> dict[str, jax.Array]:
        return module.scores(module.hidden_states(tokens), jnp.ones_like(tokens, bool))

    _, created = model.clone(adapter_rows=single_adapter(method, 1)).apply(
        {PARAMS: params},
        jnp.zeros((1, 2), jnp.int32),
        method=all_heads,
        rngs={ADAPTERS: key},
        mutable=[ADAPTERS, ROUTER],
    )
    return split_by_adapter(created[ADAPTERS])[SINGLE]


def abstract_params(model: LlamaForCausalLM) -> Any:
    """Shapes and dtypes of the base parameters, boxed with their logical axes."""
    init = functools.partial(model.init, tokens=jnp.zeros((1, 2), jnp.int32))
    boxed: Any = jax.eval_shape(init, jax.random.key(0))
    return boxed[PARAMS]


class CompiledLlama:
    """A model on a mesh, with the functions compiled for it.

    Attributes:
      model: the model, without adapter rows, with the attention kernel of the devices.
      mesh: mesh of the arrays; None for one device.
      compilations: number of programs traced for compilation so far.
    """

    def __init__(self, model: LlamaForCausalLM, mesh: Mesh | None = None):
        """Chooses the attention kernel if it is `auto`.

        Raises:
          DeviceError: the devices do not have the attention kernel.
        """
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        self._compiler_options = compiler_options(device)
        self.model = model.clone(compute=resolve_attention(model.compute, model.config, device))
        self.mesh = mesh
        self.compilations = 0
        self._functions: dict[Any, Callable[..., Any]] = {}

    def with_rows(self, adapter_rows: tuple[AdapterRows, ...], **fields: Any) -> LlamaForCausalLM:
        """The model for batches with these adapter rows; `fields` replaces further attributes."""
        return self.model.clone(adapter_rows=adapter_rows, **fields)

    def jit(
        self,
        function: Callable[..., Any],
        *static: Any,
        donate: tuple[int, ...] = (),
        replicate: bool = False,
    ) -> Callable[..., Any]:
        """`function(*static, ...)` as a compiled function of its remaining arguments.

        Equal arguments give the same compiled function.

        Args:
          function: for example a training or decoding step.
          *static: hashable leading arguments, most often a model.
          donate: positions of the remaining arguments whose memory the result may take.
          replicate: gives every device the whole result.
        """
        key = (function, static, donate, replicate)
        if key not in self._functions:
            self._functions[key] = self._compile(function, static, donate, replicate)
        return self._functions[key]

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the mesh the current one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def traceable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, traced under the rules that map logical axes to the mesh."""

        @functools.wraps(function)
        def traced(*args: Any) -> Any:
            with nn.logical_axis_rules(self._rules()):
                return function(*args)

        return traced

    def _compile(
        self, function: Callable[..., Any], static: tuple[Any, ...], donate: Any, replicate: bool
    ) -> Callable[..., Any]:
        def counted(*arrays: Any) -> Any:
            self.compilations += 1
            return function(*static, *arrays)

        options: dict[str, Any] = {
            "donate_argnums": donate,
            "compiler_options": self._compiler_options,
        }
        if replicate and self.mesh is not None:
            options["out_shardings"] = NamedSharding(self.mesh, PartitionSpec())
        jitted = jax.jit(self.traceable(counted), **options)

        def call(*arrays: Any) -> Any:
            with self.context():
                return jitted(*arrays)

        return call

    def _rules(self) -> tuple[tuple[str, Any], ...]:
        """Sharding rules; heads of the cache that the mesh cannot split are replicated."""
        parts = 1 if self.mesh is None else self.mesh.shape["tensor"]
        config = self.model.config
        kv_heads = [config.num_kv_heads]
        if config.global_attention is not None:
            kv_heads.append(config.global_attention.num_kv_heads)
        if all(heads % parts == 0 for heads in kv_heads):
            return RULES
        return ((axes.CACHE_KV_HEADS, None), *RULES)
