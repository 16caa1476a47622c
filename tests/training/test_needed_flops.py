"""FLOPs that a step needs: sums by hand, a plain loop, and the products of a compiled program."""

import numpy as np
import pytest
from tiny_program import LORA, MIXLORA, model_config, program, random_batch

from benchmarks.compiled_flops import compiled_flops
from moe_jax.adapters.method import NoAdapter
from moe_jax.compiled.chips import CHIPS
from moe_jax.compiled.roofline import roofline
from moe_jax.config.attention import DeltaNetConfig, GlobalAttentionConfig
from moe_jax.config.model import ModelConfig
from moe_jax.config.rope import RopeConfig
from moe_jax.training.step.needed_flops import needed_flops

D, F, LAYERS, HEADS, KV, VOCAB = 48, 80, 3, 6 * 8, 2 * 8, 96
"""Sizes of `model_config`; 48 query channels and 16 of keys."""

FROZEN = LAYERS * (D * (2 * HEADS + 2 * KV) + 3 * D * F) + D * VOCAB
PAIRS_ON_ATTENTION = LAYERS * 4 * (2 * (D + HEADS) + 2 * (D + KV))
PAIR_ON_FFN = LAYERS * 4 * (D + F)


def _needed(methods, config=None):
    made = program(methods, config=config)
    return needed_flops(made.model.config, made.config.methods, made.abstract_state.adapters)


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        (LORA, PAIRS_ON_ATTENTION + 3 * PAIR_ON_FFN),
        # Two of four experts on each of three projections, and a router to four.
        (MIXLORA, PAIRS_ON_ATTENTION + 2 * 3 * PAIR_ON_FFN + LAYERS * D * 4),
        (
            {**MIXLORA, "router": {"name": "soft"}},
            PAIRS_ON_ATTENTION + 4 * 3 * PAIR_ON_FFN + LAYERS * D * 4,
        ),
        ({**LORA, "new_tokens": ("<a>", "<b>")}, PAIRS_ON_ATTENTION + 3 * PAIR_ON_FFN + 2 * D),
    ],
)
def test_a_token_needs_four_for_a_frozen_weight_and_six_for_a_trained_one(method, weights):
    assert _needed({"a": method}).token == {"a": 4 * FROZEN + 6 * weights}


def test_linear_attention_needs_its_weights_and_states():
    net = DeltaNetConfig(
        num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=6, filter_width=3
    )
    types = ("linear_attention", "linear_attention", "full_attention")
    model = model_config(layer_types=types, delta_net=net, attention_gate=True)
    needed = _needed({"a": {**LORA, "target_modules": ("in_proj_z",)}}, model)
    # Queries and keys of 16 channels, values of 24, their gate, a rate and a decay of 4 heads.
    linear = D * (2 * 16 + 24 + 24 + 4 + 4) + 24 * D
    full = D * (3 * HEADS + 2 * KV)  # the queries have a gate each
    frozen = 2 * linear + full + LAYERS * 3 * D * F + D * VOCAB
    states = 2 * 4 * 8 * 6
    assert needed.token == {"a": 4 * frozen + 6 * 2 * 4 * (D + 24) + 18 * states}
    assert needed.pair == 12 * HEADS


def test_full_layers_of_other_sizes_need_theirs():
    sizes = GlobalAttentionConfig(num_kv_heads=1, head_dim=16, key_as_value=True)
    types = ("sliding_attention", "sliding_attention", "full_attention")
    rope = RopeConfig(rope_type="proportional", rope_theta=1e6)
    model = model_config(layer_types=types, sliding_window=3, global_attention=sizes, rope=rope)
    needed = _needed({"a": {**LORA, "target_modules": ("k_proj",)}}, model)
    # Six heads of 16 channels for queries and the output, one for keys that are values too.
    attention = 2 * D * (2 * HEADS + 2 * KV) + D * (2 * 6 * 16 + 16)
    frozen = attention + LAYERS * 3 * D * F + D * VOCAB
    trained = 4 * (2 * (D + KV) + (D + 16))
    assert needed.token == {"a": 4 * frozen + 6 * trained}
    assert needed.pair == 12 * 6 * 16
    assert needed.sliding_pair == 12 * 2 * HEADS


def test_readers_and_embeddings_of_each_layer_need_theirs():
    sizes = GlobalAttentionConfig(num_kv_heads=1, head_dim=16, key_as_value=False)
    model = model_config(
        num_layers=4,
        layer_types=("sliding_attention", "full_attention") * 2,
        sliding_window=3,
        global_attention=sizes,
        num_reader_layers=2,
        reader_ffn_width=2 * F,
        layer_embedding_width=10,
        rope=RopeConfig(rope_type="proportional", rope_theta=1e6),
    )
    targets = ("k_proj", "up_proj", "per_layer_projection")
    needed = _needed({"a": {**LORA, "target_modules": targets}}, model)
    queries = 2 * (2 * HEADS + 2 * 6 * 16)  # and the output, in both kinds of layers, twice
    keys = 2 * KV + 2 * 16
    embeddings = 4 * (10 + 10) + 4 * 10 / 2  # the projection of the embedding is forward only
    frozen = D * (queries + keys + 3 * (2 * F + 2 * 2 * F) + embeddings + VOCAB)
    trained = 4 * (D + KV + D + 16 + 2 * (D + F) + 2 * (D + 2 * F) + 4 * (10 + D))
    assert needed.token == {"a": 4 * frozen + 6 * trained}
    assert needed.pair == 12 * 2 * 6 * 16
    assert needed.sliding_pair == 12 * 2 * HEADS


def test_a_classifier_has_no_product_with_the_vocabulary():
    classifier = {**LORA, "classification": {"labels": ("no", "yes")}}
    token = _needed({"a": LORA, "b": classifier}).token
    assert token["a"] - token["b"] == 4 * D * VOCAB


def test_a_batch_needs_what_its_real_tokens_see():
    sliding = model_config(
        sliding_window=3,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    )
    needed = _needed({"a": LORA, "b": MIXLORA}, sliding)
    batch = random_batch(4)
    # Row 0 is packed: sequences of 5 and 6 tokens, and 5 of padding.
    batch.segment_ids[0] = [1] * 5 + [2] * 6 + [0] * 5
    batch.positions[0] = [*range(5), *range(6), *[0] * 5]
    expected = 0.0
    for row, name in enumerate(["a", "a", "a", "b"]):
        segments = batch.segment_ids[row]
        for token, segment in enumerate(segments):
            if segment == 0:
                continue
            expected += needed.token[name]
            for other in range(token + 1):
                if segments[other] == segment:
                    layers = 3 if token - other < 3 else 1
                    expected += layers * 12 * HEADS
    assert needed.of_batch(batch, {"a": 3, "b": 1}) == expected


def test_rows_without_padding_need_what_their_batch_needs():
    needed = _needed({"a": LORA})
    full = random_batch(2)._replace(
        segment_ids=np.ones((2, 16), np.int32), positions=np.tile(np.arange(16), (2, 1))
    )
    assert needed.of_full_rows({"a": 2}, 16) == needed.of_batch(full, {"a": 2})


def test_the_products_of_a_compiled_step_are_those_that_are_needed():
    wide = model_config(
        hidden_size=256, intermediate_size=704, head_dim=32, num_heads=8, num_kv_heads=4
    )
    made, rows, length = program({"a": LORA}, config=wide), 8, 16
    compiled = made.lower_train_step(length).compile()
    needed = needed_flops(wide, made.config.methods, made.abstract_state.adapters)
    # A short row's scores are computed for all pairs of positions, also for those that are masked.
    masked = rows * needed.pair * (length**2 - length * (length + 1) // 2)
    products = needed.of_full_rows({"a": rows}, length) + masked
    text = compiled.as_text()
    assert text is not None
    assert roofline(text, CHIPS["h200"].rates).total.flops == products
    # XLA also counts what is not a product.
    assert products < compiled_flops(compiled, fixed_loops=True).total < 1.03 * products


def test_llama_2_7b():
    llama = ModelConfig(
        **{
            **vars(model_config()),
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_layers": 32,
            "num_heads": 32,
            "num_kv_heads": 32,
            "head_dim": 128,
        }
    )
    needed = needed_flops(llama, {"base": NoAdapter()}, {"base": {}})
    # Without the embedding and the norms 6,607,077,376 weights.
    assert needed.token == {"base": 4 * 6_607_077_376}
    # In the mean a token of 2048 sees 1024.5 positions, in 32 layers of 4096 channels.
    row = 2048 * (4 * 6_607_077_376 + 32 * 12 * 4096 * 1024.5)
    assert needed.of_full_rows({"base": 1}, 2048) == row
