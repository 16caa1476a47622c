"""Rotary embeddings against transformers' Llama, for every rope type."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tolerances import FEW_OPERATIONS
from transformers import AutoConfig, LlamaConfig
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale
from transformers.models.phi3 import modeling_phi3

from moe_jax.config.parse import parse
from moe_jax.config.rope import RopeConfig
from moe_jax.errors import ConfigError
from moe_jax.layers.rope import (
    ROPE_TYPES,
    apply_rope,
    query_scales,
    rope_frequencies,
    rotary_tables,
)

# Relative errors of a float32 inverse frequency: two units in the last place, and more where the
# rule subtracts near-equal numbers (llama3's blend) or recomputes theta in float32 (dynamic).
FREQUENCY_RTOL = dict(default=2.5e-7, linear=2.5e-7, yarn=2.5e-7, llama3=1.5e-6, dynamic=1.5e-6)
FREQUENCY_RTOL |= dict(longrope=2.5e-7, proportional=2.5e-7)
# Two implementations of cos and sin of the same float32 angle.
TABLE_ATOL = 1e-6

MAX_POSITIONS = 128
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
# Packed rows have up to 70 positions, the others more; the lists of factors go with the head.
LONGROPE = dict(rope_type="longrope", original_max_position_embeddings=100)

CASES: dict[str, dict] = {
    "default": dict(rope_type="default"),
    "default_theta_500000": dict(rope_type="default", rope_theta=500_000.0),
    "linear_2": dict(rope_type="linear", factor=2.0),
    "linear_7.3": dict(rope_type="linear", factor=7.3, rope_theta=25_000.0),
    "dynamic_2": dict(rope_type="dynamic", factor=2.0),
    "dynamic_5.5": dict(rope_type="dynamic", factor=5.5, rope_theta=3_000.0),
    "llama3": LLAMA3,
    "llama3_8b": LLAMA3 | dict(rope_theta=500_000.0, original_max_position_embeddings=8192),
    "llama3_32": LLAMA3 | dict(factor=32.0, low_freq_factor=1.5, high_freq_factor=3.25),
    "yarn": YARN,
    "yarn_no_original_length": dict(rope_type="yarn", factor=4.0),
    "yarn_attention_factor": YARN | dict(attention_factor=0.8),
    "yarn_mscale": YARN | dict(mscale=1.0, mscale_all_dim=0.7),
    "yarn_mscale_alone": YARN | dict(mscale=0.5),
    "yarn_betas": YARN | dict(beta_fast=16.0, beta_slow=2.5, factor=16.0),
    "yarn_betas_equal": YARN | dict(beta_fast=2.0, beta_slow=2.0, truncate=False),
    "yarn_no_truncate": YARN | dict(truncate=False, rope_theta=150_000.0),
    "yarn_factor_1": YARN | dict(factor=1.0),
    "proportional": dict(rope_type="proportional", partial_rotary_factor=0.5, rope_theta=1e6),
    "proportional_2": dict(rope_type="proportional", partial_rotary_factor=0.8, factor=2.0),
    "longrope": LONGROPE,
    "longrope_factor": LONGROPE | dict(factor=3.0, rope_theta=50_000.0),
    "longrope_factor_below_1": LONGROPE | dict(original_max_position_embeddings=2 * MAX_POSITIONS),
    "longrope_attention_factor": LONGROPE | dict(attention_factor=0.8),
}
HEAD_DIMS = (4, 10, 64, 128)


def rope_fields(case: str, head_dim: int) -> dict:
    fields = {"rope_theta": 10_000.0} | CASES[case]
    if fields["rope_type"] == "longrope":
        steps = np.arange(head_dim // 2)
        fields |= dict(short_factor=(1 + 0.1 * steps).tolist())
        fields |= dict(long_factor=(1 + 0.7 * steps).tolist())
    return fields


def rope_config(case: str, head_dim: int) -> RopeConfig:
    return parse(RopeConfig, rope_fields(case, head_dim))


def hf_rotary(case: str, head_dim: int) -> LlamaRotaryEmbedding:
    fields = rope_fields(case, head_dim)
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=fields,
    )
    return LlamaRotaryEmbedding(config)


def positions_for(kind: str) -> np.ndarray:
    """Positions `[B, S]`, as computed by transformers from the attention mask of a padded batch."""
    if kind == "within":
        return np.tile(np.arange(MAX_POSITIONS), (2, 1))
    if kind == "beyond":  # one row past the length the model is made for
        return np.stack([np.arange(300), np.minimum(np.arange(300), 90)])
    if kind == "left_padded":  # padding carries position 0; real tokens count from 0 after it
        return np.stack([np.maximum(np.arange(160) - 37, 0), np.arange(160)])
    if kind == "packed":  # positions restart within the row
        return np.concatenate([np.arange(70), np.arange(20), np.zeros(10, int)])[None]
    raise AssertionError(kind)


POSITION_KINDS = ("within", "beyond", "left_padded", "packed")


def test_every_type_is_covered():
    assert {case["rope_type"] for case in CASES.values()} == set(ROPE_TYPES)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("case", CASES)
def test_frequencies_equal_transformers(case: str, head_dim: int):
    for kind in POSITION_KINDS:
        positions = positions_for(kind)
        reference = hf_rotary(case, head_dim)
        reference(torch.zeros(1), torch.as_tensor(positions))  # lets `dynamic` grow
        inv_freq, scaling = rope_frequencies(
            rope_config(case, head_dim), head_dim, MAX_POSITIONS, jnp.asarray(positions)
        )
        assert inv_freq.dtype == np.float32 and inv_freq.shape == (head_dim // 2,)
        rtol = FREQUENCY_RTOL[CASES[case]["rope_type"]]
        np.testing.assert_allclose(inv_freq, reference.inv_freq.numpy(), rtol=rtol, atol=0)
        assert scaling == pytest.approx(reference.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("kind", POSITION_KINDS)
@pytest.mark.parametrize("case", CASES)
def test_tables_equal_transformers(case: str, kind: str):
    head_dim, positions = 64, positions_for(kind)
    cos_hf, sin_hf = hf_rotary(case, head_dim)(torch.zeros(1), torch.as_tensor(positions))
    tables = jax.jit(
        lambda p: rotary_tables(rope_config(case, head_dim), head_dim, MAX_POSITIONS, p)
    )
    cos, sin = tables(jnp.asarray(positions))
    assert cos.shape == (*positions.shape, head_dim) and cos.dtype == sin.dtype == jnp.float32
    # An angle near 300 is known to 300 times that only.
    atol = TABLE_ATOL + positions.max() * FREQUENCY_RTOL[CASES[case]["rope_type"]]
    np.testing.assert_allclose(cos, cos_hf.numpy(), rtol=0, atol=atol)
    np.testing.assert_allclose(sin, sin_hf.numpy(), rtol=0, atol=atol)


@pytest.mark.parametrize("case", ["default", "llama3_8b", "yarn"])
def test_tables_hold_at_positions_of_long_documents(case: str):
    positions = np.array([[0, 1, 4095, 32_767, 131_071]])
    cos_hf, sin_hf = hf_rotary(case, 128)(torch.zeros(1), torch.as_tensor(positions))
    cos, sin = rotary_tables(rope_config(case, 128), 128, MAX_POSITIONS, jnp.asarray(positions))
    atol = TABLE_ATOL + positions[0][None, :, None] * FREQUENCY_RTOL[CASES[case]["rope_type"]]
    assert (np.abs(np.asarray(cos) - cos_hf.numpy()) <= atol).all()
    assert (np.abs(np.asarray(sin) - sin_hf.numpy()) <= atol).all()


@pytest.mark.parametrize("case", ["default", "dynamic_2", "yarn"])
def test_rotation_equals_transformers(case: str):
    rng = np.random.default_rng(0)
    positions = positions_for("beyond")
    x = rng.standard_normal((*positions.shape, 3, 64)).astype(np.float32)
    cos_hf, sin_hf = hf_rotary(case, 64)(torch.zeros(1), torch.as_tensor(positions))
    expected, _ = apply_rotary_pos_emb(
        torch.as_tensor(x), torch.as_tensor(x), cos_hf, sin_hf, unsqueeze_dim=2
    )
    cos, sin = rotary_tables(rope_config(case, 64), 64, MAX_POSITIONS, jnp.asarray(positions))
    actual = apply_rope(jnp.asarray(x), cos, sin)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=5e-4)


def test_rotation_by_hand():
    # head_dim 4, theta 100: inv_freq = [100^0, 100^-0.5] = [1, 0.1]. At position 2 the pair
    # (x0, x2) turns by 2 rad and the pair (x1, x3) by 0.2 rad.
    config = RopeConfig(rope_type="default", rope_theta=100.0)
    cos, sin = rotary_tables(config, 4, 16, jnp.array([[2]]))
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    expected = [
        1 * math.cos(2.0) - 3 * math.sin(2.0),
        2 * math.cos(0.2) - 4 * math.sin(0.2),
        3 * math.cos(2.0) + 1 * math.sin(2.0),
        4 * math.cos(0.2) + 2 * math.sin(0.2),
    ]
    np.testing.assert_allclose(apply_rope(x, cos, sin).ravel(), expected, rtol=1e-6)


def test_products_depend_on_the_distance_only():
    rng = np.random.default_rng(1)
    query, key = (rng.standard_normal((1, 1, 1, 32)).astype(np.float32) for _ in range(2))
    config = RopeConfig(rope_type="default", rope_theta=10_000.0)

    def product(query_position: int, key_position: int) -> float:
        turned = [
            apply_rope(jnp.asarray(x), *rotary_tables(config, 32, 64, jnp.array([[position]])))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return float(jnp.vdot(*turned))

    assert product(12, 5) == pytest.approx(product(47, 40), abs=1e-4)
    assert abs(product(12, 5) - product(12, 6)) > 1e-2


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_partial_and_interleaved_rotation_equal_transformers(share: float, interleaved: bool):
    # Phi-3 pairs channel i with i + half, GLM-4 channel 2i with 2i + 1.
    family = modeling_glm4 if interleaved else modeling_phi3
    rotary = family.Glm4RotaryEmbedding if interleaved else family.Phi3RotaryEmbedding
    model_type = "glm4" if interleaved else "phi3"
    fields = dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=share)
    reference = rotary(
        AutoConfig.for_model(
            model_type,
            hidden_size=32,
            num_attention_heads=2,
            head_dim=16,
            pad_token_id=None,
            rope_parameters=dict(fields),
        )
    )
    positions = np.arange(40)[None]
    x = np.random.default_rng(3).standard_normal((1, 40, 2, 16)).astype(np.float32)
    tables = reference(torch.zeros(1), torch.as_tensor(positions))
    expected, _ = family.apply_rotary_pos_emb(
        torch.as_tensor(x), torch.as_tensor(x), *tables, unsqueeze_dim=2
    )
    config = RopeConfig(**fields, interleaved=interleaved)
    cos, sin = rotary_tables(config, 16, 64, jnp.asarray(positions))
    assert cos.shape[-1] == 16 * share
    actual = apply_rope(jnp.asarray(x), cos, sin, interleaved=interleaved)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-4)
    other = apply_rope(jnp.asarray(x), cos, sin, interleaved=not interleaved)
    assert np.abs(np.asarray(other) - expected.numpy()).max() > 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rotated_in_float32(dtype):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((1, 500, 2, 64)), dtype)
    config = RopeConfig(rope_type="default", rope_theta=10_000.0)
    cos, sin = rotary_tables(config, 64, 512, jnp.arange(500)[None])
    rotated = apply_rope(x, cos, sin)
    assert rotated.dtype == dtype
    expected = apply_rope(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(np.asarray(rotated), np.asarray(expected.astype(dtype)))


def test_dynamic_is_the_default_rule_up_to_the_models_length():
    dynamic = RopeConfig(rope_type="dynamic", rope_theta=10_000.0, factor=4.0)
    default = dataclasses.replace(dynamic, rope_type="default", factor=None)
    short, long = jnp.arange(MAX_POSITIONS)[None], jnp.arange(MAX_POSITIONS + 1)[None]
    expected, _ = rope_frequencies(default, 16, MAX_POSITIONS, short)
    actual, _ = rope_frequencies(dynamic, 16, MAX_POSITIONS, short)
    np.testing.assert_array_equal(np.asarray(actual), expected)
    longer, _ = rope_frequencies(dynamic, 16, MAX_POSITIONS, long)
    assert (np.asarray(longer)[1:] < expected[1:]).all()


def test_dynamic_refuses_a_head_too_small_for_it():
    config = RopeConfig(rope_type="dynamic", rope_theta=10_000.0, factor=4.0)
    with pytest.raises(ConfigError, match=r"head_dim.*'dynamic'"):
        rope_frequencies(config, 2, 64, jnp.arange(4))


def test_scales_of_queries_equal_those_of_ministral_3():
    positions = np.array([[0, 1, 7, 8, 15, 16], [100, 2000, 65535, 65536, 262143, 3]])
    config = RopeConfig(
        rope_type="default",
        rope_theta=1e4,
        llama_4_scaling_beta=0.1,
        original_max_position_embeddings=8,
    )
    expected = get_llama_4_attn_scale(torch.as_tensor(positions), 0.1, 8)[:, 0, :, 0].numpy()
    scales = query_scales(config, jnp.asarray(positions))
    assert scales is not None and scales.dtype == jnp.float32
    np.testing.assert_allclose(scales, expected, **FEW_OPERATIONS)
    np.testing.assert_array_equal(scales[0, :3], np.ones(3))  # below the original length
    assert query_scales(dataclasses.replace(config, llama_4_scaling_beta=None), positions) is None
