"""Token losses of the whole model, computed without its logits."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny_program
from tolerances import FEW_OPERATIONS, GRADIENT_ROUNDING, ROUNDING

from moe_jax.config.model import ComputeConfig
from moe_jax.layers import vocab_loss
from moe_jax.layers.vocab_loss import chunk_positions
from moe_jax.models import causal_lm
from moe_jax.models.causal_lm import LlamaForCausalLM

SMALL = {"num_layers": 1, "hidden_size": 16, "intermediate_size": 24}
HEADS = {"num_heads": 2, "num_kv_heads": 2}


def _logits_and_losses(model, tokens, targets):
    hidden = model.hidden_states(tokens)
    rows, length = tokens.shape
    places = jnp.broadcast_to(jnp.arange(length)[None], (rows, length))
    counts = jnp.full(rows, length)
    scores, _ = model.target_scores(hidden, places, targets, counts)
    return model.logits(hidden), model.token_losses(hidden, targets), scores


def test_a_tied_head_with_a_cap(monkeypatch):
    """Losses and scores of a scaled Gemma 2 head, against those of the model's logits."""
    monkeypatch.setattr(vocab_loss, "CHUNK_BYTES", 0)
    monkeypatch.setattr(vocab_loss, "MIN_CHUNK_TOKENS", 6)
    ends = {"tie_word_embeddings": True, "final_logit_softcapping": 0.5, "logit_scale": 1.5}
    config = tiny_program.model_config(**SMALL, **HEADS, **ends)
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"))
    tokens, targets = np.random.default_rng(0).integers(0, config.vocab_size, (2, 2, 8))
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    # The embedding alone decides how large logits are: large enough for the cap to matter.
    variables = jax.tree.map(lambda leaf: 5.0 * leaf, variables)
    scores, losses, log_probs = jax.jit(
        lambda: model.apply(variables, tokens, targets, method=_logits_and_losses)
    )()
    scores = np.asarray(scores, np.float64)
    assert 0.4 < np.abs(scores).max() <= 0.5
    probs = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probs, targets[..., None], axis=-1)[..., 0])
    assert chunk_positions(2, 8, config.vocab_size) == 3
    np.testing.assert_allclose(losses, expected, **ROUNDING)
    np.testing.assert_allclose(log_probs, -expected, **ROUNDING)


def test_a_training_step_without_the_logits(monkeypatch):
    """Equal loss and gradients, in less memory by at least the logits."""
    rows, length, vocabulary = 8, 250, 8192
    config = tiny_program.model_config(
        **SMALL, **HEADS, vocab_size=vocabulary, max_position_embeddings=256
    )
    all_logits = 4 * rows * length * vocabulary
    monkeypatch.setattr(vocab_loss, "CHUNK_BYTES", all_logits // 4)
    assert chunk_positions(rows, length, vocabulary) == 63  # 4 chunks of which the last overlaps

    def step():
        program = tiny_program.program({"a": tiny_program.LORA}, rows=rows, config=config)
        compiled = program.compiled_train_step(length)
        params, adapters = (
            tiny_program.random_params(program),
            tiny_program.random_adapters(program),
        )
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), program.abstract_state)
        batch = tiny_program.random_batch(rows, length, vocabulary)
        before = jax.tree.map(np.array, adapters)
        state, metrics = program.train_step(
            state.replace(adapters=adapters), params, program.put_train_batch(batch)
        )
        lost = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.adapters)
        text, memory = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
        return lost, float(metrics["a/loss"]), text, memory

    gradients, loss, text, memory = step()

    def plain(x, kernel, targets, *, tied, cap, new):
        assert new is None
        scores = causal_lm.logits(x, kernel, tied=tied, cap=cap)
        chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(scores, axis=-1) - chosen

    monkeypatch.setattr(causal_lm, "token_losses", plain)
    expected, expected_loss, plain_text, plain_memory = step()
    np.testing.assert_allclose(loss, expected_loss, **FEW_OPERATIONS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **GRADIENT_ROUNDING), gradients, expected
    )
    assert plain_memory - memory >= all_logits
    whole = f"f32[{rows},{length},{vocabulary}]", f"f32[{rows * length},{vocabulary}]"
    assert any(shape in plain_text for shape in whole)
    assert not any(shape in text for shape in whole)
