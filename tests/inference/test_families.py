"""Greedy continuations of each kind of family compared with transformers, token by token."""

import copy

import jax
import numpy as np
import pytest
from foreign_adapters import LORA
from hf_models import merge_lora
from inference.greedy import continuations, transformers_continuation
from whole_models import adapter_of, tiny_model

import moe_jax
from moe_jax.config.model import ComputeConfig
from moe_jax.inference.generator import Request, TokenGenerator

WINDOW, NEW = 5, 14
SEED = 5  # of models that do not fall into saying one token again and again
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    # Of the 8 channels of a head 6 are rotated: three pairs.
    "short_factor": [1.0, 1.2, 1.5],
    "long_factor": [1.5, 3.0, 6.0],
    "partial_rotary_factor": 0.75,
}
GEMMA_3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}
# Small random models that reuse their embedding give back the token that they were given.
UNTIED = {"head_dim": 8, "tie_word_embeddings": False}
CASES = {
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", {**UNTIED, "sliding_window": WINDOW, **CAPS}),
    "gemma3": (
        "gemma3_text",
        {
            **UNTIED,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "rope_parameters": GEMMA_3_ROPE,
        },
    ),
    "cohere2": (
        "cohere2",
        {"tie_word_embeddings": False, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    ),
    # The scale of queries grows with every fourth position.
    "ministral3": (
        "ministral3",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 4,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "olmo3": ("olmo3", {"sliding_window": WINDOW, "num_key_value_heads": 4}),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 6,
            "linear_conv_kernel_dim": 4,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            **UNTIED,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": WINDOW,
            "hidden_size_per_layer_input": 0,
        },
    ),
    # Layers 4 and 5 attend to the cache of layers 2 and 3.
    "gemma4_e2b": (
        "gemma4_text",
        {
            **UNTIED,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "global_head_dim": 16,
            "sliding_window": WINDOW,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": 64,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        },
    ),
    # Rows of up to 4 tokens would have the short factors.
    "phi3_long": (
        "phi3",
        {
            "original_max_position_embeddings": 4,
            "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 4},
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_base_and_adapter_equal_transformers(case, tmp_path):
    model_type, fields = CASES[case]
    reference = tiny_model(model_type, SEED, **fields)
    reference.save_pretrained(tmp_path)
    base = moe_jax.load_base(tmp_path)
    adapter = adapter_of(base, LORA)
    merged = copy.deepcopy(reference)
    tree = jax.tree.map(np.asarray, adapter.tree)
    merge_lora(merged, tree, adapter.method.scale, base.config.layers_with)

    prompts = [
        tuple(np.random.default_rng(n).integers(1, 64, length).tolist())
        for n, length in enumerate((5, 11, 7))
    ]
    generator = TokenGenerator(
        base.config,
        base.params,
        {"x": (adapter.method, adapter.tree)},
        compute=ComputeConfig(dtype="float32"),
    )
    requests = [Request(prompts[0], "x"), Request(prompts[1]), Request(prompts[2], "x")]
    actual = continuations(generator, requests, NEW)
    models = (merged, reference, merged)
    for tokens, model, prompt in zip(actual, models, prompts, strict=True):
        assert tokens == transformers_continuation(model, prompt, NEW)
    # Not what the other model says, nor the same tokens over and over.
    assert actual[0] != transformers_continuation(reference, prompts[0], NEW)
    assert all(len(set(tokens)) > 3 for tokens in actual)
