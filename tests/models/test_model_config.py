"""Invalid architectures, and compute settings invalid for an architecture."""

import jax
import jax.numpy as jnp
import pytest
import tiny_program

from moe_jax.config.model import ComputeConfig
from moe_jax.config.parse import FieldError
from moe_jax.config.rope import RopeConfig
from moe_jax.errors import ConfigError
from moe_jax.models.causal_lm import LlamaForCausalLM

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE = RopeConfig(rope_type="default", rope_theta=1e4)
HALF = RopeConfig(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
LONG = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=8)


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        (dict(attention_bias=True, qkv_bias=True), "qkv_bias", "part of attention_bias"),
        (dict(query_pre_attn_scalar=0.0), "query_pre_attn_scalar", "must be positive"),
        (dict(final_logit_softcapping=-1.0), "final_logit_softcapping", "must be positive"),
        (dict(sliding_window=4), "sliding_window", "requires layer_types"),
        (dict(layer_types=(SLIDING,) * 3), "sliding_window", "requires layer_types"),
        (dict(layer_types=(SLIDING,) * 2, sliding_window=4), "layer_types", "each of the 3"),
        (dict(layer_types=(FULL,) * 3), "layer_types", "leave it out"),
        (dict(sliding_rope=ROPE), "sliding_rope", "requires layer_types"),
        (dict(rotated_layers=(True,) * 2), "rotated_layers", "each of the 3 layers"),
        (dict(residual_multiplier=0.0), "residual_multiplier", "must be positive"),
        (
            dict(scale_embeddings=True, embedding_multiplier=2.0),
            "embedding_multiplier",
            "contradicts scale_embeddings",
        ),
        (
            dict(sliding_rope=HALF, layer_types=(FULL, SLIDING, FULL), sliding_window=4),
            "sliding_rope.partial_rotary_factor",
            "same channels as rope",
        ),
        (
            dict(rope=RopeConfig(**LONG, short_factor=(1.0,) * 4, long_factor=(1.0,) * 3)),
            "rope.long_factor",
            "must have 4 numbers",
        ),
    ],
)
def test_invalid_architectures(change, field, reason):
    with pytest.raises(FieldError, match=reason) as caught:
        tiny_program.model_config(**change)
    assert caught.value.field == field


def test_the_fused_kernel_refuses_unsupported_models():
    compute = ComputeConfig(dtype="bfloat16", attention="cudnn")
    tokens = jnp.zeros((1, 2), jnp.int32)
    model = LlamaForCausalLM(tiny_program.model_config(attn_logit_softcapping=50.0), compute)
    message = r"^attention: 'cudnn' cannot cap .*softcapping 50\.0\); use 'auto' or 'xla'"
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), tokens)
    # The cap of the logits is none of its business.
    compute.check_model(tiny_program.model_config(final_logit_softcapping=30.0))
    window = tiny_program.model_config(sliding_window=4, layer_types=(SLIDING,) * 3)
    compute.check_model(window)
    for width in (12, 264):
        with pytest.raises(FieldError, match=f"a multiple of 8 up to 256, and .* is {width}"):
            compute.check_model(tiny_program.model_config(head_dim=width))
