"""Batches, stop strings and end tokens of scripted answers."""

import pytest
from inference.scripted import ScriptedGenerator
from inference.tokenizers_to_try import byte_level

from moe_jax.errors import UserError
from moe_jax.inference.prompts import Prompt
from moe_jax.inference.settings import GenerationConfig, SamplingConfig
from moe_jax.inference.text_generator import Answer, Piece, TextGenerator

TOKENIZER = byte_level()
END = TOKENIZER.eos_token_id
SCRIPTS = [" one two three four", " five six", " seven\U0001f600"]


def ids(text):
    # The tokenizer puts a blank in front of a text, and what follows a prompt keeps it.
    return TOKENIZER(text.removeprefix(" "), add_special_tokens=False).input_ids


def scripted(**options):
    """Generator that answers prompt n with script n and an end token; further tokens are unread."""

    def script(request):
        return [*ids(SCRIPTS[request.number]), END, *ids("beyond the end of it all")]

    tokens = ScriptedGenerator(script)
    return tokens, TextGenerator(tokens, TOKENIZER, frozenset({END}), **options)


def prompts(*adapters):
    return [Prompt((0, *[5] * n), adapter, f"{n}") for n, adapter in enumerate(adapters, 1)]


def answers(generator, prompts, **fields):
    result = [
        a for batch in generator.answers(prompts, GenerationConfig(**fields), 2) for a in batch
    ]
    return sorted(result)


def test_answers_and_finish_reasons():
    _, generator = scripted()
    expected = [Answer(n, 0, text, len(ids(text)) + 1, "stop") for n, text in enumerate(SCRIPTS)]
    assert answers(generator, prompts(None, None, None)) == expected
    cut = answers(generator, prompts(None, None, None), max_new_tokens=2)
    assert [(a.text, a.tokens, a.finish) for a in cut] == [
        (TOKENIZER.decode([0, 5, *ids(text)[:2]])[len(TOKENIZER.decode([0, 5])) :], 2, "length")
        for text in SCRIPTS
    ]


def test_a_partial_character_is_dropped_unless_decoded_alone():
    count = len(ids(SCRIPTS[2])) - 1
    only = prompts(None, None, None)
    _, generator = scripted()
    assert answers(generator, only, max_new_tokens=count)[2].text == " seven"
    _, generator = scripted(decode_without_prompt=True)
    assert answers(generator, only, max_new_tokens=count)[2].text.endswith("seven\ufffd")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("o th",), " one tw"),  # over several tokens
        (("four", "three"), " one two "),
        ((" one",), ""),
        (("four five",), SCRIPTS[0]),  # begins, and does not come
        (("</s>",), SCRIPTS[0]),
    ],
)
def test_stop_strings(stop, expected):
    _, generator = scripted()
    answer = answers(generator, prompts(None), stop=stop)[0]
    assert (answer.text, answer.finish) == (expected, "stop")
    config = GenerationConfig(stop=stop)
    pieces = [piece.text for piece in generator.stream(prompts(None)[0], config)]
    assert "".join(pieces) == expected
    # At no time was there more than the answer in the end.
    assert all(expected.startswith("".join(pieces[:n])) for n in range(len(pieces)))


def test_a_special_token_as_stop_string():
    tokens = ScriptedGenerator(lambda _: [*ids("one"), 0, *ids("two")])
    generator = TextGenerator(tokens, TOKENIZER, frozenset({END}))
    assert answers(generator, prompts(None), stop=("<s>",))[0].text == " one"
    assert answers(generator, prompts(None))[0].text == " one two"


def test_a_stream_ends_with_the_finish_reason():
    _, generator = scripted()
    pieces = list(generator.stream(prompts(None)[0], GenerationConfig(), number=1))
    assert "".join(piece.text for piece in pieces) == SCRIPTS[1]
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert pieces[-1] == Piece("", "stop")


def test_batches_group_prompts_by_adapter_and_length():
    tokens, generator = scripted()
    config = GenerationConfig(sampling=SamplingConfig(1.0), samples=2, seed=3)
    three_prompts = prompts("b", None, "a")
    result = [a for batch in generator.answers(three_prompts, config, 3) for a in batch]
    assert sorted((a.prompt, a.sample) for a in result) == [
        (prompt, sample) for prompt in range(3) for sample in range(2)
    ]
    assert [[(r.adapter, r.number, r.sample) for r in batch] for batch in tokens.batches] == [
        [(None, 1, 0), (None, 1, 1), ("a", 2, 0)],
        [("a", 2, 1), ("b", 0, 0), ("b", 0, 1)],
    ]
    assert {a.text for a in result if a.prompt == 1} == {SCRIPTS[1]}


def test_prompts_across_a_change_of_frequencies_are_batched_separately():
    # Of 2, 3 and 4 tokens; with a change after 3, the last one is alone.
    for options, expected in (({}, [[2, 1], [0]]), ({"switch_length": 3}, [[2], [1, 0]])):
        tokens, generator = scripted(**options)
        answers(generator, prompts(None, None, None))
        assert [[r.number for r in batch] for batch in tokens.batches] == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: must be a positive number, got 0"),
        ({"samples": 3}, "samples: with temperature 0 all 3 would be the same"),
        ({"seed": -1}, "seed: must be between 0 and"),
        ({"stop": ("",)}, "stop: a stop string is empty"),
        ({"stop": "text"}, "stop: must be strings"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**fields)
