"""Targets of a conversation: every assistant turn with its end of turn, and nothing else."""

import datetime

import numpy as np
import pytest

from moe_jax.data.chat import conversation_spans, lost_fields
from moe_jax.data.chat_template import ChatTemplate, require_chat_template
from moe_jax.data.messages import UNTRAINED
from moe_jax.errors import DataError

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "content": "A2"},
]

# Llama 2's template has no header for the assistant, so the generation prompt is empty.
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>"
    "{% else %}<s>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
# Removes the reasoning from all turns except the last, like the templates of reasoning models.
REASONING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.thinking and loop.last %}[{{ m.thinking }}]{% endif %}{{ m.content }}<|stop|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


# Refuses conversations without a system message, and roles that do not alternate after it.
STRICT = (
    "{% for m in messages %}{% set roles = ['assistant', 'user'] if loop.index0 else ['system'] %}"
    "{% if m.role != roles[loop.index0 % 2] %}{{ raise_exception('roles') }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Of no use, but every turn depends on all before it.
NUMBERED = (
    "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ messages|length + 1 }} assistant: {% endif %}"
)
# Its beginning depends on the number of turns, from the fifth on.
COUNTED = (
    "{% if messages|selectattr('role', 'equalto', 'user')|list|length > 4 %}Long.\n{% endif %}"
) + PLAIN
# Removes the reasoning from the turns before the last message of the user.
REASONING_SINCE_USER = (
    "{% set ns = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.thinking and loop.index0 > ns.user %}"
    "[{{ m.thinking }}]{% endif %}{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture
def template(byte_tokenizer, monkeypatch):
    def make(text=None, **fields):
        if text is not None:
            monkeypatch.setattr(byte_tokenizer, "chat_template", text)
        return ChatTemplate(byte_tokenizer, "c.json: row 1", **fields)

    return make


@pytest.fixture
def spans(template):
    return lambda messages, text=None: conversation_spans(messages, template(text))


def test_every_assistant_turn_with_its_end_is_a_target(spans):
    expected = [
        ("<|start|>system\nS<|stop|>\n<|start|>user\nU1<|stop|>\n<|start|>assistant\n", False),
        ("A1<|stop|>", True),
        ("\n<|start|>user\nU2<|stop|>\n<|start|>assistant\n", False),
        ("A2<|stop|>", True),
    ]
    # The template ends the turn with a token of its own: no end of text is added.
    assert spans(TALK) == [(expected, False)]


def test_messages_after_the_last_answer_are_left_out(spans):
    assert spans(TALK[:4]) == spans(TALK[:3])


def test_template_without_generation_prompt(spans):
    cut, ends = spans(TALK[1:], INSTRUCT)[0]
    # "</s>" is not a token of this tokenizer, so its end-of-text token is added.
    assert ends
    assert cut == [
        ("<s>[INST] U1 [/INST]", False),
        (" A1 </s>", True),
        ("<s>[INST] U2 [/INST]", False),
        (" A2 </s>", True),
    ]


def test_template_without_special_tokens_gets_an_end_of_text(spans):
    assert spans(TALK[1:3], PLAIN) == [([("user: U1\nassistant: ", False), ("A1\n", True)], True)]


def test_template_that_rewrites_earlier_turns_gives_one_example_per_turn(spans):
    talk = [dict(message) for message in TALK[1:]]
    talk[1]["thinking"], talk[3]["thinking"] = "T1", "T2"
    user, assistant = "<|start|>user\n", "<|start|>assistant\n"
    assert spans(talk, REASONING) == [
        ([(f"{user}U1<|stop|>\n{assistant}", False), ("[T1]A1<|stop|>", True)], False),
        (
            [
                (f"{user}U1<|stop|>\n{assistant}A1<|stop|>\n{user}U2<|stop|>\n{assistant}", False),
                ("[T2]A2<|stop|>", True),
            ],
            False,
        ),
    ]
    # Without reasoning the same template renders all turns alike: one example.
    assert len(spans(TALK, REASONING)) == 1


def test_template_whose_generation_prompt_is_not_kept_is_refused(spans):
    template = PLAIN.replace("assistant: {% endif %}", "assistant: <think>{% endif %}")
    with pytest.raises(DataError, match=r"^c\.json: row 1: message 2: .* generation prompt"):
        spans(TALK[1:3], template)


def test_refusal_of_the_template_names_the_row(spans):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"^c\.json: row 1: .*roles must alternate") as caught:
        spans(TALK, template)
    assert "\n" not in str(caught.value)


def test_tokenizer_without_template(word_tokenizer, byte_tokenizer):
    require_chat_template(byte_tokenizer, "c.json")
    with pytest.raises(DataError, match=r"^c\.json: rendering messages needs a chat template"):
        require_chat_template(word_tokenizer, "c.json")


def long_talk(answers):
    talk = [{"role": "system", "content": "S"}]
    for n in range(answers):
        talk += [
            {"role": "user", "content": f"U{n}"},
            {"role": "assistant", "content": f"A{n}", "thinking": f"T{n}"},
        ]
    return talk


def every_prefix(messages, tokenizer):
    """Spans from two renderings for each answer, compared as a whole."""
    render, turns = tokenizer.apply_chat_template, []
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:n], tokenize=False, add_generation_prompt=True)
            turns.append((before, render(messages[: n + 1], tokenize=False)))
    if not all(turns[-1][1].startswith(text) for turn in turns for text in turn):
        return [[(before, False), (turn[len(before) :], True)] for before, turn in turns]
    texts = [text for turn in turns for text in turn]
    starts = ["", *texts[:-1]]
    cuts = [text[len(start) :] for start, text in zip(starts, texts, strict=True)]
    return [[(cut, n % 2 == 1) for n, cut in enumerate(cuts)]]


def without_line_breaks(conversations):
    """Texts and targets, where line breaks after an answer are not shown."""
    return [[(text.strip("\n"), learned) for text, learned in spans] for spans in conversations]


@pytest.mark.parametrize("answers", [1, 2, 3, 4, 6, 9, 20])
@pytest.mark.parametrize(
    ("text", "is_stable"),
    [
        (INSTRUCT, True),
        (PLAIN, True),
        (STRICT, True),
        (NUMBERED, True),
        (COUNTED, False),
        (REASONING, False),
        (REASONING_SINCE_USER, False),
    ],
)
def test_turns_are_those_of_every_prefix_rendered(spans, byte_tokenizer, text, is_stable, answers):
    found = spans(long_talk(answers), text)
    assert without_line_breaks(spans for spans, _ in found) == without_line_breaks(
        every_prefix(long_talk(answers), byte_tokenizer)
    )
    if answers > 4:
        assert len(found) == (1 if is_stable else answers)


def test_chains_of_tool_calls_keep_their_reasoning(spans, byte_tokenizer):
    talk = long_talk(20)
    for message in talk[3::2]:
        message["role"] = "tool"
    (found,) = spans(talk, REASONING_SINCE_USER)
    assert without_line_breaks([found[0]]) == without_line_breaks(
        every_prefix(talk, byte_tokenizer)
    )
    assert "".join(text for text, learned in found[0] if learned).count("[T") == 20


@pytest.mark.parametrize("text", [INSTRUCT, STRICT, PLAIN])
def test_rendered_messages_grow_with_the_length(spans, byte_tokenizer, monkeypatch, text):
    rendered, original = [], byte_tokenizer.apply_chat_template

    def counted(messages, **options):
        rendered.append(len(messages))
        return original(messages, **options)

    monkeypatch.setattr(byte_tokenizer, "apply_chat_template", counted)
    totals = []
    for answers in (64, 512):
        rendered.clear()
        spans(long_talk(answers), text)
        totals.append(sum(rendered))
    # The whole, prefixes of 1, 2, 3, 5, 9, ... answers, and parts of one size; all prefixes would
    # be 512 * 1025 messages.
    assert totals[1] < 8.5 * totals[0]
    assert totals[1] < 512 * 20


def test_answers_of_weight_0_are_prompts_that_are_never_learned(spans):
    talk = [*TALK, {"role": "user", "content": "U3"}, {"role": "assistant", "content": "A3"}]
    talk = [dict(message) for message in talk]
    talk[2]["weight"] = talk[6]["weight"] = 0
    ((found, _),) = spans(talk)
    assert [text for text, target in found if target] == ["A2<|stop|>"]
    assert [text for text, target in found if target is None] == ["A1<|stop|>"]
    assert "".join(text for text, _ in found) == "".join(text for text, _ in spans(TALK)[0][0])
    talk[4]["weight"] = 0
    assert spans(talk) == []


def test_answers_of_weight_0_in_a_template_that_rewrites_turns(spans):
    talk = long_talk(3)
    talk[2]["weight"] = 0
    second, third = (found for found, _ in spans(talk, REASONING))
    assert second[1] == ("[T1]A1<|stop|>", True)
    assert third[1] == ("[T2]A2<|stop|>", True)
    assert second[0][1] is third[0][1] is None  # both prompts hold the first answer


TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"town": "Ulm"}}}
# Writes all that a conversation can have.
FULL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if documents %}{{ documents | tojson }}"
    "{% endif %}{{ mood }}{% for m in messages %}<{{ m.role }}{{ m.name }}>"
    "{% if m.reasoning_content and loop.last %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
AGENT = [
    {"role": "user", "content": "Wet?"},
    {"role": "assistant", "thinking": "Hm.", "tool_calls": [CALL]},
    {"role": "tool", "content": "22", "name": "rain"},
    {"role": "assistant", "content": "No."},
]
FIELDS = {
    "system": "Short.",
    "arguments": {"tools": TOOLS, "documents": [{"title": "t", "text": "x"}], "mood": "calm"},
}


def test_all_fields_reach_the_template(template, byte_tokenizer):
    made = template(FULL, **FIELDS)
    expected = byte_tokenizer.apply_chat_template(
        [{"role": "system", "content": "Short."}, *AGENT],
        tools=TOOLS,
        documents=[{"title": "t", "text": "x"}],
        mood="calm",
        tokenize=False,
    )
    assert made.render(AGENT) == expected
    for part in ('"name": "rain"', '"title": "t"', "calm", "<toolrain>", 'rain{"town": "Ulm"}'):
        assert part in expected
    # The reasoning is removed once its turn is not the last.
    first, second = (spans for spans, _ in conversation_spans(AGENT, made))
    assert first[1] == ('[Hm.]rain{"town": "Ulm"}<|stop|>', True)
    assert second[1] == ("No.<|stop|>", True)
    assert lost_fields(AGENT, made) == []


def test_fields_that_the_template_leaves_out_are_found(template):
    text = (
        "{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.role + ': ' + m.content }}"
        "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    lost = ["tools", "documents", "mood", "a system message", "messages of the role 'tool'"]
    assert lost_fields(AGENT, template(text, **FIELDS)) == [*lost, "tool_calls", "thinking", "name"]
    assert lost_fields(TALK, template(PLAIN)) == []


def test_template_that_needs_content_gets_an_empty_one(template):
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    rendered = "user: Wet?\nassistant: \ntool: 22\nassistant: No.\n"
    assert template(text).render(AGENT) == rendered
    defined = "{% for m in messages %}{{ m.content is defined }} {% endfor %}"
    assert template(defined).render(AGENT) == "True False True True "


DATES = ["%d %b %Y", "%Y-%m-%d", "%B %-d, %H:%M", "%A %j"]


@pytest.mark.parametrize("lead", ["", "\n", " \n\n", "x\n", "{# note #}\n ", "{%- set x = 1 -%}\n"])
def test_fixed_date(template, byte_tokenizer, lead):
    shown = "".join(f"{{{{ strftime_now('{code}') }}}}|" for code in DATES)
    text = (
        f"{lead}[{{% macro day() %}}{shown}{{% endmacro %}}{{% if strftime_now is defined %}}"
        f"{{{{ day() }}}}{{% endif %}}{shown}]\n{PLAIN}"
    )
    day = datetime.datetime(2024, 2, 9)
    expected = "".join(f"{day.strftime(code)}|" for code in DATES) * 2
    rendered = template(text, date="2024-02-09").render(TALK)
    # Everything but the dates is as with the true date.
    before, _, rest = byte_tokenizer.apply_chat_template(TALK, tokenize=False).partition("[")
    assert rendered == f"{before}[{expected}]{rest.partition(']')[2]}"
    assert template(text).render(TALK) == f"{before}[{rest}"


def test_fixed_date_leaves_other_templates_alone(template):
    assert template(PLAIN, date="2024-02-09").render(TALK) == template(PLAIN).render(TALK)


def test_named_templates(template, byte_tokenizer, monkeypatch):
    named = {"default": PLAIN, "tool_use": "{{ strftime_now('%Y') }} {{ tools[0].function.name }}"}
    monkeypatch.setattr(byte_tokenizer, "chat_template", named)
    assert template(date="2024-02-09", arguments={"tools": TOOLS}).render(TALK) == "2024 rain"
    assert template(date="2024-02-09").render(TALK) == template().render(TALK)


MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|stop|>{% endgeneration %}{% else %}{{ m.content }}<|stop|>"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def test_generation_blocks_are_the_targets(spans):
    unmarked = spans(TALK)
    assert spans(TALK, MARKED) == unmarked
    # A block that leaves the end of the turn out, and begins with the role.
    odd = MARKED.replace("<|stop|>{% endgeneration %}", "{% endgeneration %}<|stop|>")
    (found, lacks_end) = spans(TALK[1:3], odd)[0]
    assert found == [("<|start|>user\nU1<|stop|>\n<|start|>assistant\n", False), ("A1", True)]
    assert not lacks_end


def test_generation_blocks_of_answers_of_weight_0(spans):
    talk = [{**TALK[2], UNTRAINED: 0} if m is TALK[2] else m for m in TALK]
    (found, _) = spans(talk, MARKED)[0]
    assert [target for _, target in found] == [False, None, False, True]


def test_generation_blocks_are_those_of_transformers(template, byte_tokenizer):
    made = template(MARKED)
    encoded = byte_tokenizer.apply_chat_template(
        TALK, return_assistant_tokens_mask=True, return_dict=True
    )
    (found, _) = conversation_spans(TALK, made)[0]
    learned = "".join(text for text, target in found if target)
    ids, mask = np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"])
    assert byte_tokenizer.decode(ids[mask == 1]) == learned == "A1<|stop|>A2<|stop|>"


TWICE = MARKED.replace("{% generation %}", "{% generation %}<{% endgeneration %}>{% generation %}")


def test_several_generation_blocks_of_an_answer(spans):
    (found, _) = spans(TALK, TWICE)[0]
    assert [text for text, target in found if target] == ["<", "A1<|stop|>", "<", "A2<|stop|>"]
    talk = [{**TALK[2], UNTRAINED: 0} if m is TALK[2] else m for m in TALK]
    (found, _) = spans(talk, TWICE)[0]
    assert [target for _, target in found] == [False, None, False, None, *[False, True] * 2]


@pytest.mark.parametrize("weight", [0, 1])
def test_answers_without_a_generation_block(spans, weight):
    last_only = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    talk = [{**TALK[2], UNTRAINED: 0} if m is TALK[2] and not weight else m for m in TALK]
    with pytest.raises(DataError, match=r"c\.json: row 1: .* 1 generation blocks for 2 answers"):
        spans(talk, last_only)


def test_generation_blocks_of_an_answer_that_holds_tool_calls(spans):
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    added = MARKED.replace("m.content }}<|stop|>{% endg", "m.content + '' }}<|stop|>{% endg")
    talk = [TALK[1], {"role": "assistant", "tool_calls": calls}]
    (found, _) = spans(talk, added)[0]
    assert found[1] == ("<|stop|>", True)
    named = added.replace("m.content + ''", "m.content + m.tool_calls[0].function.name")
    (found, _) = spans(talk, named)[0]
    assert found[1] == ("f<|stop|>", True)
