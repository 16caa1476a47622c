import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from tolerances import FLOAT32_LOGITS
from transformers import AutoModelForCausalLM

from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.routing import TopKRouter
from moe_jax.adapters.rows import AdapterRows
from moe_jax.adapters.tree import split_by_adapter
from moe_jax.config.model import ComputeConfig
from moe_jax.data.batch import Batch
from moe_jax.demo.score import score_answers
from moe_jax.demo.tiny_llama import write_checkpoint
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params
from moe_jax.models.adapted import CompiledLlama
from moe_jax.models.causal_lm import LlamaForCausalLM

QUESTION, ANSWER = 5, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, seed=0, initializer_range=0.2, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    """Six random questions with the greedy answers of transformers, and its model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    questions = torch.from_numpy(np.random.default_rng(0).integers(2, 640, (6, QUESTION)))
    tokens = model.generate(
        questions, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=0
    )
    return tokens.numpy().astype(np.int32), model


def batch(tokens, empty_rows=0):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    mask = np.broadcast_to(positions >= QUESTION, tokens.shape)
    zeros = np.zeros_like(tokens)
    whole = Batch(tokens, mask, np.ones_like(tokens), positions, *[zeros] * 3)
    return Batch(*(np.concatenate([a, np.zeros_like(a[:empty_rows])]) for a in whole))


def base(folder):
    config = read_model_config(folder)
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"))
    return CompiledLlama(model), load_base_params(folder, config, "float32")


def test_counts_the_answers_that_greedy_decoding_writes(folder, rows):
    tokens, _ = rows
    wrong = tokens.copy()
    wrong[[1, 4], [QUESTION, -1]] += 1  # one wrong token, first or last, is a wrong answer
    model, params = base(folder)
    assert score_answers(model, (), params, {}, [batch(tokens)]).exact == 1.0
    result = score_answers(
        model, (), params, {}, [batch(wrong[:4]), batch(wrong[4:], empty_rows=2)]
    )
    assert result.questions == 6
    assert result.exact == pytest.approx(4 / 6)
    assert result.load is None


def test_loss_is_that_of_transformers(folder, rows):
    tokens, reference = rows
    labels = torch.from_numpy(tokens).long()
    labels[:, :QUESTION] = -100
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens).long(), labels=labels).loss.item()
    model, params = base(folder)
    loss = score_answers(model, (), params, {}, [batch(tokens, empty_rows=2)]).loss
    assert loss == pytest.approx(expected, abs=FLOAT32_LOGITS)


def test_load_excludes_padding(folder, rows):
    tokens, _ = rows
    method = MixLoraConfig(
        rank=2, alpha=4.0, target_modules=("up_proj",), num_experts=3, router=TopKRouter(top_k=3)
    )
    model, params = base(folder)
    adapter_rows = (AdapterRows("a", method, 0, 6),)
    keys = dict.fromkeys(("params", "adapters"), jax.random.key(0))
    adapters = split_by_adapter(
        nn.meta.unbox(model.with_rows(adapter_rows).init(keys, tokens))["adapters"]
    )
    load = score_answers(model, adapter_rows, params, adapters, [batch(tokens)]).load
    # All experts are chosen by every token, so that each has a third of the slots.
    assert load is not None
    np.testing.assert_allclose(load, np.full((2, 3), 1 / 3), rtol=1e-6)
