"""DoRA against weights that are made whole, its numerical limits, and what it costs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny_program
import torch
from tolerances import FLOAT64_ROUNDING, ROUNDING

from moe_jax.adapters.lora.dora import apply_gains, column_norms
from moe_jax.adapters.lora.lora import Lora, LoraConfig
from moe_jax.adapters.lora.low_rank import ExpertLora, LowRankConfig
from moe_jax.adapters.method import AdapterContext, FrozenProjection
from moe_jax.models.adapted import untrained_adapter
from moe_jax.sharding.axes import EMBED, MLP

CONTEXT = AdapterContext(*[None] * len(AdapterContext._fields))


def _draw(*shape):
    """Normal numbers, the same for a shape whichever tests run."""
    return np.random.default_rng(shape).standard_normal(shape)


def _bfloat16(array):
    return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float64)


class TestColumnNorms:
    D, F, E, R, S = 320, 96, 4, 8, 2.0

    def _pairs(self):
        lora_a, lora_b = _draw(self.D, self.E, self.R), 0.5 * _draw(self.E, self.R, self.F)
        return lora_a.astype(np.float32), lora_b.astype(np.float32)

    def _of_whole_weights(self, kernel, lora_a, lora_b):
        weights = kernel + self.S * np.einsum("der,erf->edf", lora_a, lora_b.astype(np.float64))
        return np.linalg.norm(weights, axis=1)

    def test_equal_those_of_whole_weights(self):
        kernel, (lora_a, lora_b) = _draw(self.D, self.F).astype(np.float32), self._pairs()
        expected = self._of_whole_weights(kernel, lora_a, lora_b)
        frozen = np.linalg.norm(kernel, axis=0)
        assert np.median(expected / frozen) > 2  # the pairs are larger than the kernel
        norms = column_norms(kernel, lora_a, lora_b, self.S)
        np.testing.assert_allclose(norms, expected, rtol=1e-6)
        one = column_norms(kernel, lora_a[:, 2], lora_b[2], self.S)
        np.testing.assert_allclose(one, expected[2], rtol=1e-6)
        untrained = column_norms(kernel, lora_a, np.zeros_like(lora_b), self.S)
        np.testing.assert_allclose(untrained, [frozen] * self.E, rtol=1e-6)

    def test_a_bfloat16_kernel_is_taken_as_it_is(self):
        kernel, (lora_a, lora_b) = _bfloat16(_draw(self.D, self.F)), self._pairs()
        norms = column_norms(jnp.asarray(kernel, jnp.bfloat16), lora_a, lora_b, self.S)
        assert norms.dtype == jnp.float32
        rounded = self._of_whole_weights(kernel, _bfloat16(lora_a), lora_b)
        np.testing.assert_allclose(norms, rounded, rtol=1e-6)
        exact = self._of_whole_weights(kernel, lora_a, lora_b)
        np.testing.assert_allclose(norms, exact, rtol=5e-4)
        assert np.abs(norms / exact - 1).max() > 1e-5

    @pytest.mark.parametrize("shrunk", [10, 100, 1000])
    def test_a_nearly_undone_column_is_as_exact_as_documented(self, shrunk):
        lora_a, lora_b = self._pairs()
        lora_a, lora_b = lora_a[:, :1], lora_b[:1]
        whole = self.S * np.einsum("der,erf->df", lora_a, lora_b)
        kernel = (-whole / (1 - 1 / shrunk)).astype(np.float32)
        expected = self._of_whole_weights(kernel, lora_a, lora_b)
        norms = np.asarray(column_norms(kernel, lora_a, lora_b, self.S))
        np.testing.assert_allclose(expected, [np.linalg.norm(kernel, axis=0) / shrunk], rtol=1e-2)
        np.testing.assert_allclose(norms, expected, rtol=1e-6 * shrunk**2)

    def test_a_column_undone_or_empty_is_cut_off_at_the_rounding(self):
        lora_a, lora_b = self._pairs()
        kernel = -self.S * np.einsum("dr,rf->df", lora_a[:, 0], lora_b[0])
        norms = column_norms(kernel, lora_a[:, 0], lora_b[0], self.S)
        left = np.linalg.norm(kernel + self.S * lora_a[:, 0].astype(float) @ lora_b[0], axis=0)
        assert (left / norms).max() < 2
        empty = column_norms(np.zeros_like(kernel), lora_a[:, 0], np.zeros_like(lora_b[0]), 1.0)
        assert (empty > 0).all()
        np.testing.assert_array_equal(empty / empty, 1.0)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_no_array_of_a_weights_size_is_made(self, dtype):
        shapes = [(self.D, 704), (self.D, self.E, self.R), (self.E, self.R, 704)]
        kernel, lora_a, lora_b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
        kernel = kernel.update(dtype=dtype)
        lowered = jax.jit(column_norms, static_argnums=3).lower(kernel, lora_a, lora_b, 2.0)
        compiled = lowered.compile()
        # The codes' size, of A and of B, a few times over: an eighth of the kernel.
        temporary = compiled.memory_analysis().temp_size_in_bytes
        assert temporary < 4 * self.E * self.R * (self.D + 704) < kernel.size
        # ||W||^2 and the thin product; the gram of A and its product with B; and, element by
        # element of B, products and sums with the cross and the inner term. Converting a bfloat16
        # kernel counts once an element.
        flops = 2 * kernel.size * (self.E * self.R + 1)
        flops += 2 * self.E * self.R**2 * (self.D + 704) + 4 * lora_b.size
        flops += kernel.size if dtype == "bfloat16" else 0
        np.testing.assert_allclose(compiled.cost_analysis()["flops"], flops, rtol=0.01)


@pytest.mark.parametrize("experts", [None, 4])
def test_a_projection_costs_its_norms_and_its_gains_more_than_lora(experts):
    width, out, tokens, rank = 256, 512, 128, 8

    def flops(*, dora):
        config = LowRankConfig(rank=rank, alpha=16.0, dora=dora)
        axes = (EMBED, MLP)
        module = Lora(config, axes) if experts is None else ExpertLora(config, experts, axes)

        def adapted(adapter, x, kernel, combine):
            product = x @ kernel
            if experts is None:
                frozen = FrozenProjection(product, kernel)
                return module.apply(adapter, x, frozen, CONTEXT, deterministic=True)
            pairs = module.apply(adapter, kernel)
            return pairs.adapt(product, pairs.activations(x), combine)

        def step(adapter, x, kernel, combine, cotangent):
            y, pullback = jax.vjp(lambda *args: adapted(*args, kernel, combine), adapter, x)
            return y, pullback(cotangent)  # y, so that LoRA needs the frozen product too

        heads = () if experts is None else (experts,)
        shapes = {"lora_A": (width, *heads, rank), "lora_B": (*heads, rank, out)}
        if dora:
            shapes["magnitude"] = (*heads, out)
        arrays = [
            {"adapters": {name: jax.ShapeDtypeStruct(s, "float32") for name, s in shapes.items()}},
            *(
                jax.ShapeDtypeStruct(shape, "float32")
                for shape in ((1, tokens, width), (width, out), (1, tokens, experts or 1))
            ),
            jax.ShapeDtypeStruct((1, tokens, out), "float32"),
        ]
        return jax.jit(step).lower(*arrays).compile().cost_analysis()["flops"]

    pairs = experts or 1
    norms = 2 * width * out * (pairs * rank + 1) + 2 * pairs * rank**2 * (width + out)
    # Of a token and an output: the gain times the product, added to it, there and back; what the
    # gain's gradient sums; with experts also the token's own gain and the sum over tokens, by a
    # product with its E shares each.
    applied = tokens * out * (6 if experts is None else 7 + 4 * experts)
    # Of an element of B: four for the norms, and times its gain, there and back.
    scaled = 7 * pairs * rank * out
    more = flops(dora=True) - flops(dora=False)
    np.testing.assert_allclose(more, norms + applied + scaled, rtol=0.03)


@pytest.mark.parametrize("kind", [{"use_rslora": True}, {"use_dora": True}], ids="".join)
def test_a_projection_equals_pefts_layer(kind):
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 10, dtype=torch.float64)
    config = peft.LoraConfig(r=3, lora_alpha=5, **kind)
    theirs = peft.tuners.lora.Linear(base, "a", config, r=3, lora_alpha=5).double()
    leaves = {"lora_A": theirs.lora_A["a"].weight, "lora_B": theirs.lora_B["a"].weight}
    if "use_dora" in kind:
        leaves["magnitude"] = theirs.lora_magnitude_vector["a"].weight
        np.testing.assert_allclose(  # where the magnitude starts
            leaves["magnitude"].detach(), np.linalg.norm(base.weight.detach(), axis=1), rtol=1e-6
        )
    x = torch.tensor(_draw(2, 4, 6), requires_grad=True)
    weights = _draw(2, 4, 10)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.add_(torch.tensor(_draw(*leaf.shape)))
    expected = theirs(x)
    (expected * torch.tensor(weights)).sum().backward()

    method = LowRankConfig(rank=3, alpha=5.0, rslora="use_rslora" in kind, dora="use_dora" in kind)
    kernel, bias = base.weight.detach().numpy().T, base.bias.detach().numpy()

    def ours(adapter, x):
        frozen = FrozenProjection(x @ kernel, kernel)
        y = Lora(method, (EMBED, MLP)).apply(
            {"adapters": adapter}, x, frozen, CONTEXT, deterministic=True
        )
        y = y + bias[None, None]
        return jnp.sum(y * weights), y

    with jax.enable_x64():
        adapter = {name: jnp.asarray(leaf.detach().numpy().T) for name, leaf in leaves.items()}
        inputs = jnp.asarray(x.detach().numpy())
        (_, y), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(adapter, inputs)
    np.testing.assert_allclose(y, expected.detach(), **FLOAT64_ROUNDING)
    np.testing.assert_allclose(gradients[1], x.grad, **FLOAT64_ROUNDING)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(gradients[0][name], leaf.grad.T, **FLOAT64_ROUNDING)


class TestExperts:
    """The forms in which a projection's experts are applied, against whole weights of each."""

    D, F, E, R, S = 6, 10, 3, 2, 2.0

    def _whole(self, x, combine, kernel, lora_a, lora_b, magnitude):
        """`x W + sum_e c_e (x W_e - x W)` in PyTorch, expert after expert."""
        y = x @ kernel
        for expert in range(self.E):
            direction = kernel + self.S * lora_a[:, expert] @ lora_b[expert]
            norm = torch.linalg.norm(direction, dim=0).detach()
            weight = magnitude[expert] * direction / norm
            y = y + combine[..., expert, None] * (x @ weight - x @ kernel)
        return y

    def _apply(self, form, x, combine, kernel, lora_a, lora_b, magnitude):
        module = ExpertLora(
            LowRankConfig(rank=self.R, alpha=self.S * self.R, dora=True), self.E, (EMBED, MLP)
        )
        leaves = {"lora_A": lora_a, "lora_B": lora_b, "magnitude": magnitude}
        pairs, product = module.apply({"adapters": leaves}, kernel), x @ kernel
        if form == "adapt":
            return pairs.adapt(product, pairs.activations(x), combine)
        if form == "rescale and expand":
            z = pairs.activations(x) * combine[..., None]
            return pairs.rescale(product, combine) + pairs.expand(z)
        y, stacked = product, pairs.experts_first()
        for expert in range(self.E):
            pair = jax.tree.map(lambda leaf, e=expert: leaf[e], stacked)
            adapted = pair.adapt(product, pair.activations(x), jnp.ones_like(combine[..., :1]))
            y = y + combine[..., expert, None] * (adapted - product)
        return y

    @pytest.mark.parametrize("shares", ["one-hot", "soft", "zero"])
    @pytest.mark.parametrize("form", ["adapt", "rescale and expand", "each by itself"])
    def test_values_and_gradients_equal_whole_weights(self, form, shares):
        combine = {
            "one-hot": np.eye(self.E)[np.arange(10).reshape(2, 5) % self.E],
            "soft": np.asarray(jax.nn.softmax(_draw(2, 5, self.E)), float),
            "zero": np.zeros((2, 5, self.E)),
        }[shares]
        leaves = _draw(self.D, self.E, self.R), _draw(self.E, self.R, self.F), _draw(self.E, self.F)
        arrays = (_draw(2, 5, self.D), combine, _draw(self.D, self.F), *leaves)
        weights = _draw(2, 5, self.F)

        theirs = [torch.tensor(array, requires_grad=True) for array in arrays]
        theirs[2].requires_grad_(False)
        expected = self._whole(*theirs)
        (expected * torch.tensor(weights)).sum().backward()

        def ours(*arrays):
            y = self._apply(form, *arrays)
            return jnp.sum(y * weights), y

        with jax.enable_x64():
            differentiated = (0, 1, 3, 4, 5)
            (_, y), gradients = jax.value_and_grad(ours, differentiated, has_aux=True)(
                *map(jnp.asarray, arrays)
            )
        np.testing.assert_allclose(y, expected.detach(), **FLOAT64_ROUNDING)
        for index, gradient in zip(differentiated, gradients, strict=True):
            np.testing.assert_allclose(gradient, theirs[index].grad, **FLOAT64_ROUNDING)
        changed = np.abs(np.asarray(y) - arrays[0] @ arrays[2]).max()
        assert changed == 0 if shares == "zero" else changed > 0.1


def test_the_magnitude_starts_as_the_bases_norms_and_the_model_as_the_base():
    mixdora = {**tiny_program.MIXLORA, "dora": True}
    program = tiny_program.program({"a": mixdora}, config=tiny_program.model_config(num_layers=2))
    params = tiny_program.random_params(program)
    method = program.adapter_rows[0].method
    fresh = nn.meta.unbox(untrained_adapter(program.model, method, params, jax.random.key(0)))
    layers, adapters = params["layers"], fresh["layers"]
    query = np.linalg.norm(layers["self_attn"]["q_proj"]["kernel"], axis=1)
    np.testing.assert_allclose(adapters["self_attn"]["q_proj"]["magnitude"], query, **ROUNDING)
    for name in ("gate_proj", "up_proj", "down_proj"):
        norms = np.linalg.norm(layers["mlp"][name]["kernel"], axis=1)
        ours = adapters["mlp"]["moe"][name]["magnitude"]
        np.testing.assert_allclose(ours, np.repeat(norms[:, None], 4, axis=1), **ROUNDING)

    batch = program.put_eval_batch(tiny_program.random_batch(8))
    base = program.eval_step(None, {}, params, batch)
    adapted = program.eval_step("a", {"a": fresh}, params, batch)
    np.testing.assert_allclose(adapted[0], base[0], rtol=1e-6)
    longer = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 1.1 if "magnitude" in jax.tree_util.keystr(path) else leaf, fresh
    )
    moved = program.eval_step("a", {"a": longer}, params, batch)
    assert abs(float(moved[0]) / float(base[0]) - 1) > 1e-3


def test_the_magnitude_starts_without_the_pairs():
    # B is a constant of zeros in this program. XLA for CPUs (jaxlib 0.10.2) fuses products with
    # such constants into one that reads past their end: some columns began as NaN.
    kernel = _draw(352, 128).astype(np.float32)
    module = ExpertLora(LowRankConfig(rank=8, alpha=16.0, dora=True), 4, (MLP, EMBED))

    def init(kernel):
        return module.init({"adapters": jax.random.key(0)}, kernel)["adapters"]["magnitude"]

    compiled = jax.jit(init).lower(kernel).compile()
    assert "dot(" not in compiled.as_text()
    norms = np.broadcast_to(np.linalg.norm(kernel, axis=0), (4, 128))
    np.testing.assert_allclose(nn.meta.unbox(compiled(kernel)), norms, **ROUNDING)


def test_dropout_leaves_the_frozen_product_alone():
    x, kernel = _draw(2, 3, 4).astype(np.float32), _draw(4, 5).astype(np.float32)
    config = LoraConfig(rank=2, alpha=2.0, target_modules=("q_proj",), dropout=0.5, dora=True)
    adapter = {
        "lora_A": _draw(4, 2).astype(np.float32),
        "lora_B": np.zeros((2, 5), np.float32),
        "magnitude": 3.0 * np.linalg.norm(kernel, axis=0),
    }
    y = Lora(config, (EMBED, MLP)).apply(
        {"adapters": adapter},
        x,
        FrozenProjection(x @ kernel, kernel),
        CONTEXT._replace(dropout_key=jax.random.key(0)),
        deterministic=False,
    )
    np.testing.assert_allclose(y, 3.0 * (x @ kernel), rtol=1e-5)


def test_gains_near_one_keep_their_digits_in_bfloat16():
    # Between 1 + 2^-7 and 1 + 2^-6 bfloat16 has no number: as it is, the gain would be off by 2^-8.
    gains = jnp.asarray([1 + 0.75 / 64])
    assert abs(gains.astype(jnp.bfloat16).astype(jnp.float32) - gains) == 2**-8
    product = jnp.asarray(np.linspace(1, 2, 10_000)[:, None], jnp.bfloat16)
    applied = apply_gains(product, gains).astype(jnp.float32)
    ratio = jnp.sum(applied) / jnp.sum(product.astype(jnp.float32))
    np.testing.assert_allclose(ratio, gains[0], atol=2**-11)
