"""New tokens of adapters, against a transformers model with a resized embedding and head."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import merge_lora, save_tiny_llama, tiny_model
from tolerances import FLOAT32_LOGITS, GRADIENT_OF_LARGEST, GRADIENT_ROUNDING, ROUNDING

import moe_jax
from moe_jax.adapters.method import NoAdapter
from moe_jax.adapters.rows import AdapterRows
from moe_jax.checkpoints.leaves import nested_dict
from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.model import ComputeConfig
from moe_jax.layers import vocab_loss
from moe_jax.layers.frozen import storage_of
from moe_jax.loaded.adapter_base import expected_leaves
from moe_jax.models.adapted import SINGLE, abstract_params, apply, single_adapter, untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM

TOKENS = ("<tool>", "</tool>", "<end>")
COMPUTE = ComputeConfig(dtype="float32")


def lora(**fields):
    targets = ("q_proj", "down_proj")
    return moe_jax.LoraConfig(
        rank=2, alpha=4.0, target_modules=targets, new_tokens=TOKENS, **fields
    )


def weights_of(base, method):
    """Random weights of an adapter."""
    rng = np.random.default_rng(0)
    specs = expected_leaves(base.config, method)
    noise = {path: 0.15 * rng.standard_normal(spec.shape) for path, spec in specs.items()}
    return nested_dict({path: leaf.astype(np.float32) for path, leaf in noise.items()})


def resized(reference, tree, first, scale):
    """A transformers model whose rows from `first` on are the adapter's, its pairs merged."""
    stop = first + len(TOKENS)
    reference.resize_token_embeddings(max(stop, reference.config.vocab_size), mean_resizing=False)
    merge_lora(reference, tree, scale)
    rows = tree["new_tokens"]
    with torch.no_grad():
        reference.get_output_embeddings().weight[first:stop] = torch.tensor(
            rows.get("head", rows["embedding"])
        )
        reference.get_input_embeddings().weight[first:stop] = torch.tensor(rows["embedding"])
    return reference


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(vocab_loss, "CHUNK_BYTES", 0)
    monkeypatch.setattr(vocab_loss, "MIN_CHUNK_TOKENS", 10)


@pytest.mark.parametrize(
    ("model_type", "tied", "below", "fields"),
    [
        pytest.param("llama", False, 0, {}, id="head"),
        pytest.param("llama", True, 0, {}, id="tied"),
        pytest.param("llama", False, 2, {}, id="some ids within a padded base"),
        pytest.param("llama", True, 5, {}, id="all ids within a padded base"),
        pytest.param(
            "gemma2", True, 0, {"head_dim": 8, "final_logit_softcapping": 2.0}, id="cap and scale"
        ),
        pytest.param(
            "granite", True, 0, {"logits_scaling": 0.5, "embedding_multiplier": 3.0}, id="factors"
        ),
    ],
)
def test_logits_and_gradients_equal_a_resized_model(
    tmp_path, small_chunks, model_type, tied, below, fields
):
    tiny_model(model_type, tie_word_embeddings=tied, **fields).save_pretrained(tmp_path)
    reference = tiny_model(model_type, tie_word_embeddings=tied, **fields)
    base = moe_jax.load_base(tmp_path)
    first = base.config.vocab_size - below
    method = lora(new_token_id=first)
    tree = weights_of(base, method)
    assert ("head" in tree["new_tokens"]) is not tied
    reference = resized(reference, tree, first, method.alpha / method.rank)

    tokens = np.random.default_rng(1).integers(0, first + len(TOKENS), (2, 12))
    tokens[0, 2:5], tokens[1, 7] = first + np.arange(3), first + 1
    logits = reference(torch.tensor(tokens)).logits
    model = LlamaForCausalLM(base.config, COMPUTE, single_adapter(method, 2))
    actual = apply(model, base.params, {SINGLE: tree}, LlamaForCausalLM.__call__, tokens)
    np.testing.assert_allclose(actual, logits.detach(), rtol=0, atol=FLOAT32_LOGITS)

    targets = np.roll(tokens, -1, axis=1)

    def chunked(tree):
        def losses(module):
            return module.token_losses(module.hidden_states(jnp.asarray(tokens)), targets)

        return jnp.sum(apply(model, base.params, {SINGLE: tree}, losses))

    loss, gradient = jax.value_and_grad(chunked)(tree)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(targets).flatten(), reduction="sum"
    )
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), **GRADIENT_ROUNDING)
    modules = {"embedding": reference.get_input_embeddings()}
    modules |= {} if tied else {"head": reference.get_output_embeddings()}
    for name, module in modules.items():
        rows = module.weight.grad[first : first + len(TOKENS)].numpy()
        largest = np.abs(rows).max()
        assert largest > 0.1
        np.testing.assert_allclose(
            gradient["new_tokens"][name], rows, rtol=1e-4, atol=GRADIENT_OF_LARGEST * largest
        )


def test_initial_rows_are_the_mean_of_the_tokenizers(tmp_path):
    reference = save_tiny_llama(tmp_path)
    base = moe_jax.load_base(tmp_path)
    tree = untrained_adapter(
        LlamaForCausalLM(base.config, COMPUTE),
        lora(new_token_id=90),
        base.params,
        jax.random.key(0),
    )
    rows_of = nn.meta.unbox(tree)["new_tokens"]
    for name, module in (("embedding", reference.model.embed_tokens), ("head", reference.lm_head)):
        rows = np.asarray(rows_of[name])
        mean = module.weight[:90].mean(0).detach().numpy()
        np.testing.assert_allclose(rows, np.tile(mean, (3, 1)), **ROUNDING)


def test_other_rows_of_a_batch_keep_their_logits(tmp_path):
    """The base alone and an adapter without new tokens, beside two adapters that have them."""
    save_tiny_llama(tmp_path)
    base = moe_jax.load_base(tmp_path)
    extended, plain = (
        lora(new_token_id=94),
        moe_jax.LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",)),
    )
    methods = {"one": extended, "base": NoAdapter(), "plain": plain, "two": extended}
    trees = {
        "one": weights_of(base, extended),
        "plain": weights_of(base, plain),
        "two": jax.tree.map(lambda leaf: -2.0 * leaf, weights_of(base, extended)),
    }
    tokens = np.random.default_rng(2).integers(0, 94, (4, 8))
    tokens[0, 3] = tokens[3, 5] = 96
    tokens[1, 2] = tokens[2, 2] = 95  # a row of the base that its tokenizer does not use

    def logits(names):
        rows = [AdapterRows(n, methods[n], i, i + 1) for i, n in enumerate(names)]
        model = LlamaForCausalLM(base.config, COMPUTE, tuple(rows))
        given = {name: trees[name] for name in names if name in trees}
        inputs = tokens[[list(methods).index(name) for name in names]]
        return np.asarray(apply(model, base.params, given, LlamaForCausalLM.__call__, inputs))

    together = logits(list(methods))
    assert together.shape == (4, 8, 97)
    for row, name in enumerate(methods):
        alone = logits([name])[0]
        np.testing.assert_allclose(together[row, :, : alone.shape[-1]], alone, **GRADIENT_ROUNDING)
        assert np.isinf(together[row, :, 96]).all() == (name in ("base", "plain"))


def test_the_program_without_new_tokens_has_no_trace_of_them(tmp_path):
    save_tiny_llama(tmp_path)
    base = moe_jax.load_base(tmp_path)
    model = LlamaForCausalLM(base.config, COMPUTE)
    params = abstract_params(model)

    def text(function, *args):
        return jax.jit(lambda p: apply(model, p, {}, function, *args)).lower(params).as_text()

    hidden = jnp.zeros((2, 12, base.config.hidden_size))
    losses = text(LlamaForCausalLM.token_losses, hidden, jnp.zeros((2, 12), jnp.int32))
    assert losses.count("dot_general") == 1
    assert "concatenate" not in losses
    assert "concatenate" not in text(LlamaForCausalLM.logits, hidden)


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_has_rows_of_the_embedding_alone(tmp_path, tied):
    save_tiny_llama(tmp_path, tie_word_embeddings=tied)
    base = moe_jax.load_base(tmp_path)
    judge = lora(new_token_id=96, classification=ClassificationConfig(labels=("a", "b")))
    tree = weights_of(base, judge)
    assert list(tree["new_tokens"]) == ["embedding"]
    tokens = jnp.asarray(np.array([[1, 97, 3], [1, 98, 3]]))

    def scores(module):
        return module.scores(module.hidden_states(tokens), jnp.ones_like(tokens, bool))[SINGLE]

    model = LlamaForCausalLM(base.config, COMPUTE, single_adapter(judge, 2))
    found = apply(model, base.params, {SINGLE: tree}, scores)
    assert np.isfinite(found).all() and np.abs(found[0] - found[1]).max() > 1e-3


def test_quantized_and_half_precision_bases(tmp_path):
    """The tables are in bfloat16 there; the rows of the adapter stay in float32."""
    save_tiny_llama(tmp_path)
    base = moe_jax.load_base(tmp_path, dtype="nf4")
    method = lora(new_token_id=96)
    tree = weights_of(base, method)
    assert base.params["embed_tokens"]["embedding"].dtype == storage_of("nf4").dtype
    assert tree["new_tokens"]["embedding"].dtype == np.float32
    tokens = np.array([[1, 96, 98, 5]])
    logits = {}
    for dtype in ("float32", "bfloat16"):
        model = LlamaForCausalLM(
            base.config, ComputeConfig(dtype=dtype), single_adapter(method, 1), param_dtype="nf4"
        )
        call = LlamaForCausalLM.__call__
        logits[dtype] = np.asarray(apply(model, base.params, {SINGLE: tree}, call, tokens))
        assert logits[dtype].shape == (1, 4, 99)
    largest = np.abs(logits["float32"]).max()
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=0.05 * largest)
