"""Every family against transformers, through saved checkpoints, with and without an adapter."""

import copy
import dataclasses
import functools
import json
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import merge_lora, tiny_model
from tolerances import FLOAT32_LOGITS

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.rows import AdapterRows
from moe_jax.adapters.tree import DELTA_NET_MODULES, LAYER_EMBEDDING_MODULES, to_collection
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.config.parse import parse
from moe_jax.config.run import MeshConfig
from moe_jax.hf.config import read_model_config
from moe_jax.hf.key_table import base_leaves, hf_tensors
from moe_jax.hf.load import abstract_base_params, load_base_params
from moe_jax.models.adapted import untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.mesh import make_mesh
from moe_jax.sharding.rules import shardings_of

LENGTH, WINDOW = 24, 5
RANK, ALPHA = 2, 3.0


class Case(NamedTuple):
    """A variant of a family.

    Attributes:
      model_type: the family.
      fields: of its configuration.
      without: fields that take away what the variant is about, by which its logits must change.
    """

    model_type: str
    fields: dict
    without: dict | None = None


def _longrope(original_length: int) -> dict:
    # Channels of a head of 8, of which 6 are rotated: three pairs.
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.2, 1.5],
        "long_factor": [1.5, 3.0, 6.0],
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": original_length,
    }


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA_3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
MINISTRAL_3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.5,
}
GRANITE_4 = {
    "layer_types": ["full_attention"] * 3,
    "num_local_experts": 0,
    "shared_intermediate_size": 40,
    "mamba_n_heads": 8,
}
FULL = "full_attention"
GEMMA_4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", FULL] * 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": WINDOW,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 2.5,
}
# Each layer has its embedding. The last three attend to keys and values of layers 2 and 3.
GEMMA_4_E4B = {
    "num_hidden_layers": 7,
    "layer_types": [*["sliding_attention", FULL] * 2, *["sliding_attention"] * 2, FULL],
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": WINDOW,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 3,
}
QWEN3_5 = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "head_dim": 16,
    "rope_parameters": {
        **DEFAULT_ROPE,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
}
CASES = {
    "llama_1": Case("llama", {"num_key_value_heads": 4}),
    "llama_3": Case("llama", {"rope_parameters": LLAMA_3}, {"rope_parameters": DEFAULT_ROPE}),
    "yi": Case("llama", {"rope_parameters": {**DEFAULT_ROPE, "rope_theta": 5e6}}),
    "mistral": Case("mistral", {"sliding_window": WINDOW}, {"sliding_window": None}),
    "mistral_whole_rows": Case("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2_sliding": Case(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        {"max_window_layers": 3},
    ),
    "qwen3": Case("qwen3", {"head_dim": 12}),
    "qwen3_biased": Case("qwen3", {"head_dim": 8, "attention_bias": True}),
    "gemma": Case("gemma", {"head_dim": 12, "num_key_value_heads": 1}),
    "gemma2": Case(
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.5,
        },
        {"attn_logit_softcapping": None},
    ),
    "gemma2_uncapped": Case(
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        {"layer_types": ["full_attention"] * 3},
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 20,
            "rope_parameters": GEMMA_3_ROPE,
        },
        {"rope_parameters": {**GEMMA_3_ROPE, "full_attention": DEFAULT_ROPE}},
    ),
    "gemma4": Case("gemma4_text", GEMMA_4, {"sliding_window": 64}),
    "gemma4_with_values": Case(
        "gemma4_text",
        {**GEMMA_4, "attention_k_eq_v": False, "layer_types": [*["sliding_attention"] * 3, FULL]},
    ),
    "gemma4_e4b": Case("gemma4_text", GEMMA_4_E4B, {"sliding_window": 64}),
    "gemma4_e2b": Case("gemma4_text", {**GEMMA_4_E4B, "use_double_wide_mlp": True}),
    "gemma4_layer_embeddings_alone": Case(
        "gemma4_text", {**GEMMA_4_E4B, "num_kv_shared_layers": 0}
    ),
    "phi3": Case("phi3", {"sliding_window": WINDOW}, {"sliding_window": None}),
    "phi3_long": Case(
        "phi3",
        {"original_max_position_embeddings": 16, "rope_parameters": _longrope(16)},
        {"original_max_position_embeddings": LENGTH, "rope_parameters": _longrope(LENGTH)},
    ),
    "phi4_mini_short": Case(
        "phi3",
        {
            "original_max_position_embeddings": LENGTH,
            "rope_parameters": _longrope(LENGTH),
            "tie_word_embeddings": True,
        },
    ),
    "glm": Case("glm", {"head_dim": 8, "num_key_value_heads": 1}),
    "glm4": Case(
        "glm4",
        {"head_dim": 8},
        {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.25}},
    ),
    "qwen3_5": Case("qwen3_5_text", QWEN3_5),
    "qwen3_5_other_pattern": Case(
        "qwen3_5_text",
        {
            **QWEN3_5,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "glm4_unbiased": Case("glm4", {"head_dim": 8, "attention_bias": False}),
    "smollm3": Case(
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": WINDOW},
        {"no_rope_layers": [1, 1, 1]},
    ),
    "olmo2": Case("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
    "olmo3": Case(
        "olmo3",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA_3_ROPE,
        },
        {"sliding_window": LENGTH},
    ),
    "ministral3": Case(
        "ministral3",
        {"head_dim": 8, "rope_parameters": MINISTRAL_3_ROPE},
        {"rope_parameters": {**MINISTRAL_3_ROPE, "llama_4_scaling_beta": 0.0}},
    ),
    "granite": Case(
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 0.5,
        },
        {"residual_multiplier": 1.0},
    ),
    "granite4": Case(
        "granitemoehybrid",
        {**GRANITE_4, "position_embedding_type": "rope", "residual_multiplier": 0.7},
        {"position_embedding_type": None},
    ),
    "granite4_no_positions": Case("granitemoehybrid", {**GRANITE_4, "logits_scaling": 0.5}),
    "exaone4": Case(
        "exaone4",
        {"sliding_window": WINDOW, "sliding_window_pattern": 2},
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "seed_oss": Case("seed_oss", {"head_dim": 12, "mlp_bias": True}),
    "seed_oss_output_bias": Case("seed_oss", {"head_dim": 8, "attention_out_bias": True}),
    "cohere2": Case(
        "cohere2",
        {"sliding_window": WINDOW, "sliding_window_pattern": 2, "logit_scale": 0.25},
        {"layer_types": ["sliding_attention"] * 3},
    ),
    "hunyuan": Case(
        "hunyuan_v1_dense",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 10000.0,
                "factor": 1.0,
                "alpha": 1000.0,
            },
        },
        {"rope_parameters": DEFAULT_ROPE},
    ),
}
FAMILIES = (
    "mistral",
    "qwen2_sliding",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3_long",
    "glm4",
    "olmo3",
    "ministral3",
    "granite",
    "cohere2",
    "hunyuan",
    "qwen3_5",
    "gemma4",
    "gemma4_e4b",
)
"""Cases of the gradient test, which have every feature that no other test covers."""


def _model(case: str, **more):
    return tiny_model(CASES[case].model_type, **{**CASES[case].fields, **more})


def _rows() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids: a full row, one padded on the right, two sequences in one."""
    tokens = np.random.default_rng(1).integers(0, 64, (3, LENGTH))
    segment_ids = np.ones((3, LENGTH), np.int32)
    segment_ids[1, 16:] = 0
    segment_ids[2, 12:] = 2
    segment_ids[2, 21:] = 0
    return tokens, segment_ids


# Row and columns of each sequence of `_rows`.
SEQUENCES = ((0, slice(0, 24)), (1, slice(0, 16)), (2, slice(0, 12)), (2, slice(12, 21)))


def _reference_logits(model, tokens: np.ndarray) -> list[np.ndarray]:
    """Logits of each sequence, from one batch padded on the right."""
    lengths = [columns.stop - columns.start for _, columns in SEQUENCES]
    batch, mask = np.zeros((2, len(SEQUENCES), LENGTH), np.int64)
    for index, (row, columns) in enumerate(SEQUENCES):
        batch[index, : lengths[index]] = tokens[row, columns]
        mask[index, : lengths[index]] = 1
    positions = np.maximum(np.cumsum(mask, axis=-1) - 1, 0)
    with torch.no_grad():
        logits = model(
            torch.tensor(batch),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(positions),
            use_cache=False,
        ).logits.numpy()
    return [logits[index, :length] for index, length in enumerate(lengths)]


def _largest_difference(ours, expected: list[np.ndarray]) -> float:
    return max(
        float(np.abs(np.asarray(ours)[row, columns] - logits).max())
        for (row, columns), logits in zip(SEQUENCES, expected, strict=True)
    )


def _lora_tree(config) -> dict:
    """A LoRA with large weights on every projection."""
    rng = np.random.default_rng(2)
    tree: dict = {}
    for leaf in base_leaves(config):
        if not leaf.stacked or leaf.path[-1] != "kernel":
            continue
        _, block, name, _ = leaf.path
        layers, inputs, outputs = leaf.shape
        tree.setdefault(block, {})[name] = {
            "lora_A": 0.3 * rng.standard_normal((layers, inputs, RANK)).astype(np.float32),
            "lora_B": 0.3 * rng.standard_normal((layers, RANK, outputs)).astype(np.float32),
        }
    return {"layers": tree}


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_with_and_without_an_adapter(case, tmp_path):
    reference = _model(case)
    reference.save_pretrained(tmp_path)
    tokens, segment_ids = _rows()
    expected = _reference_logits(reference, tokens)
    if CASES[case].without:
        plain = _reference_logits(_model(case, **CASES[case].without), tokens)
        assert max(np.abs(a - b).max() for a, b in zip(plain, expected, strict=True)) > 0.01

    config = read_model_config(tmp_path)
    assert config.model_type == CASES[case].model_type
    params = load_base_params(tmp_path, config, "float32")
    assert parse(ModelConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    tree = _lora_tree(config)
    targets = tuple({name: None for block in tree["layers"].values() for name in block})
    method = LoraConfig(rank=RANK, alpha=ALPHA, target_modules=targets)
    adapter_rows = (AdapterRows("default", method, 0, 3),)
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"), adapter_rows)

    @jax.jit
    def logits(tree):
        variables = {"params": params, "adapters": to_collection({"default": tree})}
        return model.apply(variables, tokens, segment_ids=jnp.asarray(segment_ids))

    untrained = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (path[-1].key != "lora_B"), tree
    )
    assert _largest_difference(logits(untrained), expected) <= FLOAT32_LOGITS

    merged = copy.deepcopy(reference)
    merge_lora(merged, tree, ALPHA / RANK, config.layers_with)
    adapted = logits(tree)
    assert _largest_difference(adapted, _reference_logits(merged, tokens)) <= FLOAT32_LOGITS
    assert _largest_difference(adapted, expected) > 0.1


@pytest.mark.parametrize("case", CASES)
def test_parameters_go_back_to_the_tensors_they_came_from(case, tmp_path):
    reference = _model(case).to(torch.bfloat16)
    reference.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    tensors = hf_tensors(load_base_params(tmp_path, config, "bfloat16"), config)
    state = reference.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert tensors[name].dtype == jnp.bfloat16
        bits = tensor.view(torch.int16).numpy()
        np.testing.assert_array_equal(tensors[name].view(np.int16), bits, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_key_table_is_the_models_tree(case, devices, tmp_path):
    _model(case).config.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert nn.meta.unbox(boxed) == abstract_base_params(config, "float32")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings_of(boxed, mesh)):
        names, spec = [part.key for part in path], sharding.spec
        if names[-1] in ("scale", "filters", "A_log", "dt_bias", "layer_scalar"):
            assert not any(spec), names
        elif names[-1] == "bias":
            assert spec[-1] == ("fsdp" if {"o_proj", "down_proj"} & set(names) else "tensor"), names
        else:
            assert {"fsdp", "tensor"} <= set(spec), names


@pytest.mark.parametrize("case", FAMILIES)
def test_experts_get_gradients(case, tmp_path):
    _model(case).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    params = load_base_params(tmp_path, config, "float32")
    targets = ("q_proj", "gate_proj", "up_proj", "down_proj")
    targets += DELTA_NET_MODULES if config.delta_net else ()
    targets += LAYER_EMBEDDING_MODULES if config.has_layer_embeddings else ()
    method = MixLoraConfig(rank=RANK, alpha=ALPHA, target_modules=targets, num_experts=3)
    adapter_rows = (AdapterRows("default", method, 0, 3),)
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"), adapter_rows)
    make = functools.partial(untrained_adapter, model, method)
    shapes = nn.meta.unbox(jax.eval_shape(make, params, jax.random.key(0)))
    rng = np.random.default_rng(3)
    tree = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
    tokens, segment_ids = _rows()

    @jax.jit
    def gradient(tree):
        def loss(tree):
            logits, sown = model.apply(
                {"params": params, "adapters": to_collection({"default": tree})},
                tokens,
                segment_ids=jnp.asarray(segment_ids),
                mutable=["router"],
            )
            assert sown["router"]
            return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

        return jax.grad(loss)(tree)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(tree)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
