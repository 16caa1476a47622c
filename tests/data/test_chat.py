"""Targets of a conversation: every assistant turn with its end of turn, and nothing else."""

import pytest

from moe_jax.data.chat import conversation_spans, require_chat_template
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


@pytest.fixture
def spans(byte_tokenizer, monkeypatch):
    def cut(messages, template=None):
        if template is not None:
            monkeypatch.setattr(byte_tokenizer, "chat_template", template)
        return conversation_spans(messages, byte_tokenizer, "c.json: row 1")

    return cut


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
    with pytest.raises(DataError, match=r"^c\.json: schema 'chat' needs a chat template"):
        require_chat_template(word_tokenizer, "c.json")
