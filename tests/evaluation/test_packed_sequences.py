"""Rows of questions whose choices share their first tokens: arrays by hand, scores one by one."""

import jax
import numpy as np
import pytest
import torch
from hf_models import tiny_model
from tolerances import FLOAT32_LOGITS, ROUNDING

import moe_jax
from moe_jax.adapters.routing import SwitchRouter
from moe_jax.evaluation.packed_sequences import (
    PackedTrees,
    ScoredSequence,
    Tree,
    make_trees,
    pack_trees,
    sequence_batch,
)
from moe_jax.evaluation.scorer import Scorer
from moe_jax.layers.tokens import BRANCH
from moe_jax.loaded.inference_model import Adapter, build_model, load_params

VOCABULARY = 64


def continuation(context, targets):
    return ScoredSequence.continuation(context, targets)


def test_trees_share_the_tokens_in_front():
    question = [continuation([7, 8, 9], [1, 2]), continuation([7, 8, 9], [1, 3, 4])]
    alike = [continuation([7], [1]), continuation([7], [2]), continuation([7], [3])]
    #          7 8 9 1 and a 3; three targets at one position
    expected = [Tree(((0, 0), (0, 1)), 4, 5), Tree(((1, 0), (1, 1), (1, 2)), 1, 3)]
    assert make_trees([question, alike], longest=5) == expected
    # 7 8 9 1, and 7 8 9 1 3.
    apart = [Tree(((0, 1),), 5, 5), Tree(((0, 0),), 4, 4), expected[1]]
    assert make_trees([question, alike], longest=4) == apart
    assert {tree.members for tree in make_trees([alike], longest=0)} == {
        ((0, 0),),
        ((0, 1),),
        ((0, 2),),
    }


def test_arrays_of_a_batch():
    groups = [
        [continuation([7, 8, 9], [1, 2]), continuation([7, 8, 9], [5, 3, 4])],
        [continuation([6], [1])],
    ]
    trees = make_trees(groups, longest=32)
    batch, slots = sequence_batch(groups, PackedTrees(((trees[0], trees[1]), ()), 8))
    assert batch.tokens.tolist() == [[7, 8, 9, 1, 5, 3, 6, 0], [0] * 8]
    first, second = 1 + BRANCH, 1 + 2 * BRANCH
    assert batch.segment_ids.tolist()[0] == [1, 1, 1, first, second, second, 2, 0]
    assert batch.positions.tolist()[0] == [0, 1, 2, 3, 3, 4, 0, 0]
    # 1 after 9, 2 after 1; 5 after 9, 3 after 5, 4 after 3; 1 after 6.
    assert batch.targets.tolist()[0] == [1, 2, 5, 3, 4, 1, 0, 0]
    assert batch.places.tolist()[0] == [2, 3, 2, 4, 5, 6, 0, 0]
    assert batch.counts.tolist() == [6, 0]
    assert [(s.group, s.member, s.row, s.columns) for s in slots] == [
        (0, 0, 0, slice(0, 2)),
        (0, 1, 0, slice(2, 5)),
        (1, 0, 0, slice(5, 6)),
    ]


def test_rows_hold_what_fits():
    def trees(*sizes):
        return [Tree(((index, 0),), size, size) for index, size in enumerate(sizes)]

    def sizes(batches):
        rows = [[[tree.size for tree in row] for row in batch.rows] for batch in batches]
        return list(zip([batch.length for batch in batches], rows, strict=True))

    # The tree of 100 needs a row of 128; what fits beside it or into the other row goes there.
    assert sizes(pack_trees(trees(100, 60, 40, 30, 20, 10, 5), rows=2, row_length=64)) == [
        (128, [[100], [60, 40]]),
        (64, [[30, 20, 10], [5]]),
    ]
    # Fewer tokens than the rows of a batch hold make shorter rows.
    assert sizes(pack_trees(trees(30, 20, 10), rows=2, row_length=256)) == [
        (64, [[30, 20, 10], []])
    ]
    assert sizes(pack_trees(trees(5), rows=1, row_length=256)) == [(32, [[5]])]
    assert pack_trees([], rows=2, row_length=64) == []


def questions(longest_context, count=24):
    """Questions of one to five choices; some choices are a single token."""
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(count):
        context = rng.integers(1, VOCABULARY, rng.integers(1, longest_context)).tolist()
        groups.append(
            [
                continuation(context, rng.integers(1, VOCABULARY, rng.integers(1, 6)).tolist())
                for _ in range(rng.integers(1, 6))
            ]
        )
    return groups


def scores(scorer, groups, adapter=None):
    """Log-probability of each sequence, and whether greedy decoding yields it."""
    found = {}
    for batch in scorer.scores(groups, adapter, [False] * len(groups)):
        found |= {(group, index): score for group, index, score in batch}
    assert len(found) == sum(map(len, groups))
    return [found[g, i] for g, group in enumerate(groups) for i in range(len(group))]


def expected_score(log_probs, sequence):
    """The same from the log-probabilities [S, V] of one sequence alone."""
    places = range(len(sequence.tokens) - len(sequence.targets), len(sequence.tokens))
    pairs = list(zip(places, sequence.targets, strict=True))
    return (
        sum(float(log_probs[place, target]) for place, target in pairs),
        all(log_probs[place].argmax() == target for place, target in pairs),
    )


FAMILIES = {
    "llama": ("llama", {}, 30, 64),
    # Rows longer than a block of attention.
    "blocks": ("llama", {}, 30, 512),
    # Trees longer than the window fall apart, others do not.
    "window": ("mistral", {"sliding_window": 24}, 40, 64),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_scores_equal_those_of_transformers(tmp_path, family):
    model_type, fields, longest, row_length = FAMILIES[family]
    reference = tiny_model(model_type, max_position_embeddings=128, **fields)
    reference.save_pretrained(tmp_path)
    base = moe_jax.load_base(tmp_path)
    model = build_model(base, "float32")
    scorer = Scorer(model, load_params(base, model, None), batch_size=3, row_length=row_length)
    groups = questions(longest)
    with torch.no_grad():
        likeliest = int(reference(torch.tensor([[5, 6]])).logits[0, -1].argmax())
    groups.append([continuation([5, 6], [likeliest]), continuation([5, 6], [likeliest ^ 1])])
    sequences = [sequence for group in groups for sequence in group]
    found = scores(scorer, groups)
    for sequence, score in zip(sequences, found, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([sequence.tokens])).logits[0]
        log_probs = torch.log_softmax(logits, dim=-1).numpy()
        expected, is_greedy = expected_score(log_probs, sequence)
        # Up to five log-probabilities.
        np.testing.assert_allclose(score.log_prob, expected, rtol=0, atol=5 * FLOAT32_LOGITS)
        assert score.is_greedy == is_greedy
    assert [score.is_greedy for score in found[-2:]] == [True, False]


@pytest.mark.parametrize("router", [None, SwitchRouter(capacity_factor=1.0, init_std=1.0)])
def test_packed_scores_of_experts_equal_those_of_single_sequences(tmp_path, router):
    tiny_model("llama", max_position_embeddings=128).save_pretrained(tmp_path)
    base = moe_jax.load_base(tmp_path)
    fields = {} if router is None else {"router": router}
    method = moe_jax.MixLoraConfig(
        rank=4, alpha=8.0, target_modules=("up_proj", "q_proj"), num_experts=4, **fields
    )
    adapted = moe_jax.AdaptedModel(base, {"routed": method})
    adapted.adapters["routed"] = jax.tree.map(lambda leaf: leaf + 0.1, adapted.adapters["routed"])
    model = build_model(base, "float32")
    scorer = Scorer(model, load_params(base, model, None), batch_size=3, row_length=64)
    groups = questions(20, count=8)
    found = scores(scorer, groups, Adapter(method, adapted.adapters["routed"]))
    of_base = scores(scorer, groups)
    sequences = [sequence for group in groups for sequence in group]
    for sequence, score in zip(sequences, found, strict=True):
        log_probs = jax.nn.log_softmax(adapted([list(sequence.tokens)], "routed")[0])
        expected, _ = expected_score(np.asarray(log_probs), sequence)
        np.testing.assert_allclose(score.log_prob, expected, **ROUNDING)
    assert not np.allclose([s.log_prob for s in found], [s.log_prob for s in of_base], atol=1e-2)
