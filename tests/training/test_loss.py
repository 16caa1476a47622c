"""Cross-entropy over completions equals that of PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny_program
import torch
from tolerances import ROUNDING

from moe_jax.adapters import LoraConfig
from moe_jax.adapters.rows import AdapterRows
from moe_jax.data.batch import Batch
from moe_jax.training.step.loss import first_targets, row_losses, target_counts

RNG = np.random.default_rng(0)


def test_equals_pytorch_with_ignored_tokens():
    batch = tiny_program.random_batch(5)
    logits = RNG.normal(0, 3, (5, 16, 96)).astype(np.float32)
    labels = np.where(batch.loss_mask, batch.tokens, -100)

    losses, counts = jax.jit(row_losses)(logits, batch)

    # PyTorch ignores -100; the logits of position s are compared with the token at s + 1.
    shifted = torch.tensor(logits[:, :-1]).transpose(1, 2), torch.tensor(labels[:, 1:]).long()
    expected = torch.nn.functional.cross_entropy(*shifted, ignore_index=-100, reduction="none")
    np.testing.assert_allclose(losses, expected.sum(dim=1), **ROUNDING)
    np.testing.assert_array_equal(counts, (labels[:, 1:] != -100).sum(axis=1))
    mean = torch.nn.functional.cross_entropy(*shifted, ignore_index=-100)
    np.testing.assert_allclose(losses.sum() / counts.sum(), mean, **ROUNDING)


def _row(tokens, loss_mask):
    tokens, mask = np.array([tokens]), np.array([loss_mask], bool)
    positions = np.arange(tokens.size)[None]
    zeros = np.zeros_like(tokens)
    return Batch(tokens, mask, np.ones_like(tokens), positions, *[zeros] * 3)


def test_by_hand():
    # Vocabulary of two. Position 0 predicts token 1 with odds 3:1, position 1 token 0 with 1:1;
    # the last position predicts nothing, and the token at 1 belongs to the prompt.
    logits = np.log([[[1.0, 3.0], [1.0, 1.0], [1.0, 99.0]]]).astype(np.float32)
    losses, counts = row_losses(logits, _row([0, 1, 0], [False, True, True]))
    np.testing.assert_allclose(losses, [np.log(4 / 3) + np.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(counts, [2])
    losses, counts = row_losses(logits, _row([0, 1, 0], [False, False, True]))
    np.testing.assert_allclose(losses, [np.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(counts, [1])


def test_the_first_token_is_no_target():
    logits = RNG.normal(size=(1, 3, 2)).astype(np.float32)
    for mask in ([True, False, False], [False, False, False]):
        losses, counts = row_losses(logits, _row([1, 0, 1], mask))
        np.testing.assert_array_equal(losses, [0.0])
        np.testing.assert_array_equal(counts, [0.0])


def test_only_completions_have_gradients():
    batch = tiny_program.random_batch(4)
    logits = RNG.normal(size=(4, 16, 96)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: row_losses(x, batch)[0].sum()))(logits)
    pulls = np.abs(gradient).max(axis=-1) > 0
    np.testing.assert_array_equal(pulls[:, :-1], batch.loss_mask[:, 1:])
    assert not pulls[:, -1].any()


def test_counts_of_targets():
    mask = np.array([[[True, True, False], [True, False, False]], [[False] * 3, [True] * 3]])
    rows = AdapterRows("a", LoraConfig(rank=1, alpha=1.0, target_modules=("q_proj",)), 0, 2)
    counts = target_counts(rows, jnp.asarray(mask))
    np.testing.assert_array_equal(counts, [[1, 0], [0, 2]])
    assert counts.dtype == np.float32


def test_first_targets_by_hand():
    mask = np.array([[0, 0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 0, 0, 1]], bool)
    # Two answers in the first row. In the second, the first token has none before it.
    expected = [[0, 0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0, 1]]
    np.testing.assert_array_equal(first_targets(mask), np.array(expected, bool))


def test_the_loss_of_the_first_tokens_of_answers():
    batch = tiny_program.random_batch(5)
    logits = RNG.normal(0, 3, (5, 16, 96)).astype(np.float32)
    first = batch._replace(loss_mask=first_targets(batch.loss_mask))
    losses, counts = row_losses(logits, first)
    for row in range(5):
        answer = [s for s in range(1, 16) if batch.loss_mask[row, s]]
        starts = [s for s in answer if not batch.loss_mask[row, s - 1]]
        rows = torch.tensor(logits[row, [s - 1 for s in starts]])
        targets = torch.tensor(batch.tokens[row, starts]).long()
        expected = torch.nn.functional.cross_entropy(rows, targets, reduction="sum")
        np.testing.assert_allclose(losses[row], expected, **ROUNDING)
        assert counts[row] == len(starts)
