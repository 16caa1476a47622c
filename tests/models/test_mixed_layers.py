"""Models with layers of several kinds: padding, packing, decoding, adapters, exports."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from foreign_adapters import LORA, peft_logits
from hf_models import QWEN3_5, tiny_model
from tolerances import DELTA_NET_GRADIENT_OF_LARGEST, FLOAT32_LOGITS
from whole_models import adapter_of

import moe_jax
from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.rows import AdapterRows
from moe_jax.adapters.tree import (
    DELTA_NET_MODULES,
    LAYER_EMBEDDING_MODULES,
    TARGET_MODULES,
    to_collection,
)
from moe_jax.config.model import ComputeConfig
from moe_jax.evaluation.packed_sequences import ScoredSequence
from moe_jax.evaluation.scorer import Scorer
from moe_jax.hf.key_table import base_leaves
from moe_jax.hf.load import abstract_base_params
from moe_jax.layers.kv_cache import CachePosition, apply_cache_updates
from moe_jax.models.adapted import untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.models.layer_views import split_layers
from moe_jax.models.mixed_layers import pattern_length

# The last two layers attend to the keys and values of the two before them.
GEMMA_4_E2B: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 5,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 64,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}
# The last number is the seed of a model whose gradients do not magnify rounding.
CASES = {
    "qwen3_5": ("qwen3_5_text", QWEN3_5, DELTA_NET_MODULES, 0),
    "gemma4_e2b": ("gemma4_text", GEMMA_4_E2B, LAYER_EMBEDDING_MODULES, 2),
}
LENGTH, SLOTS = 20, 24
LENGTHS = (20, 13, 2)
"""Numbers of tokens of rows; the last is shorter than the filters of Qwen's convolution."""


class Tiny(NamedTuple):
    """A base and a LoRA on all of its projections, here and in transformers."""

    base: moe_jax.Base
    reference: transformers.PreTrainedModel
    adapter: Any
    model: LlamaForCausalLM
    variables: dict[str, Any]


@pytest.fixture(scope="module", params=CASES)
def tiny(request, tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp(request.param)
    model_type, fields, further_targets, seed = CASES[request.param]
    reference = tiny_model(model_type, seed, **fields)
    reference.save_pretrained(folder)
    base = moe_jax.load_base(folder)
    adapter = adapter_of(base, LORA | {"target_modules": [*TARGET_MODULES, *further_targets]})
    rows = (AdapterRows("x", adapter.method, 0, len(LENGTHS)),)
    model = LlamaForCausalLM(base.config, ComputeConfig(dtype="float32"), rows)
    variables = {"params": base.params, "adapters": to_collection({"x": adapter.tree})}
    return Tiny(base, reference, adapter, model, variables)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (len(LENGTHS), LENGTH))


@pytest.fixture(scope="module")
def expected(tiny, rows, tmp_path_factory) -> list[np.ndarray]:
    """Logits of each row alone, from peft's model with the exported adapter."""
    folder = tmp_path_factory.mktemp("adapter") / "out"
    moe_jax.export_adapter(tiny.adapter, "peft", folder)
    read = moe_jax.import_adapter(folder, tiny.base)
    jax.tree.map(np.testing.assert_array_equal, read.tree, tiny.adapter.tree)
    assert set(read.method.target_modules) == set(tiny.adapter.method.target_modules)
    return [
        peft_logits(tiny.reference, folder, rows[row : row + 1, :count])[0]
        for row, count in enumerate(LENGTHS)
    ]


def test_adapted_rows_equal_peft_with_both_paddings(tiny, rows, expected):
    apply = jax.jit(functools.partial(tiny.model.apply, tiny.variables))
    at, counts = np.arange(LENGTH)[None], np.array(LENGTHS)[:, None]
    with torch.no_grad():
        plain = tiny.reference(torch.tensor(rows[:1])).logits.numpy()[0]
    assert np.abs(plain - expected[0]).max() > 0.5
    right = apply(rows, segment_ids=jnp.asarray(at < counts, jnp.int32))
    shifted = np.stack(
        [np.roll(row, LENGTH - count) for row, count in zip(rows, LENGTHS, strict=True)]
    )
    left = apply(shifted, segment_ids=jnp.asarray(at >= LENGTH - counts, jnp.int32))
    for row, count in enumerate(LENGTHS):
        for ours in (right[row, :count], left[row, LENGTH - count :]):
            np.testing.assert_allclose(ours, expected[row], rtol=0, atol=FLOAT32_LOGITS)


def test_packed_sequences_equal_rows_of_their_own(tiny, rows, expected):
    packed = np.concatenate([rows[row, :count] for row, count in enumerate(LENGTHS)])
    numbers = np.repeat(np.arange(1, len(LENGTHS) + 1), LENGTHS)
    tokens = np.tile(np.pad(packed, (0, 5)), (len(LENGTHS), 1))
    segment_ids = np.tile(np.pad(numbers, (0, 5)), (len(LENGTHS), 1))
    apply = jax.jit(functools.partial(tiny.model.apply, tiny.variables))
    ours = apply(tokens, segment_ids=jnp.asarray(segment_ids))
    for start, logits in zip(np.cumsum((0, *LENGTHS)), expected, strict=False):
        part = ours[1, start : start + len(logits)]
        np.testing.assert_allclose(part, logits, rtol=0, atol=FLOAT32_LOGITS)
    without = apply(tokens)
    assert np.abs(without[1, LENGTHS[0] : LENGTHS[0] + 13] - expected[1]).max() > 0.1


@pytest.mark.parametrize("scan_layers", [True, False])
def test_decoding_equals_the_whole_pass(tiny, rows, expected, scan_layers):
    """Prompts of 15, 8 and 1 tokens, padded on the left; then two tokens at once, three singly."""
    config, prompts = tiny.base.config, np.array([15, 8, 1])
    width = int(prompts.max())
    start = width - prompts
    padded = np.stack([np.roll(row[:width], shift) for row, shift in zip(rows, start, strict=True)])
    is_token = np.arange(width)[None] >= start[:, None]
    fill = tiny.model.clone(cache_length=SLOTS)
    _, filled = jax.jit(functools.partial(fill.apply, mutable=["cache"]))(
        tiny.variables, padded, segment_ids=jnp.asarray(is_token, jnp.int32)
    )
    split = (lambda tree: tree) if scan_layers else functools.partial(split_layers, config)
    variables = {name: split(tree) for name, tree in tiny.variables.items()}
    model = tiny.model.clone(scan_layers=scan_layers)

    @jax.jit
    def step(cache, tokens, slot):
        place = CachePosition(slot, jnp.asarray(start, jnp.int32))
        logits, updates = model.apply(
            {**variables, "cache": cache},
            tokens,
            positions=(slot - place.start)[:, None] + jnp.arange(tokens.shape[1])[None],
            cache_position=place,
            mutable=["cache_updates"],
        )
        return logits, apply_cache_updates(cache, updates["cache_updates"], place)

    cache, slot, parts = split(filled["cache"]), width, []
    for count in (2, 1, 1, 1):
        at = (slot - start)[:, None] + np.arange(count)[None]
        logits, cache = step(cache, np.take_along_axis(rows, at, axis=1), jnp.int32(slot))
        parts.append(logits)
        slot += count
    decoded = np.concatenate(parts, axis=1)
    whole = jax.jit(tiny.model.apply)(tiny.variables, rows)
    for row, prompt in enumerate(prompts):
        ours, theirs = decoded[row], whole[row, prompt : prompt + 5]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.parametrize("remat", ["none", "frozen"])
def test_gradients_of_every_target_equal_pefts(tiny, rows, remat, gradients_in_peft):
    compute = ComputeConfig(dtype="float32", remat=remat)
    model = tiny.model.clone(compute=compute)

    @jax.jit
    def gradient(tree):
        def loss(tree):
            variables = {**tiny.variables, "adapters": to_collection({"x": tree})}
            return jnp.mean(jnp.square(model.apply(variables, rows)))

        return jax.grad(loss)(tree)

    tensors = {kernel.path[:-1]: kernel.keys for kernel in base_leaves(tiny.base.config)}
    count = 0
    for path, ours in jax.tree_util.tree_leaves_with_path(gradient(tiny.adapter.tree)):
        *module, leaf = (part.key for part in path)
        for index, name in enumerate(tensors[tuple(module)]):
            theirs = gradients_in_peft[f"{name.removesuffix('.weight')}.{leaf}"]
            limit = DELTA_NET_GRADIENT_OF_LARGEST * np.abs(theirs).max()
            assert np.abs(theirs).max() > 0
            np.testing.assert_allclose(ours[index], theirs.T, rtol=0, atol=limit)
            count += 1
    assert count == len(gradients_in_peft)


@pytest.fixture(scope="module")
def gradients_in_peft(tiny, rows, tmp_path_factory) -> dict[str, np.ndarray]:
    """Gradients of the mean square of all logits, by layer, module and leaf."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    moe_jax.export_adapter(tiny.adapter, "peft", folder)
    model = peft.PeftModel.from_pretrained(tiny.reference, str(folder), is_trainable=True)
    model(torch.tensor(rows), use_cache=False).logits.square().mean().backward()
    found = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): (
            parameter.grad.numpy()
        )
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and "lora_" in name
    }
    model.unload()
    return found


def test_dense_export_is_a_model_of_transformers(tiny, rows, tmp_path, expected):
    moe_jax.export_adapter(tiny.adapter, "llama", tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        ours = model.eval()(torch.tensor(rows[:1])).logits.numpy()[0]
    np.testing.assert_allclose(ours, expected[0], rtol=0, atol=FLOAT32_LOGITS)


def test_options_with_a_common_prompt_score_as_alone(tiny):
    """The prompt of a question is read once for each option: a branch has no state of its own."""
    rng = np.random.default_rng(4)
    prompt = tuple(rng.integers(0, 64, 9).tolist())
    options = [tuple(rng.integers(0, 64, count).tolist()) for count in (3, 1, 4)]
    group = [ScoredSequence.continuation(prompt, option) for option in options]
    model = LlamaForCausalLM(tiny.base.config, ComputeConfig(dtype="float32"))
    scorer = Scorer(model, tiny.base.params, batch_size=1)
    ((*found,),) = scorer.scores([group], None, [False])
    assert sorted(member for _, member, _ in found) == [0, 1, 2]
    for _, member, score in found:
        tokens, count = torch.tensor([[*prompt, *options[member]]]), len(options[member])
        with torch.no_grad():
            log_probs = tiny.reference(tokens).logits[0].log_softmax(-1)
        target = sum(float(log_probs[-count - 1 + i, tokens[0, i - count]]) for i in range(count))
        np.testing.assert_allclose(score.log_prob, target, rtol=0, atol=4 * FLOAT32_LOGITS)


def test_pattern_length(tiny):
    config = tiny.base.config
    readers = config.reader_layers
    assert pattern_length(config, range(readers.start)) == 2
    if readers:
        assert pattern_length(config, readers) == 2
        assert config.layers_with("self_attn") == (0, 2)
        assert config.layers_with("global_attn_reader") == (5,)
        assert config.layers_with("wide_mlp") == (4, 5)
    else:
        types = ("linear_attention",) * 5 + ("full_attention",)
        odd = dataclasses.replace(config, num_layers=6, layer_types=types)
        assert pattern_length(odd, range(6)) == 6
        assert odd.layers_with("self_attn") == (5,)
        assert odd.layers_with("linear_attn") == (0, 1, 2, 3, 4)
        assert odd.layers_with("mlp") == (0, 1, 2, 3, 4, 5)


def _temporary_bytes(tiny: Tiny, periods: int) -> int:
    """Temporary memory of a gradient on a few tokens of a model with wide FFNs, from shapes."""
    readers = 2 * periods if tiny.base.config.has_readers else 0
    depth = 2 * periods + readers
    config = dataclasses.replace(
        tiny.base.config,
        intermediate_size=4096,
        reader_ffn_width=None,
        num_layers=depth,
        layer_types=(tiny.base.config.layer_types or ())[:2] * (depth // 2),
        num_reader_layers=readers,
    )
    plain = LlamaForCausalLM(config, ComputeConfig(dtype="float32"))
    method = LoraConfig(rank=2, alpha=2.0, target_modules=("q_proj",))
    model = plain.clone(adapter_rows=(AdapterRows("x", method, 0, 1),))
    params = abstract_base_params(config, "float32")
    make = functools.partial(untrained_adapter, model, method)
    tree = nn.meta.unbox(jax.eval_shape(make, params, jax.random.key(0)))

    def loss(tree, params, tokens):
        variables = {"params": params, "adapters": to_collection({"x": tree})}
        return jnp.sum(model.apply(variables, tokens))

    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    memory = jax.jit(jax.grad(loss)).lower(tree, params, tokens).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_the_backward_pass_keeps_no_copies_of_weights(tiny):
    """Three matrices of a layer's FFN are 1.5 MiB; what a layer keeps of four tokens is less."""
    ffn = 4 * 3 * tiny.base.config.hidden_size * 4096
    assert _temporary_bytes(tiny, 4) - _temporary_bytes(tiny, 2) < ffn
