"""End tokens from the files of a base; stop strings compared with a search in the whole text."""

import itertools
import json

import numpy as np
import pytest
from inference.tokenizers_to_try import sentence_piece

from moe_jax.errors import UserError
from moe_jax.inference.stopping import StopStrings, end_tokens

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
def test_end_tokens_of_all_files(tmp_path, files, ids):
    write(tmp_path, **files)
    assert end_tokens(tmp_path, TOKENIZER) == ids


@pytest.mark.parametrize("bad", ["</s>", -1, True, [1, "2"], 1.5])
def test_invalid_ids(tmp_path, bad):
    write(tmp_path, generation_config={"eos_token_id": bad})
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id: expected a token"):
        end_tokens(tmp_path, TOKENIZER)


def test_a_damaged_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not valid JSON"):
        end_tokens(tmp_path, TOKENIZER)


def expected(text, stops):
    """The text before the stop string that is complete first, character by character."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end - len(stop)], stop
    return text, None


def passed(text, cuts, stops):
    reader = StopStrings(stops)
    places = [0, *sorted(cuts), len(text)]
    out = [reader.push(text[a:b]) for a, b in itertools.pairwise(places)]
    if reader.matched is None:
        out.append(reader.finish())
    return out, reader.matched


@pytest.mark.parametrize("stops", [("ab",), ("aab", "ba"), ("abc", "bc", "c"), ("aaa",), ()])
def test_any_split_into_pieces(stops):
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(300):
        text = "".join(rng.choice([*"abc"], rng.integers(0, 9)))
        cuts = rng.integers(0, len(text) + 1, rng.integers(0, 8)).tolist()
        out, matched = passed(text, cuts, stops)
        assert ("".join(out), matched) == expected(text, stops)
        ended += matched is not None
    assert (ended > 10) == bool(stops)


def test_only_the_beginning_of_a_stop_string_is_held_back():
    reader = StopStrings(("\n\nQ:",))
    assert reader.push("one\ntwo") == "one\ntwo"
    assert reader.push("\n") == ""
    assert reader.push("three\n\nQ") == "\nthree"
    assert reader.push(": who?") == ""
    assert reader.matched == "\n\nQ:"
    assert reader.push("more") == ""
