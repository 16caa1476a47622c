"""MixLoRA and LoRA, whole model, against a plain loop over experts in PyTorch."""

import jax
import numpy as np
import pytest
import tiny_program
import torch
import torch_oracle
from hf_models import save_tiny_llama
from tolerances import GRADIENT_ROUNDING
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params

COEFFICIENTS = {"load_balance": 0.05, "importance_cv": 0.03, "router_z": 0.02}

CASES = {
    "mixlora": {"expert_lora": {"rank": 3, "alpha": 5.0}},
    "top_1_of_6": {"num_experts": 6, "router": {"name": "top_k", "top_k": 1}},
    "top_3": {"router": {"name": "top_k", "top_k": 3}},
    "no_down_proj": {"target_modules": ("q_proj", "v_proj", "gate_proj", "up_proj")},
    "down_proj_only": {"target_modules": ("o_proj", "down_proj")},
}


def _setup(tmp_path, scope="per_layer", **overrides):
    reference = save_tiny_llama(tmp_path)
    config = read_model_config(tmp_path)
    losses = {n: {"coefficient": c, "scope": scope} for n, c in COEFFICIENTS.items()}
    method = {**tiny_program.MIXLORA, "losses": losses, **overrides}
    program = tiny_program.program({"default": method}, config=config)
    params = load_base_params(tmp_path, config, "float32")
    state = program.init_state(params).replace(adapters=tiny_program.random_adapters(program))
    batch = tiny_program.random_batch(8)
    tree = jax.tree.map(np.asarray, state.adapters["default"])
    oracle = torch_oracle.attach(reference, tree, program.adapter_rows[0].method)
    return program, params, state, batch, tree, oracle


def _oracle_losses(oracle, batch, scope):
    """All losses of the oracle, real tokens only, written out layer by layer."""
    logits = oracle(
        torch.tensor(batch.tokens), attention_mask=torch.tensor(batch.segment_ids)
    ).logits
    real = torch.tensor(batch.segment_ids.astype(bool))
    layers = [layer.mlp for layer in oracle.model.layers]
    router_logits = [mlp.logits[real] for mlp in layers]
    num_experts, top_k = layers[0].router.shape[1], layers[0].top_k

    importance = [
        torch.stack([(m.weights * (m.chosen == e))[real].sum() for e in range(num_experts)])
        for m in layers
    ]
    groups = [[i] for i in range(len(layers))] if scope == "per_layer" else [range(len(layers))]
    losses = dict.fromkeys(COEFFICIENTS, 0.0)
    for group in groups:
        gathered = tuple(router_logits[i] for i in group)
        total = sum(importance[i] for i in group)
        z = torch.cat([torch.logsumexp(rows, dim=-1) ** 2 for rows in gathered])
        balance = load_balancing_loss_func(gathered, num_experts, top_k)
        losses["load_balance"] += balance / len(groups)
        losses["importance_cv"] += total.var(correction=0) / total.mean() ** 2 / len(groups)
        losses["router_z"] += z.mean() / len(groups)
    losses["loss"] = torch_oracle.completion_loss(logits, batch.tokens, batch.loss_mask)
    return losses


@pytest.mark.parametrize("case", CASES)
def test_forward_losses_and_all_gradients_equal_a_loop_over_experts(tmp_path, case):
    program, params, state, batch, tree, oracle = _setup(tmp_path, **CASES[case])
    expected = _oracle_losses(oracle, batch, "per_layer")
    total = expected["loss"] + sum(c * expected[name] for name, c in COEFFICIENTS.items())
    total.backward()

    loss_sum, count = program.eval_step(
        "default", state.adapters, params, program.put_eval_batch(batch)
    )
    before = jax.tree.map(np.asarray, state.adapters["default"])
    state, metrics = program.train_step(state, params, program.put_train_batch(batch))

    assert float(count) == batch.loss_mask[:, 1:].sum()
    np.testing.assert_allclose(loss_sum / count, expected["loss"].item(), rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(
            metrics[f"default/{name}"], value.item(), rtol=1e-5, err_msg=name
        )
    # Plain SGD with learning rate 1: what a leaf lost is its gradient.
    gradients = jax.tree.map(lambda old, new: old - new, before, state.adapters["default"])
    theirs = torch_oracle.gradients(oracle, tree)
    assert jax.tree.structure(gradients) == jax.tree.structure(theirs)
    jax.tree_util.tree_map_with_path(
        lambda path, ours, their: np.testing.assert_allclose(
            ours, their, **GRADIENT_ROUNDING, err_msg=jax.tree_util.keystr(path)
        ),
        gradients,
        theirs,
    )


def test_pooled_scope_equals_transformers_over_all_layers(tmp_path):
    program, params, state, batch, _, oracle = _setup(tmp_path, scope="pooled")
    expected = _oracle_losses(oracle, batch, "pooled")
    _, metrics = program.train_step(state, params, program.put_train_batch(batch))
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"default/{name}"], value.item(), rtol=1e-5)


def test_plain_lora_equals_a_loop(tmp_path):
    reference = save_tiny_llama(tmp_path)
    config = read_model_config(tmp_path)
    program = tiny_program.program({"default": tiny_program.LORA}, config=config)
    params = load_base_params(tmp_path, config, "float32")
    state = program.init_state(params).replace(adapters=tiny_program.random_adapters(program))
    batch = tiny_program.random_batch(8)
    tree = jax.tree.map(np.asarray, state.adapters["default"])
    oracle = torch_oracle.attach(reference, tree, program.adapter_rows[0].method)
    logits = oracle(torch.tensor(batch.tokens)).logits
    loss = torch_oracle.completion_loss(logits, batch.tokens, batch.loss_mask)
    loss.backward()

    state, metrics = program.train_step(state, params, program.put_train_batch(batch))

    np.testing.assert_allclose(metrics["default/loss"], loss.item(), rtol=1e-5)
    jax.tree.map(
        lambda old, new, their: np.testing.assert_allclose(old - new, their, **GRADIENT_ROUNDING),
        tree,
        state.adapters["default"],
        torch_oracle.gradients(oracle, tree),
    )


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_step_0_is_the_base_and_after_one_step_every_leaf_learns(remat, init):
    method = {**tiny_program.MIXLORA, "init": init}
    adam = {"name": "adamw", "learning_rate": 1e-2}
    program = tiny_program.program({"a": method}, optimizer=adam, compute={"remat": remat})
    params = tiny_program.random_params(program)
    state = program.init_state(params)
    batch = tiny_program.random_batch(8)
    evaluated = program.put_eval_batch(batch)
    fresh = program.eval_step("a", state.adapters, params, evaluated)
    base = program.eval_step(None, {}, params, evaluated)
    # Not bit for bit: two slots' weights add up to one only to rounding.
    np.testing.assert_allclose(fresh[0], base[0], rtol=1e-6)

    state, _ = program.train_step(state, params, program.put_train_batch(batch))
    moved = program.eval_step("a", state.adapters, params, evaluated)
    assert abs(float(moved[0]) / float(base[0]) - 1) > 1e-3
    before = jax.tree.map(np.asarray, state.adapters)
    state, _ = program.train_step(state, params, program.put_train_batch(batch))
    for layer in range(program.model.config.num_layers):
        jax.tree_util.tree_map_with_path(
            lambda path, old, new, layer=layer: np.testing.assert_array_less(
                0.0, np.abs(old - new)[layer].max(), err_msg=jax.tree_util.keystr(path)
            ),
            before,
            state.adapters,
        )


def test_an_adapter_changes_its_own_rows_only():
    program = tiny_program.program({"x": tiny_program.MIXLORA, "y": tiny_program.LORA})
    alone = tiny_program.program({"y": tiny_program.LORA})
    params = tiny_program.random_params(program)
    adapters = tiny_program.random_adapters(program)
    batch = tiny_program.random_batch(16)
    both = program.init_state(params).replace(adapters=adapters)
    kept = jax.tree.map(np.asarray, adapters["y"])
    _, metrics = program.train_step(both, params, program.put_train_batch(batch))

    single = alone.init_state(params).replace(adapters={"y": jax.tree.map(jax.numpy.asarray, kept)})
    last = type(batch)(*(array[8:] for array in batch))
    _, own = alone.train_step(single, params, alone.put_train_batch(last))
    np.testing.assert_allclose(metrics["y/loss"], own["y/loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["y/grad_norm"], own["y/grad_norm"], rtol=1e-5)
