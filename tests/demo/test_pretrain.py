import itertools

import numpy as np
import pytest

from moe_jax.demo.corpus import plain_sentences
from moe_jax.demo.pretrain import demo_tokenizer, hf_tensors, packed_batches, pretrain
from moe_jax.demo.tiny_llama import random_tensors, write_checkpoint
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer(seed=0)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "head_dim": 24}],
)
def test_parameters_become_the_tensors_they_came_from(tmp_path, overrides):
    hf_config = write_checkpoint(tmp_path, seed=0, **overrides)
    config = read_model_config(tmp_path)
    tensors = hf_tensors(load_base_params(tmp_path, config, "float32"), config)
    expected = random_tensors(hf_config, seed=0)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)


def test_rows_hold_whole_lines(tokenizer):
    batches = list(itertools.islice(packed_batches(tokenizer, seed=5), 3))
    texts = []
    for batch in batches:
        for row, numbers, positions, mask in zip(
            batch.tokens, batch.segment_ids, batch.positions, batch.loss_mask, strict=True
        ):
            for number in range(1, numbers.max() + 1):
                line = row[numbers == number]
                assert line[0] == tokenizer.bos_token_id
                assert line[-1] == tokenizer.eos_token_id
                np.testing.assert_array_equal(positions[numbers == number], np.arange(len(line)))
                assert mask[numbers == number].tolist() == [False] + [True] * (len(line) - 1)
                texts.append(tokenizer.decode(line[1:-1]))
            assert not mask[numbers == 0].any()
    assert texts == plain_sentences(seed=5, count=2000)[: len(texts)]


def test_loss_falls_and_the_checkpoint_is_complete(tmp_path):
    loss = pretrain(tmp_path, steps=60)
    # Every token alike would cost log(640) = 6.46 nats; the average is over all 60 steps.
    assert loss < 5.5
    load_base_params(tmp_path, read_model_config(tmp_path), "float32")
