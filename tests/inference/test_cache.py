"""Logits of cached decoding compared with one pass over the whole rows."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from tolerances import FLOAT32_LOGITS

from moe_jax.adapters import METHODS
from moe_jax.adapters.method import NoAdapter
from moe_jax.adapters.rows import AdapterRows
from moe_jax.adapters.tree import to_collection
from moe_jax.config.model import ComputeConfig
from moe_jax.config.parse import parse_member
from moe_jax.config.rope import RopeConfig
from moe_jax.layers.kv_cache import CachePosition, apply_cache_updates
from moe_jax.models.adapted import untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM

ROUTERS = {
    "top_k": {"name": "top_k", "top_k": 2},
    "top_p": {"name": "top_p", "top_p": 0.6},
    "switch": {"name": "switch", "capacity": 2, "overflow": "input"},
    "switch_unlimited": {"name": "switch", "capacity": 99, "overflow": "input"},
    "soft": {"name": "soft"},
}
PAIR = {"rank": 3, "alpha": 9.0, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
METHOD_FIELDS = {
    "lora": {"name": "lora"},
    "dora": {"name": "lora", "dora": True},
    **{
        f"mixlora_{router}": {"name": "mixlora", "num_experts": 3, "router": fields}
        for router, fields in ROUTERS.items()
    },
    "mixdora": {"name": "mixlora", "num_experts": 3, "router": ROUTERS["top_k"], "dora": True},
    "mixdora_soft": {"name": "mixlora", "num_experts": 3, "router": ROUTERS["soft"], "dora": True},
    **{
        f"loramoe_{router}": {"name": "loramoe", "num_experts": 3, "router": ROUTERS[router]}
        for router in ("top_k", "top_p", "soft")
    },
    "mola": {"name": "mola", "num_experts": [2, 3], "router": ROUTERS["top_k"], "dora": True},
}
# Every feature of attention that some family has.
MODEL = tiny_program.model_config(
    num_layers=2,
    qkv_bias=True,
    qk_norm=True,
    post_norms=True,
    query_pre_attn_scalar=12.0,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=5.0,
    sliding_window=5,
    layer_types=("sliding_attention", "full_attention"),
    sliding_rope=RopeConfig(rope_type="default", rope_theta=500.0),
    rope=RopeConfig(
        rope_type="default",
        rope_theta=10000.0,
        llama_4_scaling_beta=0.5,
        original_max_position_embeddings=4,
    ),
    rotated_layers=(True, False),
    residual_multiplier=0.8,
    logit_scale=1.5,
)
LENGTH, PROMPT, SLOTS = 18, 7, 20


@pytest.fixture(scope="module")
def computed():
    """Logits of one row per method and of the base: in one pass, token by token; and lengths."""
    methods = {
        name: parse_member(METHODS, {**PAIR, **fields}, name)
        for name, fields in METHOD_FIELDS.items()
    }
    bare = LlamaForCausalLM(MODEL, ComputeConfig(dtype="float32"))
    init = functools.partial(bare.init, tokens=jnp.zeros((1, 2), jnp.int32))
    params = _random(nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))["params"])
    trees = {
        name: _random(
            nn.meta.unbox(
                jax.eval_shape(
                    functools.partial(untrained_adapter, bare, method), params, jax.random.key(0)
                )
            )
        )
        for name, method in methods.items()
    }
    everyone = {**methods, "base": NoAdapter()}
    adapter_rows = tuple(
        AdapterRows(name, method, row, row + 1)
        for row, (name, method) in enumerate(everyone.items())
    )
    model = bare.clone(adapter_rows=adapter_rows)
    variables = {"params": params, "adapters": to_collection(trees)}
    # All rows are the same tokens, so that logits tell methods apart.
    tokens = np.tile(np.random.default_rng(0).integers(0, 96, LENGTH), (len(everyone), 1))
    whole = np.asarray(jax.jit(model.apply)(variables, tokens))

    # Of row i, the prompt is shorter by i % 3 tokens.
    start = np.arange(len(everyone)) % 3
    at = np.arange(PROMPT)[None] - start[:, None]  # which token of the row stands in each slot
    prompts = np.where(at >= 0, np.take_along_axis(tokens, np.maximum(at, 0), axis=1), 0)
    fill = functools.partial(model.clone(cache_length=SLOTS).apply, mutable=["cache"])
    logits, collections = jax.jit(fill)(
        variables, prompts, segment_ids=jnp.asarray(at >= 0, jnp.int32)
    )
    cache, parts = collections["cache"], [logits[:, -1:]]

    @jax.jit
    def step(cache, tokens, slot):
        place = CachePosition(slot, jnp.asarray(start))
        logits, updates = model.apply(
            {**variables, "cache": cache},
            tokens,
            positions=(slot - place.start)[:, None],
            cache_position=place,
            mutable=["cache_updates"],
        )
        return logits, apply_cache_updates(cache, updates["cache_updates"], place)

    lengths = PROMPT - start
    for slot in range(PROMPT, SLOTS - 2):
        newest = np.take_along_axis(tokens, (slot - start)[:, None], axis=1)
        logits, cache = step(cache, newest, jnp.int32(slot))
        parts.append(logits)
    return dict(
        zip(everyone, zip(whole, np.concatenate(parts, axis=1), lengths, strict=True), strict=True)
    )


def _random(shapes):
    devices = jax.tree.map(lambda _: jax.devices()[0], shapes)
    return tiny_program.random_leaves(shapes, devices, seed=1)


@pytest.mark.parametrize("name", [*METHOD_FIELDS, "base"])
def test_cached_logits_equal_those_of_one_pass(name, computed):
    whole, by_token, length = computed[name]
    expected = whole[length - 1 : length - 1 + len(by_token)]
    assert len(by_token) == 12
    np.testing.assert_allclose(by_token, expected, rtol=0, atol=FLOAT32_LOGITS)


def test_all_methods_differ(computed):
    # Also: a capacity of two tokens an expert is not enough for these rows.
    logits = {name: whole[-1] for name, (whole, *_) in computed.items()}
    for name, ours in logits.items():
        for other, theirs in logits.items():
            assert name == other or np.abs(ours - theirs).max() > 0.01, (name, other)
