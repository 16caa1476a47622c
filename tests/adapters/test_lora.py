"""LoRA against peft, and its dropout in both directions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny_program
import torch
from hf_models import save_tiny_llama
from jax.test_util import check_grads
from tolerances import FLOAT32_LOGITS, FLOAT64_ROUNDING

from moe_jax.adapters.lora.lora import Lora, LoraConfig
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import FrozenProjection
from moe_jax.adapters.mixlora import ExpertLoraConfig, MixLoraConfig, MixLoraFFN
from moe_jax.adapters.routing import TopKRouter
from moe_jax.adapters.rows import AdapterRows, divide_rows
from moe_jax.adapters.tree import to_collection
from moe_jax.config.model import ComputeConfig
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params
from moe_jax.models.causal_lm import LlamaForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RNG = np.random.default_rng(0)


def _from_peft(model, targets):
    """peft's pairs, arranged like our tree: `weight` [out, in] becomes [L, in, out]."""
    tree = {}
    for name in targets:
        block = "self_attn" if name in ATTENTION else "mlp"
        layers = [getattr(getattr(layer, block), name) for layer in model.model.layers]
        tree.setdefault(block, {})[name] = {
            key: jnp.stack([getattr(m, key)["default"].weight.detach().numpy().T for m in layers])
            for key in ("lora_A", "lora_B")
        }
    return {"layers": tree}


@pytest.mark.parametrize("targets", [tiny_program.ALL_TARGETS, ("q_proj", "v_proj")])
def test_logits_equal_peft_and_differ_from_the_base(tmp_path, targets):
    base = save_tiny_llama(tmp_path)
    tokens = RNG.integers(0, 96, (2, 12))
    config = read_model_config(tmp_path)
    params = load_base_params(tmp_path, config, "float32")
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), lora_dropout=0.1)
    ).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at first
                parameter.normal_(std=0.3)
        expected = adapted(torch.tensor(tokens)).logits.numpy()
        with adapted.disable_adapter():
            frozen = adapted(torch.tensor(tokens)).logits.numpy()

    method = LoraConfig(rank=3, alpha=5.0, target_modules=targets, dropout=0.1)
    adapter_rows = (AdapterRows("default", method, 0, 2),)
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"), adapter_rows)
    adapters = {"default": _from_peft(base, targets)}
    variables = {"params": params, "adapters": to_collection(adapters)}
    logits = jax.jit(lambda: model.apply(variables, tokens))()

    np.testing.assert_allclose(logits, expected, rtol=0, atol=FLOAT32_LOGITS)
    assert np.abs(logits - frozen).max() > 0.1


def _apply(config, adapters, x, product, key=None):
    """LoRA of one projection, on a frozen product of `x`; with dropout if a key is given."""
    context = tiny_program.adapter_context(np.ones(x.shape[:-1], bool), dropout_key=key)
    frozen = FrozenProjection(product, jnp.zeros((x.shape[-1], product.shape[-1])))
    return Lora(config, ("embed", "heads")).apply(
        {"adapters": adapters},
        x,
        frozen,
        context,
        deterministic=key is None,
    )


def _dropout_mask(rate, shape, key):
    """Dropout of an input of ones, read off the delta of a pair of identities with scale one."""
    width = shape[-1]
    config = LowRankConfig(rank=width, alpha=float(width), dropout=rate)
    eye = {"lora_A": jnp.eye(width), "lora_B": jnp.eye(width)}
    return np.asarray(_apply(config, eye, jnp.ones(shape), jnp.zeros(shape), key))


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_drops_its_share_and_scales_the_rest(rate):
    mask = _dropout_mask(rate, (20, 20, 100), jax.random.key(0))
    kept = mask != 0
    # A binomial share of 40 000: four standard deviations.
    assert abs(1 - kept.mean() - rate) < 4 * (rate * (1 - rate) / mask.size) ** 0.5
    np.testing.assert_allclose(mask[kept], 1 / (1 - rate), rtol=1e-6)
    # Positions and features draw on their own: shares of 100 features and of 400 positions spread
    # like binomial ones.
    dropped = 1.0 - kept
    for axes, count in (((2,), 100), ((0, 1), 400)):
        spread = (rate * (1 - rate) / count) ** 0.5
        np.testing.assert_allclose(dropped.mean(axis=axes).std(), spread, rtol=0.3)
    assert (mask != _dropout_mask(rate, (20, 20, 100), jax.random.key(1))).any()


def test_the_gradient_sees_the_mask_of_the_forward_pass():
    # y = y0 + s d(x) A B with s = 2: the gradient of A is s d(x)^T g B^T, that of B s (d(x) A)^T g.
    rate, key, rank, width, out = 0.4, jax.random.key(3), 3, 6, 5
    draw = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
    x, y, g = draw(2, 7, width), draw(2, 7, out), draw(2, 7, out)
    lora_a, lora_b = draw(width, rank), draw(rank, out)
    dropped = (x * _dropout_mask(rate, x.shape, key)).reshape(-1, width)
    flat = g.reshape(-1, out)
    config = LowRankConfig(rank=rank, alpha=2.0 * rank, dropout=rate)

    def total(adapters):
        output = _apply(config, adapters, x, y, key)
        return jnp.sum(output * g), output

    adapters = {"lora_A": lora_a, "lora_B": lora_b}
    (_, output), gradient = jax.value_and_grad(total, has_aux=True)(adapters)

    exact = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(
        output.reshape(-1, out), y.reshape(-1, out) + 2 * dropped @ lora_a @ lora_b, **exact
    )
    np.testing.assert_allclose(gradient["lora_A"], 2 * dropped.T @ flat @ lora_b.T, **exact)
    np.testing.assert_allclose(gradient["lora_B"], 2 * (dropped @ lora_a).T @ flat, **exact)
    undropped = 2 * x.reshape(-1, width).T @ flat @ lora_b.T
    assert np.abs(gradient["lora_A"] - undropped).max() > 0.1


def test_projections_of_one_input_share_their_dropout():
    config = tiny_program.model_config()
    method = LoraConfig(rank=2, alpha=4.0, target_modules=tiny_program.ALL_TARGETS, dropout=0.1)
    rows = divide_rows({"one": method, "two": method}, {"one": 1, "two": 1})
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"), rows, deterministic=False)
    keys = {}  # by adapter and projection

    def watch(call, args, kwargs, context):
        if isinstance(context.module, Lora):
            key = args[2].dropout_key
            keys.setdefault(context.module.name, {})[context.module.parent.name] = key
        return call(*args, **kwargs)

    streams = {name: jax.random.key(0) for name in ("params", "adapters", "dropout")}
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda: model.init(streams, jnp.zeros((2, 4), jnp.int32)))
    assert len(keys) == 2
    for own in keys.values():
        assert own.keys() == set(tiny_program.ALL_TARGETS)
        same = [{a for a in own if own[a] is own[b]} for b in ("q_proj", "o_proj", "up_proj")]
        assert same == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}]
    one, two = keys.values()
    assert one["q_proj"] is not two["q_proj"]


def test_no_dropout_when_deterministic():
    x, y = jnp.asarray(RNG.standard_normal((2, 3, 4))), jnp.zeros((2, 3, 4))
    eye = {"lora_A": jnp.eye(4), "lora_B": jnp.eye(4)}
    # Without a key: it would raise if it drew.
    output = _apply(LowRankConfig(rank=4, alpha=4.0, dropout=0.5), eye, x, y)
    np.testing.assert_allclose(output, x, rtol=1e-6)


class TestExpertDropout:
    """Dropout of MixLoRA's experts."""

    D, F, E, R = 6, 8, 3, 2

    def _apply(self, adapters, x, gate, up, rate, key):
        method = MixLoraConfig(
            rank=self.R,
            alpha=4.0,
            target_modules=("gate_proj", "up_proj", "down_proj"),
            num_experts=self.E,
            router=TopKRouter(top_k=2),
            expert_lora=ExpertLoraConfig(dropout=rate),
        )
        update, _ = MixLoraFFN(method).apply(
            {"adapters": adapters},
            x,
            tiny_program.frozen_ffn(gate, up, self.D),
            tiny_program.adapter_context(np.ones(x.shape[:2], bool), dropout_key=key),
            deterministic=key is None,
            rngs={} if key is None else {"dropout": key},
            mutable=["router"],
        )
        return update

    def _inputs(self):
        draw = lambda *shape: jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))
        adapters = {
            name: {"lora_A": draw(i, self.E, self.R), "lora_B": draw(self.E, self.R, o)}
            for name, i, o in (
                ("gate_proj", self.D, self.F),
                ("up_proj", self.D, self.F),
                ("down_proj", self.F, self.D),
            )
        }
        adapters["router"] = {"kernel": draw(self.D, self.E).astype(jnp.float32)}
        return adapters, (draw(2, 3, self.D), draw(2, 3, self.F), draw(2, 3, self.F + 1)[..., :-1])

    def test_gradients_equal_finite_differences(self):
        # The masks are fixed by the key; the router does not depend on what is varied.
        with jax.enable_x64():
            adapters, inputs = self._inputs()
            router = adapters.pop("router")
            call = lambda pairs: self._apply(
                {**pairs, "router": router}, *inputs, 0.4, jax.random.key(0)
            )
            check_grads(jax.jit(call), (adapters,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)

    def test_every_draw_differs_and_evaluation_draws_none(self):
        with jax.enable_x64():
            adapters, inputs = self._inputs()
            run = jax.jit(
                lambda rate, key: self._apply(adapters, *inputs, rate, key), static_argnums=0
            )
            keys = [jax.random.key(0), jax.random.key(0), jax.random.key(1)]
            first, again, other = (run(0.4, key) for key in keys)
            evaluated, without = run(0.4, None), run(0.0, keys[0])
        jax.tree.map(np.testing.assert_array_equal, first, again)
        for ours, theirs in zip(first, other, strict=True):
            assert np.abs(ours - theirs).max() > 1e-2
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **FLOAT64_ROUNDING), evaluated, without
        )
