"""rsLoRA and DoRA in a whole Llama: against peft, and against figures recorded from MoE-PEFT."""

import itertools

import jax
import jax.numpy as jnp
import moe_peft_oracle
import numpy as np
import peft
import pytest
import tiny_program
import torch
from hf_models import save_tiny_llama
from tolerances import FLOAT32_LOGITS, GRADIENT_ROUNDING, ROUNDING

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.rows import AdapterRows
from moe_jax.adapters.tree import to_collection
from moe_jax.config.model import ComputeConfig
from moe_jax.data.batch import Batch
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params
from moe_jax.models.causal_lm import LlamaForCausalLM

TARGETS = tiny_program.ALL_TARGETS
LEAVES = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_magnitude_vector": "magnitude"}
RNG = np.random.default_rng(0)


def _run(folder, method, rows):
    """`f(adapter, tokens, cotangent)`: logits, and the gradient of their product."""
    config = read_model_config(folder)
    params = load_base_params(folder, config, "float32")
    adapter_rows = (AdapterRows("default", method, 0, rows),)
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"), adapter_rows)

    def product(adapter, params, tokens, cotangent):
        variables = {"params": params, "adapters": to_collection({"default": adapter})}
        logits = model.apply(variables, tokens)
        return jnp.sum(logits * cotangent), logits

    @jax.jit
    def run(adapter, params, tokens, cotangent):
        grad = jax.grad(product, has_aux=True)(adapter, params, tokens, cotangent)
        return grad[1], grad[0]

    return lambda adapter, tokens, cotangent: run(adapter, params, tokens, cotangent)


def _peft_leaves(model):
    """{(block, projection, leaf): one parameter a layer}."""
    found = {}
    for layer in model.model.layers:
        for block in ("self_attn", "mlp"):
            for name, module in getattr(layer, block).named_children():
                for theirs, ours in LEAVES.items():
                    if "default" in getattr(module, theirs, {}):
                        leaf = getattr(module, theirs)["default"].weight
                        found.setdefault((block, name, ours), []).append(leaf)
    return found


def _tree(leaves, of):
    """Our tree of `of` each parameter; `weight` [out, in] becomes [L, in, out]."""
    tree = {}
    for (block, name, leaf), parameters in leaves.items():
        stacked = np.stack([of(parameter).numpy().T for parameter in parameters])
        tree.setdefault(block, {}).setdefault(name, {})[leaf] = stacked.astype(np.float32)
    return {"layers": tree}


def _assert_trees(ours, theirs, tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, **tolerance, err_msg=jax.tree_util.keystr(path)
        ),
        ours,
        theirs,
    )


@pytest.mark.parametrize(
    "kind",
    [{"rslora": True}, {"dora": True}, {"rslora": True, "dora": True}],
    ids="+".join,
)
def test_logits_gradients_and_a_step_equal_peft(tmp_path, kind):
    # Six heads share two keys and values; all attention projections have a bias, which neither
    # A and B nor the gains may touch.
    base = save_tiny_llama(tmp_path, attention_bias=True)
    tokens = RNG.integers(0, 96, (2, 12))
    cotangent = RNG.standard_normal((2, 12, 96)) / 2304
    frozen = base(torch.tensor(tokens)).logits.detach().numpy()
    theirs = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=TARGETS, **{f"use_{name}": True for name in kind}
    )
    adapted = peft.get_peft_model(base, theirs).double().eval()
    leaves = _peft_leaves(base)
    with torch.no_grad():
        for (*_, leaf), parameters in leaves.items():
            for parameter in parameters:
                if leaf == "lora_B":  # zero at first; now the pairs are as large as the kernels
                    parameter.normal_(std=0.3)
                if leaf == "magnitude":  # the kernel's own norms
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))

    def reference():
        adapted.zero_grad()
        logits = adapted(torch.tensor(tokens)).logits
        (logits * torch.tensor(cotangent)).sum().backward()
        return logits.detach().numpy(), _tree(leaves, lambda parameter: parameter.grad)

    run = _run(tmp_path, LoraConfig(rank=3, alpha=5.0, target_modules=TARGETS, **kind), 2)
    ours = _tree(leaves, torch.Tensor.detach)
    assert ("magnitude" in ours["layers"]["mlp"]["up_proj"]) == kind.get("dora", False)
    moved = []
    for _ in range(2):
        expected, expected_gradient = reference()
        logits, gradient = run(ours, tokens, cotangent)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=FLOAT32_LOGITS)
        _assert_trees(gradient, expected_gradient, GRADIENT_ROUNDING)
        moved.append(logits)
        # One step down the gradient for both, and again.
        ours = jax.tree.map(lambda leaf, grad: leaf - grad, ours, gradient)
        torch.optim.SGD(list(itertools.chain(*leaves.values())), lr=1.0).step()
        _assert_trees(ours, _tree(leaves, torch.Tensor.detach), GRADIENT_ROUNDING)
    assert np.abs(moved[0] - frozen).max() > 0.1
    assert np.abs(moved[1] - moved[0]).max() > 0.1
    # And it is not what plain LoRA makes of the same A and B.
    variant = adapted(torch.tensor(tokens)).logits.detach().numpy()
    for module in base.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.scaling["default"] = 5 / 3
            module.lora_variant.pop("default", None)
    plain = adapted(torch.tensor(tokens)).logits.detach().numpy()
    assert np.abs(variant - plain).max() > 0.1


def _recorded(name):
    """A recorded case, and our function of its batches."""
    case = moe_peft_oracle.load_case(name)
    method = LoraConfig(rank=4, alpha=8.0, target_modules=TARGETS, dora=name == "dora")
    return case, _run(moe_peft_oracle.BASE, method, 4)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_logits_and_gradients_equal_recorded_figures(name):
    case, run = _recorded(name)
    adapter = moe_peft_oracle.as_tree(case.weights)
    tokens = case["full/tokens"]

    # The gradient of the recorded loss, the mean cross-entropy of each next token.
    logits, _ = run(adapter, tokens, np.zeros_like(case["full/logits"]))
    shift = np.asarray(jax.nn.softmax(logits[:, :-1])) - np.eye(256)[tokens[:, 1:]]
    cotangent = np.pad(shift / tokens[:, 1:].size, ((0, 0), (0, 1), (0, 0)))
    _, gradient = run(adapter, tokens, cotangent.astype(np.float32))
    np.testing.assert_allclose(logits, case["full/logits"], rtol=0, atol=FLOAT32_LOGITS)
    _assert_trees(gradient, moe_peft_oracle.as_tree(case.group("full/grad")), GRADIENT_ROUNDING)

    # Causality hides the padding on the right from the tokens before it.
    padded, _ = run(adapter, case["right/tokens"], cotangent.astype(np.float32))
    real = case["right/mask"].astype(bool)
    np.testing.assert_allclose(
        padded[real], case["right/logits"][real], rtol=0, atol=FLOAT32_LOGITS
    )


def test_a_recorded_trajectory_is_followed_to_its_weights():
    case = moe_peft_oracle.load_case("lora")
    adam = {
        "name": "adamw",
        "learning_rate": 1e-3,
        "schedule": {"kind": "constant"},
        "weight_decay": 0.01,
        "clip_norm": None,
    }
    config = read_model_config(moe_peft_oracle.BASE)
    program = tiny_program.program(
        {"default": tiny_program.LORA}, rows=4, optimizer=adam, config=config
    )
    params = load_base_params(moe_peft_oracle.BASE, config, "float32")
    adapters = {"default": moe_peft_oracle.as_tree(case.weights)}
    state = program.init_state(params).replace(adapters=jax.tree.map(jnp.asarray, adapters))
    real = case["right/mask"].astype(bool)
    ones = real.astype(np.int32)
    positions = np.where(real, np.arange(24), 0).astype(np.int32)
    zeros = np.zeros_like(ones)
    floats = zeros.astype(np.float32)
    batch = program.put_train_batch(
        Batch(case["right/tokens"], real, ones, positions, zeros, floats, floats)
    )
    for loss in case["traj_loss"]:
        state, metrics = program.train_step(state, params, batch)
        np.testing.assert_allclose(metrics["default/loss"], loss, **ROUNDING)
    for block, sites in moe_peft_oracle.as_tree(case.group("traj_w"))["layers"].items():
        for name, leaves in sites.items():
            for leaf, expected in leaves.items():
                ours = state.adapters["default"]["layers"][block][name][leaf]
                np.testing.assert_allclose(ours, expected, **GRADIENT_ROUNDING)
