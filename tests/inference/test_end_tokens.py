"""Which ids end an answer, from the files that name them."""

import json

import pytest
from inference.tokenizers_to_try import sentence_piece

from moe_jax.errors import UserError
from moe_jax.inference.end_tokens import end_tokens

TOKENIZER = sentence_piece()  # its </s> is 2


def write(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, {2}),
        ({"config": {"eos_token_id": None}}, {2}),
        (
            {"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [8, 9]}},
            {2, 7, 8, 9},
        ),
        ({"config": {"text_config": {"eos_token_id": [106]}}}, {2, 106}),
    ],
)
def test_every_file_counts(tmp_path, files, ids):
    write(tmp_path, **files)
    assert end_tokens(tmp_path, TOKENIZER) == ids


@pytest.mark.parametrize("bad", ["</s>", -1, True, [1, "2"], 1.5])
def test_what_is_no_id_is_refused(tmp_path, bad):
    write(tmp_path, generation_config={"eos_token_id": bad})
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id: expected a token"):
        end_tokens(tmp_path, TOKENIZER)


def test_a_damaged_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read as JSON"):
        end_tokens(tmp_path, TOKENIZER)
