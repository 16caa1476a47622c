"""Conversations rendered by a chat template, divided into prompts and the assistant's turns.

A chat template is a program that renders a list of messages. Rendering the messages before an
assistant turn with `add_generation_prompt` gives exactly the prompt that the model sees at
inference. The target is the remainder of the rendering up to and including that turn: its content
and the template's end of turn. Two properties of the template are checked for every row:

- The rendered answer begins with the generation prompt. A template without this property would
  train the model on another prompt than the one it sees at inference, and is refused.
- A turn is rendered alike whatever follows it. A template without this property (some remove the
  reasoning from earlier turns) gives one example per assistant turn instead of one for all turns.
"""

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from moe_jax.data.tokenizer import first_line
from moe_jax.errors import DataError

# Spans (text, is a target) in order, and true if an end-of-text token is still to be added.
Conversation = tuple[list[tuple[str, bool]], bool]


def require_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Refuses a tokenizer without a chat template for the data set at `path`.

    Raises:
      DataError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{path}: schema 'chat' needs a chat template, and the tokenizer "
            f"{tokenizer.name_or_path or ''} has none; add chat_template.jinja to the base model's "
            "folder, or use the schema 'completion'"
        )


def conversation_spans(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Conversation]:
    """Divides a conversation into spans of prompt and spans that the assistant wrote.

    Messages after the last assistant turn are dropped: they hold no target.

    Args:
      messages: messages with role and content; at least one is the assistant's, and not the first.
      tokenizer: tokenizer with a chat template.
      where: file and row, for messages.

    Raises:
      DataError: the template refuses the conversation, or its rendered answers do not begin with
        its generation prompt.
    """
    turns = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:number], tokenizer, where, answer_follows=True)
            through = render(messages[: number + 1], tokenizer, where)
            if not through.startswith(before):
                raise DataError(
                    f"{where}: message {number + 1}: the chat template renders this answer without "
                    "its generation prompt, so training would see another prompt than inference; "
                    "give the tokenizer another template"
                )
            turns.append((before, through))
    rendered = turns[-1][1]
    ends = _end_of_turn_texts(tokenizer)
    if all(rendered.startswith(text) for turn in turns for text in turn):
        return [_divide(turns, ends)]
    return [_divide([turn], ends) for turn in turns]


def _divide(turns: list[tuple[str, str]], ends: tuple[str, ...]) -> Conversation:
    rendered = turns[-1][1]
    spans, done = [], 0
    for before, through in turns:
        # Line breaks after the end of the turn belong to the template, not to the answer.
        answer = through.rstrip()
        stop = len(answer) if answer.endswith(ends) else len(through)
        spans.append((rendered[done : len(before)], False))
        spans.append((rendered[len(before) : stop], True))
        done = stop
    return spans, not rendered.rstrip().endswith(ends)


def _end_of_turn_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts of the tokens that can end a turn: special and added tokens."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return tuple({*added, *tokenizer.all_special_tokens} - {""})


def render(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    answer_follows: bool = False,
) -> str:
    """Renders a conversation with the tokenizer's chat template.

    Args:
      messages: messages with role and content.
      tokenizer: tokenizer with a chat template.
      where: file and row, for messages.
      answer_follows: if true, the text ends with the generation prompt of the next answer.

    Raises:
      DataError: the template refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=answer_follows
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{where}: the chat template refuses it ({first_line(error)})") from None
    assert isinstance(text, str)
    return text


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token with which the chat template ends an assistant turn; None if it writes none.

    Raises:
      DataError: the template refuses a short conversation.
    """
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}]
    after = render(conversation, tokenizer, "a conversation").rpartition("answer")[2].strip()
    ends = [text for text in _end_of_turn_texts(tokenizer) if after.startswith(text)]
    if not ends:
        return None
    token = tokenizer.convert_tokens_to_ids(max(ends, key=len))
    assert isinstance(token, int)
    return token
