"""Incremental detokenization: equal to decoding at the end, without partial characters."""

import numpy as np
import pytest
from inference.tokenizers_to_try import byte_level, sentence_piece

from moe_jax.data.tokenizer import encode, encode_prompt
from moe_jax.inference.text_generator import Detokenizer

TEXTS = [
    "an ant",
    "a  b   c",
    " a",
    "\u20ac5 \u4f60\u597d, \U0001f600\U0001f468\u200d\U0001f469!",
    "na\u00efve\n\nx",
]


@pytest.fixture(scope="module", params=[byte_level, sentence_piece])
def tokenizer(request):
    return request.param()


def pieces(detokenizer, ids, *, is_cut=False):
    return [*(detokenizer.push(token) for token in ids), detokenizer.finish(is_cut=is_cut)]


@pytest.mark.parametrize("after", TEXTS)
@pytest.mark.parametrize("before", ["ab", "\u20ac", "x "])
def test_pieces_join_to_the_text_after_the_prompt(tokenizer, before, after):
    prompt, known = encode_prompt(tokenizer, before), encode(tokenizer, [before])[0]
    whole = encode(tokenizer, [before + after])[0]
    ids = whole[len(known) :]
    if whole[: len(known)] != known:  # the two fuse, so what follows is encoded by itself
        ids = encode(tokenizer, [after])[0]
        after = tokenizer.decode([*known, *ids]).removeprefix(before)
    text_pieces = pieces(Detokenizer(tokenizer, prompt), ids)
    assert "".join(text_pieces) == after
    assert not any("\ufffd" in piece for piece in text_pieces)
    assert sum(map(bool, text_pieces)) > 1 or len(after) < 3  # it is a stream
    # By itself, without a prompt, SentencePiece has no blank to begin with.
    assert "".join(pieces(Detokenizer(tokenizer, ()), ids)) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_is_one_piece(tokenizer):
    smile = encode(tokenizer, ["\U0001f600"])[0][-4:]  # its four bytes
    assert pieces(Detokenizer(tokenizer, encode(tokenizer, ["a"])[0]), smile) == [
        *("", "", "", "\U0001f600", "")
    ]


def test_a_partial_character_is_dropped_at_a_cut(tokenizer):
    half = encode(tokenizer, ["an\u20ac"])[0][:-1]
    assert "".join(pieces(Detokenizer(tokenizer, ()), half, is_cut=True)) == "an"
    ended = "".join(pieces(Detokenizer(tokenizer, ()), half))
    assert ended == tokenizer.decode(half) and set(ended[2:]) == {"\ufffd"}


def test_special_tokens_have_no_text(tokenizer):
    ids = encode(tokenizer, ["an"])[0]
    with_end = [*ids, tokenizer.eos_token_id, *encode(tokenizer, ["b"])[0]]
    assert "</s>" not in "".join(pieces(Detokenizer(tokenizer, ids), with_end))


def test_random_tokens(tokenizer):
    """Random tokens, mostly not text: nothing is lost or repeated."""
    rng = np.random.default_rng(0)
    pieces_known = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    letters = [i for i, piece in enumerate(pieces_known) if piece.isalpha()]
    for _ in range(50):
        # A letter between two others, so that no run of bytes is decoded again with later ones.
        ids = [t for i in rng.integers(3, len(tokenizer), 6) for t in (rng.choice(letters), i)]
        text = "".join(pieces(Detokenizer(tokenizer, ()), [*map(int, ids)]))
        assert text == tokenizer.decode([*map(int, ids)])
