"""Training programs on tiny models, without files: for tests of the step and of its sharding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters import METHODS
from moe_jax.adapters.method import AdapterContext, FrozenFFN, FrozenProjection
from moe_jax.config.model import ModelConfig
from moe_jax.config.preference import PREFERENCES
from moe_jax.config.rope import RopeConfig
from moe_jax.config.run import parse_run_config
from moe_jax.data.batch import Batch
from moe_jax.training.step.program import Program, build_program

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

MIXLORA = {
    "name": "mixlora",
    "rank": 4,
    "alpha": 8.0,
    "target_modules": ALL_TARGETS,
    "num_experts": 4,
    "router": {"name": "top_k", "top_k": 2},
    "losses": {"load_balance": {"coefficient": 0.01}, "router_z": {"coefficient": 0.001}},
}
LORA = {"name": "lora", "rank": 4, "alpha": 8.0, "target_modules": ALL_TARGETS}

SGD = {
    "name": "sgd",
    "learning_rate": 1.0,
    "clip_norm": None,
    "schedule": {"kind": "constant"},
}
"""One step of it takes exactly the gradient away."""


def model_config(**overrides: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(rope_type="default", rope_theta=10000.0),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    return ModelConfig(**{**fields, **overrides})


def program(
    methods: dict[str, dict[str, Any]],
    *,
    rows: int = 8,
    optimizer: dict[str, Any] = SGD,
    config: ModelConfig | None = None,
    mesh: dict[str, int] | None = None,
    devices: int | None = None,
    training: dict[str, Any] | None = None,
    compute: dict[str, Any] | None = None,
    param_dtype: str = "float32",
    total_steps: int = 10,
    packing: str = "none",
    preferences: dict[str, dict[str, Any]] | None = None,
) -> Program:
    """A program with `rows` rows for each adapter of `methods`; on one device by default.

    A mesh is of the first `devices` CPU devices, or of all. `preferences` are the preference losses
    of some of the adapters.
    """
    preferences = preferences or {}
    source = {"path": "unused", "schema": "text"}
    # Two groups of data, as LoRAMoE's balance wants them.
    train = {"unused": source, "of_group_1": {**source, "expert_group": 1}}
    data = {"max_length": 16, "packing": packing}

    def sources(name: str) -> dict[str, Any]:
        schema = "classification" if "classification" in methods[name] else "text"
        if name in preferences:
            schema = PREFERENCES[preferences[name]["name"]].schema
        return {key: {**each, "schema": schema} for key, each in train.items()}

    raw = {
        "base": {"path": "unused", "param_dtype": param_dtype},
        # What is computed again is compiled again; tests of rematerialization say what they want.
        "compute": {"dtype": "float32", "remat": "none", **(compute or {})},
        "mesh": mesh or {"data": 1},
        "training": {"steps": total_steps, **(training or {})},
        "adapters": {
            name: {
                "method": method,
                "data": {"train": sources(name), **data},
                "optimizer": optimizer,
                "batch_size": rows,
                "preference": preferences.get(name),
                "start_from": "unused"
                if preferences.get(name, {}).get("reference") == "start"
                else None,
            }
            for name, method in methods.items()
        },
    }
    return build_program(
        parse_run_config(raw, METHODS),
        model_config() if config is None else config,
        total_steps,
        # Where the tests compute on a GPU, there is one, and eight CPU devices beside it.
        devices=jax.devices("cpu")[:devices] if mesh else jax.devices()[:1],
    )


def random_leaves(abstract: Any, shardings: Any, seed: int, std: float = 0.15) -> Any:
    """Normal leaves, the same for every mesh; norms and magnitudes are near one."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:])
        # Norms scale by about one, and columns of random projections are about one long.
        center = 1.0 if name in ("['scale']", "['magnitude']") else 0.0
        values = center + std * rng.standard_normal(shape.shape)
        return jax.device_put(values.astype(shape.dtype), sharding)

    return jax.tree_util.tree_map_with_path(leaf, abstract, shardings)


def random_params(program: Program, seed: int = 0) -> Any:
    return random_leaves(program.abstract_params, program.param_shardings, seed)


def random_adapters(program: Program, seed: int = 1) -> Any:
    abstract, shardings = program.abstract_state.adapters, program.state_shardings.adapters
    return random_leaves(abstract, shardings, seed)


def random_batch(rows: int, length: int = 16, vocab: int = 96, seed: int = 2) -> Batch:
    """Rows of different lengths, padded on the right; the first third of each is its prompt."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 2, length + 1, (rows, 1))
    index = np.arange(length)[None]
    real = index < lengths
    groups = np.arange(rows)[:, None] % 2
    return Batch(
        tokens=rng.integers(0, vocab, (rows, length)).astype(np.int32),
        loss_mask=real & (index >= lengths // 3),
        segment_ids=real.astype(np.int32),
        positions=np.where(real, index, 0).astype(np.int32),
        expert_groups=(groups * real).astype(np.int32),
        labels=np.zeros(real.shape, np.float32),
        reference_log_probs=np.zeros(real.shape, np.float32),
    )


def logits_head(model: Any, hidden: jax.Array, batch: Batch) -> jax.Array:
    """Logits of every position, as the `heads` of `forward`."""
    return model.logits(hidden)


def adapter_context(token_mask: Any, dropout_key: jax.Array | None = None) -> AdapterContext:
    """Context of the only layer of a model with one layer."""
    mask = jnp.asarray(token_mask)
    return AdapterContext(mask, jnp.int32(0), num_layers=1, dropout_key=dropout_key)


def frozen_ffn(gate: Any, up: Any, width: int) -> FrozenFFN:
    """An FFN with these products [B, S, F], of inputs of `width`, and with kernels of zeros."""
    kernel = jnp.zeros((width, gate.shape[-1]), gate.dtype)
    return FrozenFFN(
        FrozenProjection(gate, kernel),
        FrozenProjection(up, kernel),
        gate_bias=None,
        up_bias=None,
        down_kernel=kernel.T,
        down_bias=None,
        activation=jax.nn.silu,
    )
