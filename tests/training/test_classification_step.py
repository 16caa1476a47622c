"""Adapters with score heads: equal to transformers' classifier, alone or together."""

import jax
import numpy as np
import pytest
import tiny_program
import torch
from hf_models import save_tiny_llama
from tolerances import FLOAT32_LOGITS, GRADIENT_OF_LARGEST, GRADIENT_ROUNDING, ROUNDING
from torch_oracle import attach, gradients
from transformers import LlamaForSequenceClassification

import moe_jax
from moe_jax.config.classification import ClassificationConfig
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params
from moe_jax.training.step.micro_batches import join_rows

SIZES = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TARGETS = ("q_proj", "down_proj")
LORA = {**tiny_program.LORA, "target_modules": TARGETS}
METHODS = {
    "classes": {**LORA, "classification": {"labels": ["no", "maybe", "yes"]}},
    "words": LORA,
    "number": {
        **tiny_program.MIXLORA,
        "target_modules": TARGETS,
        "losses": {"load_balance": {"coefficient": 0.0}},  # differs between micro-batches
        "classification": {"regression": True},
    },
}
ROWS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder, transformers model, configuration and parameters of a base."""
    folder = tmp_path_factory.mktemp("base")
    reference = save_tiny_llama(folder, **SIZES, **HEADS)
    config = read_model_config(folder)
    return folder, reference, config, load_base_params(folder, config, "float32")


def labeled_batch(labels, seed):
    """Labeled rows of different lengths, without the token 0."""
    batch = tiny_program.random_batch(ROWS, seed=seed)
    last = batch.segment_ids.sum(axis=1) - 1
    at = np.arange(ROWS), last
    batch.tokens[batch.tokens == 0] = 1
    batch.loss_mask[:] = False
    batch.loss_mask[at], batch.labels[at] = True, labels
    assert len(set(last)) > 2 and last.min() < 15, "there is padding of several lengths"
    return batch


@pytest.fixture(scope="module")
def batches():
    return {
        "classes": labeled_batch([2, 0, 1, 2], seed=5),
        "words": tiny_program.random_batch(ROWS, seed=6),
        "number": labeled_batch([0.5, -1.0, 3.25, 0.0], seed=7),
    }


def one_step(names, base, batches, adapters, micro_batches=1, mesh=None):
    """Gradients and metrics of one step with these adapters; SGD subtracts the gradients."""
    program = tiny_program.program(
        {name: METHODS[name] for name in names},
        rows=ROWS,
        config=base[2],
        mesh=mesh,
        training={"micro_batches": micro_batches},
    )
    params = jax.device_put(base[3], program.param_shardings)
    chosen = {name: adapters[name] for name in names}
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
    state = jax.device_put(state.replace(adapters=chosen), program.state_shardings)
    batch = program.put_train_batch(join_rows([batches[name] for name in names]))
    new, metrics = program.train_step(state, params, batch)
    actual = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), chosen, dict(new.adapters))
    return actual, {name: float(np.asarray(m)) for name, m in metrics.items() if np.ndim(m) == 0}


@pytest.fixture(scope="module")
def adapters(base):
    program = tiny_program.program(METHODS, rows=ROWS, config=base[2])
    return jax.tree.map(np.asarray, tiny_program.random_adapters(program))


@pytest.fixture(scope="module")
def together(base, batches, adapters):
    return one_step(METHODS, base, batches, adapters, micro_batches=2)


def torch_classifier(base, tree, labels):
    """Classifier of transformers in float64 with the LoRA weights and head of `tree`."""
    folder = base[0]
    model = LlamaForSequenceClassification.from_pretrained(
        folder, num_labels=labels, pad_token_id=0, attn_implementation="eager"
    ).eval()
    method = moe_jax.LoraConfig(rank=4, alpha=8.0, target_modules=TARGETS)
    model = attach(model, tree, method)
    model.score.weight.data = torch.tensor(tree["score"]["kernel"]).double().T.contiguous()
    model.score.weight.requires_grad_(True)
    return model


@pytest.fixture(scope="module")
def oracle(base, batches, adapters):
    return torch_classifier(base, adapters["classes"], labels=3)


def rows_of(batch):
    """Tokens of each row without padding, [1, n]."""
    return [
        torch.tensor(tokens[:length][None]).long()
        for tokens, length in zip(batch.tokens, batch.segment_ids.sum(axis=1), strict=True)
    ]


def test_loss_and_gradients_equal_transformers(oracle, batches, adapters, together):
    """transformers computes row by row, without padding."""
    batch, (actual, metrics) = batches["classes"], together
    scores = torch.cat([oracle(row).logits for row in rows_of(batch)])
    labels = torch.tensor(batch.labels.sum(axis=1)).long()
    loss = torch.nn.functional.cross_entropy(scores, labels)
    loss.backward()
    np.testing.assert_allclose(metrics["classes/loss"], loss.item(), **ROUNDING)
    assert metrics["classes/target_tokens"] == ROWS
    head = oracle.score.weight.grad.T.numpy()
    assert np.abs(head).max() > 1e-2
    np.testing.assert_allclose(actual["classes"]["score"]["kernel"], head, **GRADIENT_ROUNDING)
    expected = gradients(oracle, {"layers": adapters["classes"]["layers"]})
    for block, sites in expected["layers"].items():
        for site, leaves in sites.items():
            for leaf, gradient in leaves.items():
                actual_gradient = actual["classes"]["layers"][block][site][leaf]
                assert np.abs(gradient).max() > 1e-4
                np.testing.assert_allclose(actual_gradient, gradient, **GRADIENT_ROUNDING)


def test_scores_of_the_python_api_equal_transformers_with_padding(base, oracle, batches, adapters):
    batch, method = batches["classes"], METHODS["classes"]
    mine = moe_jax.load_base(base[0])
    labels = ClassificationConfig(labels=tuple(method["classification"]["labels"]))
    lora = moe_jax.LoraConfig(rank=4, alpha=8.0, target_modules=TARGETS, classification=labels)
    model = moe_jax.AdaptedModel(mine, {"x": lora})
    untrained = np.asarray(model(batch.tokens, "x", batch.segment_ids))
    model.adapters["x"] = adapters["classes"]
    scores = np.asarray(model(batch.tokens, "x", batch.segment_ids))
    with torch.no_grad():
        tokens = torch.tensor(np.where(batch.segment_ids, batch.tokens, 0)).long()
        expected = oracle(tokens, attention_mask=(tokens != 0).long()).logits.numpy()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=FLOAT32_LOGITS)
    assert np.abs(scores - untrained).max() > 0.1
    # Other padding tokens, and more of them.
    other = np.pad(np.where(batch.segment_ids, batch.tokens, 7), ((0, 0), (0, 4)))
    more = np.pad(batch.segment_ids, ((0, 0), (0, 4)))
    np.testing.assert_allclose(model(other, "x", more), scores, **ROUNDING)


@pytest.mark.parametrize("name", ["words", "number"])
def test_training_together_in_micro_batches_equals_training_alone(
    name, base, batches, adapters, together
):
    actual, metrics = together
    alone, alone_metrics = one_step([name], base, batches, adapters)
    assert_equal(alone[name], actual[name])
    for metric in ("loss", "grad_norm", "target_tokens"):
        expected = metrics[f"{name}/{metric}"]
        np.testing.assert_allclose(alone_metrics[f"{name}/{metric}"], expected, rtol=1e-5)


def test_a_mesh_does_not_change_the_step(base, batches, adapters, together):
    """The rows of each adapter are spread over several shards."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    actual, metrics = one_step(METHODS, base, batches, adapters, mesh=mesh)
    assert_equal(actual, together[0])
    for name in METHODS:
        np.testing.assert_allclose(metrics[f"{name}/loss"], together[1][f"{name}/loss"], **ROUNDING)


def assert_equal(ours, theirs):
    def close(mine, other):
        atol = GRADIENT_OF_LARGEST * np.abs(other).max()
        np.testing.assert_allclose(mine, other, rtol=0, atol=atol)

    jax.tree.map(close, ours, theirs)
