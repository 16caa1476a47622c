"""Prompts and answers of preference data, checked and brought to one form.

A prompt and its answers are texts, or messages that the chat template renders. Usual forms of pairs
are a prompt with two answers, and two whole conversations that share a beginning, with or without
the prompt in a column of its own.
"""

import contextlib
import json
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from moe_jax.data.messages import UNTRAINED, check_turns, require_answer
from moe_jax.data.values import check_text, describe_value
from moe_jax.errors import DataError
from moe_jax.files.json_file import parse_json

Turns = list[dict[str, Any]]

_SENDER = ("role", "from")
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def check_answer(value: Any, where: str) -> str | Turns:
    """Checks a prompt or an answer: text, or messages, of which one may stand without a list.

    Text that is a JSON list of messages is parsed, as in the schema `chat`.

    Raises:
      DataError: the value is neither, or a message has a wrong form.
    """
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) or _holds_messages(value):
        return check_turns(value, where)
    if not isinstance(value, str):
        raise DataError(f"{where} must be text or a list of messages, got {describe_value(value)}")
    return check_text(value, where)


def _holds_messages(value: Any) -> bool:
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    with contextlib.suppress(ValueError):
        turns = parse_json(value)
        is_turn = [isinstance(turn, dict) and not turn.keys().isdisjoint(_SENDER) for turn in turns]
        return bool(is_turn) and all(is_turn)
    return False


def check_feedback_label(value: Any, where: str) -> str:
    """The label of an answer as JSON text: true if it is desirable, false if it is undesirable.

    Raises:
      DataError: the value is neither true, false, 1, 0 nor the text of one of them.
    """
    text = str(value).strip().lower()
    if not isinstance(value, bool | int | float | str) or text not in _LABELS:
        raise DataError(f"{where} must be true or false, got {describe_value(value)}")
    return json.dumps(_LABELS[text])


def normalized_pair(
    prompt: str | Turns | None, chosen: str | Turns, rejected: str | Turns, where: str
) -> dict[str, str]:
    """Prompt and answers of a pair as JSON texts, all of texts or all of messages.

    Args:
      prompt: prompt; None if the answers hold it as their beginning.
      chosen: the better answer.
      rejected: the worse answer.
      where: file and row, for messages.

    Raises:
      DataError: the answers are of different forms, or do not follow a common prompt.
    """
    if not prompt and chosen == rejected:  # not divided, since the row is left out and counted
        return dict.fromkeys(("prompt", "chosen", "rejected"), json.dumps(chosen))
    if isinstance(chosen, str) is not isinstance(rejected, str):
        kinds = ["text" if isinstance(a, str) else "messages" for a in (chosen, rejected)]
        raise DataError(
            f"{where}: chosen is {kinds[0]} and rejected {kinds[1]}; give both in the same form"
        )
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _divide_texts(chosen, rejected)
    elif not prompt and not isinstance(chosen, str):
        prompt, chosen, rejected = _divide_turns(chosen, rejected, where)
    assert prompt is not None
    fields = {
        field: _normalized_answer(prompt, answer, f"{where}: {field}")
        for field, answer in (("chosen", chosen), ("rejected", rejected))
    }
    prompts = {field: first for field, (first, _) in fields.items()}
    if prompts["chosen"] != prompts["rejected"]:
        raise DataError(
            f"{where}: chosen and rejected do not begin with the same prompt; give two answers to "
            "one prompt"
        )
    answers = {field: json.dumps(answer) for field, (_, answer) in fields.items()}
    return {"prompt": json.dumps(prompts["chosen"]), **answers}


def normalized_answer(prompt: str | Turns, completion: str | Turns, where: str) -> dict[str, str]:
    """Prompt and completion as JSON texts, both of texts or both of messages.

    Raises:
      DataError: see `normalized_pair`.
    """
    first, answer = _normalized_answer(prompt, completion, f"{where}: completion")
    return {"prompt": json.dumps(first), "completion": json.dumps(answer)}


def _divide_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common beginning of two texts up to its last whitespace, and their rests."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    common = chosen[: sum(1 for _ in same)]
    size = max((n + 1 for n, letter in enumerate(common) if letter.isspace()), default=0)
    size = len(common[:size].rstrip())  # the space in front of a word is part of the answer
    return chosen[:size], chosen[size:], rejected[size:]


def _divide_turns(chosen: Any, rejected: Any, where: str) -> tuple[Turns, Turns, Turns]:
    """The common messages of two conversations, and the rest of each, at least one message."""
    longest = min(len(chosen), len(rejected)) - 1
    same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    size = min(sum(1 for _ in same), longest)
    if size < 1:
        raise DataError(
            f"{where}: chosen and rejected share no first message; give whole conversations that "
            "begin with the same messages, or the prompt in a column of its own, which "
            "columns.prompt names"
        )
    if chosen[size]["role"] != "assistant" or rejected[size]["role"] != "assistant":
        raise DataError(
            f"{where}: message {size + 1} of chosen and rejected is the first that differs, and "
            "not the assistant's in both; give two answers to the same messages"
        )
    return chosen[:size], chosen[size:], rejected[size:]


def _normalized_answer(
    prompt: str | Turns, answer: str | Turns, where: str
) -> tuple[str | Turns, str | Turns]:
    """Prompt and answer of the same form."""
    if isinstance(answer, str):
        if isinstance(prompt, str):
            if not prompt.strip():
                raise DataError(f"{where} follows no prompt; give the text that it answers")
            return prompt, answer
        answer = [{"role": "assistant", "content": answer}]
    elif isinstance(prompt, str):
        if answer and answer[0]["role"] != "assistant":
            prompt, answer = _divide_at(prompt, answer, where)
        else:
            prompt = [{"role": "user", "content": prompt}]
    elif answer[: len(prompt)] == prompt:  # the answer is the whole conversation
        answer = answer[len(prompt) :]
    if not prompt or prompt[0]["role"] == "assistant":
        raise DataError(f"{where} follows no prompt; give the messages that it answers")
    require_answer(answer, where)
    if all(turn.get(UNTRAINED) == 0 for turn in answer if turn["role"] == "assistant"):
        raise DataError(
            f"{where} has no turn to learn, since all have the weight 0; leave out the weights, or "
            "the row"
        )
    return prompt, answer


def _divide_at(prompt: str, answer: Turns, where: str) -> tuple[Turns, Turns]:
    """Divides a whole conversation behind the message of the user whose text is the prompt."""
    for number, message in enumerate(answer[:-1], 1):
        if message["role"] == "user" and message.get("content") == prompt:
            return answer[:number], answer[number:]
    raise DataError(
        f"{where} is a conversation in which no message of the user is the prompt; give the prompt "
        "as it stands there, or leave its column out with columns.prompt = ''"
    )


def check_forms(checked: Mapping[str, str], chat_fields: tuple[str, ...], where: str) -> None:
    """Refuses fields of the chat template beside texts.

    Args:
      checked: checked row.
      chat_fields: fields that only the chat template reads.
      where: file and row, for messages.

    Raises:
      DataError: such a field is not empty.
    """
    if isinstance(json.loads(checked["prompt"]), str):
        for field in chat_fields:
            if checked[field]:
                raise DataError(
                    f"{where}: {field!r} is for the chat template, and prompt and answers are "
                    "texts; give them as messages"
                )
