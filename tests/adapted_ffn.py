"""One FFN with a MixLoRA adapter by itself: ours, around the weights of a PyTorch one."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny_program
import torch
from hf_models import TINY
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from moe_jax.adapters import METHODS
from moe_jax.adapters.method import AdapterContext
from moe_jax.adapters.routing.statistics import RouterStatistics, collect_statistics
from moe_jax.adapters.rows import AdapterRows
from moe_jax.adapters.tree import MOE, split_by_adapter, to_collection
from moe_jax.config.model import ComputeConfig
from moe_jax.config.parse import parse_member
from moe_jax.layers.frozen import storage_of
from moe_jax.models.decoder import GatedMLP
from moe_jax.models.layer_inputs import LayerSettings

NAME = "x"
TARGETS = ("gate_proj", "up_proj", "down_proj")


def mixlora(router: dict[str, Any], **overrides: Any) -> Any:
    """A MixLoRA method with experts on the whole FFN, and nothing on attention."""
    raw = {
        "name": "mixlora",
        "rank": 3,
        "alpha": 6.0,
        "target_modules": TARGETS,
        "num_experts": 4,
        "router": router,
    }
    return parse_member(METHODS, {**raw, **overrides}, "config.adapters.a.method")


def llama_mlp(bias: bool = False, seed: int = 0) -> LlamaMLP:
    """A random frozen FFN in float64."""
    torch.manual_seed(seed)
    mlp = LlamaMLP(LlamaConfig(**TINY, mlp_bias=bias)).double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter))
    return mlp.requires_grad_(False)


def random_input(rows: int, length: int, width: int = TINY["hidden_size"]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).standard_normal((rows, length, width)), jnp.float32)


class AdaptedFFN:
    """Our FFN with the weights of a PyTorch one and one adapter on all rows."""

    def __init__(
        self,
        mlp: Any,
        method: Any,
        rows: int,
        dtype: Any = "float32",
        **config: Any,
    ):
        """Takes over the weights of `mlp`.

        Args:
          mlp: with `gate_proj`, `up_proj` and `down_proj`.
          method: method of the adapter.
          rows: B.
          dtype: dtype of the computation.
          config: what differs from the tiny model.
        """
        self.method, self.rows = method, rows
        self.compute = ComputeConfig(dtype=dtype)
        wide, narrow = mlp.gate_proj.weight.shape
        self.width = narrow
        self.config = tiny_program.model_config(
            hidden_size=narrow,
            intermediate_size=wide,
            mlp_bias=mlp.gate_proj.bias is not None,
            **config,
        )
        self.params = {name: _linear(getattr(mlp, name)) for name in TARGETS}

    def __call__(
        self, tree: Any, x: jax.Array, mask: Any = None, dropout_key: Any = None
    ) -> tuple[jax.Array, RouterStatistics]:
        """The FFN's output, and its router's statistics.

        Args:
          tree: the adapter's leaves, `{"router": {"kernel"}, "up_proj": {"lora_A", ...}, ...}`.
          x: [B, S, D].
          mask: bool [B, S], false at padding; by default there is none.
          dropout_key: None computes deterministically.
        """
        variables = {"params": self.params, "adapters": to_collection({NAME: {MOE: tree}})}
        y, sown = self._module(dropout_key is None).apply(
            variables,
            x,
            self._contexts(jnp.ones(x.shape[:2], bool) if mask is None else jnp.asarray(mask)),
            rngs={} if dropout_key is None else {"dropout": dropout_key},
            mutable=["router"],
        )
        return y, collect_statistics(sown)[NAME][MOE]

    def random_tree(self, seed: int = 1) -> Any:
        """Random leaves; none is zero."""
        x = jax.ShapeDtypeStruct((self.rows, 2, self.width), jnp.float32)
        mask = jax.ShapeDtypeStruct((self.rows, 2), jnp.bool)

        def init(x: jax.Array, mask: jax.Array) -> Any:
            key = jax.random.key(0)
            streams = {"params": key, "adapters": key}
            made = self._module(True).init(streams, x, self._contexts(mask))
            return split_by_adapter(nn.meta.unbox(made["adapters"]))[NAME][MOE]

        shapes = jax.eval_shape(init, x, mask)
        devices = jax.tree.map(lambda _: jax.devices()[0], shapes)
        return tiny_program.random_leaves(shapes, devices, seed)

    def _module(self, deterministic: bool) -> GatedMLP:
        adapter_rows = (AdapterRows(NAME, self.method, 0, self.rows),)
        compute, storage = self.compute, storage_of("float32")
        settings = LayerSettings(self.config, compute, storage, adapter_rows, deterministic)
        return GatedMLP(settings, self.config.intermediate_size)

    def _contexts(self, mask: jax.Array) -> dict[str, AdapterContext]:
        return {NAME: tiny_program.adapter_context(mask)}


def _linear(linear: Any) -> dict[str, jax.Array]:
    leaves = {"kernel": jnp.asarray(linear.weight.detach().numpy().T, jnp.float32)}
    if linear.bias is not None:
        leaves["bias"] = jnp.asarray(linear.bias.detach().numpy(), jnp.float32)
    return leaves
