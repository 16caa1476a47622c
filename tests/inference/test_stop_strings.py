"""Stop strings against looking at the whole text at once, however it is cut into pieces."""

import itertools

import numpy as np
import pytest

from moe_jax.inference.stop_strings import StopStrings


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
    if reader.found is None:
        out.append(reader.finish())
    return out, reader.found


@pytest.mark.parametrize("stops", [("ab",), ("aab", "ba"), ("abc", "bc", "c"), ("aaa",), ()])
def test_however_the_text_is_cut(stops):
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(300):
        text = "".join(rng.choice([*"abc"], rng.integers(0, 9)))
        cuts = rng.integers(0, len(text) + 1, rng.integers(0, 8)).tolist()
        out, found = passed(text, cuts, stops)
        assert ("".join(out), found) == expected(text, stops)
        ended += found is not None
    assert (ended > 10) == bool(stops)


def test_text_that_is_no_beginning_of_a_stop_string_is_not_held_back():
    reader = StopStrings(("\n\nQ:",))
    assert reader.push("one\ntwo") == "one\ntwo"
    assert reader.push("\n") == ""
    assert reader.push("three\n\nQ") == "\nthree"
    assert reader.push(": who?") == ""
    assert reader.found == "\n\nQ:"
    assert reader.push("more") == ""
