"""Scores and routing reports of adapters with new tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
from foreign_adapters import LORA, MIXLORA, random_adapter
from hf_models import save_tiny_llama
from scipy.special import log_softmax
from tolerances import FLOAT32_LOGITS

import moe_jax
from moe_jax.demo.tiny_llama import save_tokenizer, train_tokenizer
from moe_jax.evaluation.lm_harness import HarnessModel
from moe_jax.evaluation.scoring_protocols import base_limits

USED = 264
NEW = {"new_tokens": ["<a>", "</a>"], "new_token_id": USED}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_llama(folder, vocab_size=USED)
    save_tokenizer(train_tokenizer(["the fox sees the dog"], vocab_size=USED), folder)
    return moe_jax.load_base(folder)


def adapter_of(base, method):
    adapter = random_adapter({**method, **NEW}, base.config, str(base.folder))
    return adapter._replace(base=base.identity)


def test_scores_are_those_of_the_logits(base):
    adapter = adapter_of(base, LORA)
    harness = HarnessModel(base, adapter, batch_size=2)
    pairs = [("the <a>fox", "</a> sees"), ("dog", " the<a>")]
    scores = harness.loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
    model = moe_jax.AdaptedModel(base, {"x": adapter})
    for (context, continuation), (score, _) in zip(pairs, scores, strict=True):
        ids = harness.tok_encode(context + continuation)
        before = len(harness.tok_encode(context))
        assert max(ids[before:]) >= USED
        logits = log_softmax(np.asarray(model(np.array([ids]), "x"))[0], axis=-1)
        expected = sum(logits[i - 1, ids[i]] for i in range(before, len(ids)))
        np.testing.assert_allclose(score, expected, rtol=0, atol=12 * FLOAT32_LOGITS)


def test_the_base_beside_the_adapter_limits_the_tokens(base):
    method = adapter_of(base, LORA).method
    assert base_limits(base.config, [method], False).vocab_size == USED + 2
    limits = base_limits(base.config, [method, None], False)
    assert limits.vocab_size == USED
    tokenizer = HarnessModel(base, adapter_of(base, LORA)).tokenizer
    with pytest.raises(
        moe_jax.UserError, match=r"id 265 \('</a>'\).* without this token separately"
    ):
        limits.check_id(USED + 1, tokenizer)


def test_routing_of_new_tokens(base):
    report = moe_jax.inspect_routing(
        adapter_of(base, MIXLORA), {"words": ["the <a>fox</a> sees"]}, base
    )
    (row,) = report.rows
    assert {USED, USED + 1} <= set(row.tokens.tolist())
    assert "<a>" in row.token_texts
