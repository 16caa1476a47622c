"""Routing reports, against transformers' hidden states and a loop over tokens."""

import math

import numpy as np
import pytest
import torch
import transformers
from inspection.conftest import BASE, ROWS, TEXTS
from tolerances import FEW_OPERATIONS, FLOAT32_LOGITS

import moe_jax
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.inspection.routing_inspection import InspectionOptions


def _router_inputs(ids):
    """Input [S, D] of the router of every layer, which is that of the FFN."""
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    inputs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    return inputs


@pytest.fixture(scope="module")
def expected_rows(setting):
    """Ids, weights [L, S, E] and probabilities of each row, by torch."""
    tokenizer = load_tokenizer(BASE)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [("words", [bos, *tokenizer.encode(text, add_special_tokens=False)]) for text in TEXTS]
    for row in ROWS:
        text = row["prompt"] + row["completion"]
        rows.append(("counts", [bos, *tokenizer.encode(text, add_special_tokens=False), eos]))
    kernels = setting.saved["mixlora"].tree["layers"]["mlp"]["moe"]["router"]["kernel"]
    expected_rows = []
    for data, ids in rows:
        weights, probabilities = [], []
        for layer, x in enumerate(_router_inputs(ids)):
            probs = torch.softmax(x @ torch.tensor(np.array(kernels[layer])), dim=-1)
            top, chosen = probs.topk(2, dim=-1)
            shares = top / top.sum(-1, keepdim=True)
            weights.append(torch.zeros_like(probs).scatter(1, chosen, shares).numpy())
            probabilities.append(probs.numpy())
        expected_rows.append((data, ids, np.stack(weights), np.stack(probabilities)))
    return expected_rows


def test_routing_of_every_token_matches_torch(setting, expected_rows):
    report = setting.report
    assert len(report.rows) == len(expected_rows)
    for row, (data, ids, weights, probabilities) in zip(report.rows, expected_rows, strict=True):
        assert (row.data, row.tokens.tolist()) == (data, ids)
        np.testing.assert_allclose(row.weights, weights, rtol=0, atol=FLOAT32_LOGITS)
        np.testing.assert_allclose(row.probabilities, probabilities, rtol=0, atol=FLOAT32_LOGITS)
        assert "".join(row.token_texts) == load_tokenizer(BASE).decode(ids)
    # The routers are no constants: layers and tokens differ.
    assert np.ptp(report.rows[0].weights, axis=1).max() > 0.5
    assert [row.where for row in report.rows][::2] == [
        "text 1",
        "rows.jsonl: line 1",
        "rows.jsonl: line 3",
    ]


def test_loads_pairs_and_entropies_match_a_loop(setting, expected_rows):
    report = setting.report
    layers, experts = 4, 4
    for name in ("words", "counts", None):
        loads = np.zeros((layers, experts))
        pairs = np.zeros((layers, experts, experts))
        entropies, tokens = np.zeros(layers), 0
        for data, ids, weights, probabilities in expected_rows:
            if name not in (None, data):
                continue
            tokens += len(ids)
            for layer in range(layers):
                for token in range(len(ids)):
                    a, b = np.flatnonzero(weights[layer, token])
                    loads[layer, [a, b]] += 1
                    pairs[layer, a, b] += 1
                    pairs[layer, b, a] += 1
                    distribution = probabilities[layer, token].astype(float)
                    entropies[layer] -= (distribution * np.log(distribution)).sum()
        statistics = report.total if name is None else report.data[name]
        assert statistics.tokens == tokens
        np.testing.assert_allclose(
            statistics.load, loads / (2 * tokens / experts), **FEW_OPERATIONS
        )
        # Each token makes one pair, of six.
        expected = pairs / (tokens / 6)
        off = ~np.eye(experts, dtype=bool)
        np.testing.assert_allclose(
            statistics.coactivation[:, off], expected[:, off], **FEW_OPERATIONS
        )
        entropy = entropies / tokens / math.log(experts)
        np.testing.assert_allclose(statistics.entropy, entropy, rtol=0, atol=FLOAT32_LOGITS)
    assert report.specialisation is not None
    assert (report.specialisation > 0).all()


def test_sites_and_groups_of_experts(setting):
    def seen(site):
        return moe_jax.inspect_routing(
            setting.saved["mola"],
            {"words": TEXTS[:1]},
            BASE,
            site=site,
            options=InspectionOptions(keep_tokens=5),
        )

    default, query = seen(None), seen("q_proj")
    assert default.sites == ("mlp/down_proj", "self_attn/q_proj")
    assert (default.site, query.site) == ("mlp/down_proj", "self_attn/q_proj")
    assert not np.array_equal(default.rows[0].weights, query.rows[0].weights)
    # Layers 0 and 1 have two experts, both serve every token, and 2 and 3 have four.
    assert default.total.num_experts.tolist() == [2, 2, 4, 4]
    np.testing.assert_array_equal(default.total.load[:2], [[1, 1, math.nan, math.nan]] * 2)
    assert default.rows[0].weights.shape == (4, 5, 4)
    assert len(default.rows[0].token_texts) == len(default.rows[0].tokens) == 5
    assert default.specialisation is None
    assert default.summary()[-1] == "not shown self_attn/q_proj; choose with --site"


def test_rows_are_cut_divided_and_counted(setting):
    text = TEXTS[0] * 3
    tokens = 1 + len(load_tokenizer(BASE).encode(text, add_special_tokens=False))
    divided = moe_jax.inspect_routing(
        setting.saved["mixlora"],
        {"words": [text]},
        BASE,
        options=InspectionOptions(max_length=20, keep_tokens=0),
    )
    assert divided.rows == []
    assert (divided.total.tokens, divided.total.rows) == (tokens, math.ceil(tokens / 20))
    rows = {"counts": {"path": str(setting.rows), "schema": "completion"}}
    cut = moe_jax.inspect_routing(
        setting.saved["mixlora"],
        rows,
        BASE,
        options=InspectionOptions(max_length=8, limit=3, keep_tokens=0),
    )
    assert cut.notes == ["counts: 3 rows, 24 tokens, 3 cut to 8 tokens"]


@pytest.mark.parametrize(
    ("adapter", "arguments", "words"),
    [
        ("lora", {}, "its method 'lora' has no router"),
        ("mola", {"site": "up_proj"}, "no router at 'up_proj'; did you mean"),
        ("mola", {"site": "mlp/down_prj"}, "did you mean 'mlp/down_proj'"),
        ("mixlora", {"limit": 0}, "limit: must be positive"),
        (
            "mixlora",
            {"max_length": 10**6},
            "max_length: 1000000 tokens, but the base was trained on 256 positions",
        ),
        ("mixlora", {"data": {"words": []}}, "words: holds no text"),
        ("mixlora", {"data": {"words": "/nowhere.txt"}}, "/nowhere.txt: no such file"),
    ],
)
def test_invalid_arguments_are_rejected(setting, adapter, arguments, words):
    arguments = dict(arguments)
    data, site = arguments.pop("data", {"words": TEXTS}), arguments.pop("site", None)
    with pytest.raises(moe_jax.UserError) as error:
        moe_jax.inspect_routing(
            setting.saved[adapter], data, BASE, site=site, options=InspectionOptions(**arguments)
        )
    assert words in str(error.value)


def test_adapter_of_another_base_is_rejected(setting):
    saved = setting.saved["mixlora"]
    other = saved._replace(base=saved.base._replace(fingerprint="0" * 64))
    with pytest.raises(moe_jax.UserError, match="was trained on the base"):
        moe_jax.inspect_routing(other, {"words": TEXTS}, BASE)
    gone = saved._replace(base=saved.base._replace(path="./gone"))
    with pytest.raises(moe_jax.UserError, match=r"\./gone: no such folder; .*--base"):
        moe_jax.inspect_routing(gone, {"words": TEXTS})
