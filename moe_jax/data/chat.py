"""Which part of a rendered conversation the assistant wrote, for any chat template.

A template is a program that renders a list of messages. Rendering the messages before an assistant
turn with `add_generation_prompt` gives exactly what the model will see when it is to answer; what
the rendering up to and including that turn has beyond it is the target: the content and the
template's end of turn. This needs two properties of the template, both checked for every row:

- the generation prompt is how the rendered answer begins; a template without this property would
  be trained on another prompt than it is used with, and is refused;
- a turn is rendered alike whatever follows it. A template without this property (some take the
  reasoning out of earlier turns) gives one example per assistant turn instead of one for all.
"""

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from moe_jax.data.tokenizer import first_line
from moe_jax.errors import DataError

# (text, is it a target) in order, and whether an end-of-text token is still to be added.
Conversation = tuple[list[tuple[str, bool]], bool]


def require_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Refuses a tokenizer without chat template for the data set at `path`.

    Raises:
      DataError: there is none.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{path}: schema 'chat' needs a chat template, and the tokenizer "
            f"{tokenizer.name_or_path or ''} has none; add chat_template.jinja to the base model's "
            "folder, or use the schema 'completion'"
        )


def conversation_pieces(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[Conversation]:
    """Cuts a conversation into what is given and what the assistant wrote.

    Messages after the last assistant turn are left out: nothing is learnt from them.

    Args:
      messages: with role and content; the first is not the assistant's, at least one is.
      tokenizer: has a chat template.
      where: file and row, for messages.

    Raises:
      DataError: the template refuses the conversation, or its generation prompt is not how its
        answers begin.
    """
    turns = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(messages[:number], tokenizer, where, answer_follows=True)
            through = render(messages[: number + 1], tokenizer, where)
            if not through.startswith(before):
                raise DataError(
                    f"{where}: message {number + 1}: the chat template's generation prompt is not "
                    "how it renders this answer, so training would see another prompt than use; "
                    "give the tokenizer another template"
                )
            turns.append((before, through))
    whole = turns[-1][1]
    ends = _end_of_turns(tokenizer)
    if all(whole.startswith(text) for turn in turns for text in turn):
        return [_cut(turns, ends)]
    return [_cut([turn], ends) for turn in turns]


def _cut(turns: list[tuple[str, str]], ends: tuple[str, ...]) -> Conversation:
    whole = turns[-1][1]
    pieces, done = [], 0
    for before, through in turns:
        # Line breaks after the end of the turn are the template's, not the answer's.
        answer = through.rstrip()
        stop = len(answer) if answer.endswith(ends) else len(through)
        pieces.append((whole[done : len(before)], False))
        pieces.append((whole[len(before) : stop], True))
        done = stop
    return pieces, not whole.rstrip().endswith(ends)


def _end_of_turns(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts of the tokens that can end a turn: the special and the added ones."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return tuple({*added, *tokenizer.all_special_tokens} - {""})


def render(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    answer_follows: bool = False,
) -> str:
    """A conversation as the model reads it, by the tokenizer's chat template.

    Args:
      messages: with role and content.
      tokenizer: has a chat template.
      where: for messages.
      answer_follows: ends with what stands before the assistant's next answer.

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
    """The token with which the chat template ends an assistant's turn; None if it writes none.

    Raises:
      DataError: the template refuses a short conversation.
    """
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}]
    after = render(conversation, tokenizer, "a conversation").rpartition("answer")[2].strip()
    ends = [text for text in _end_of_turns(tokenizer) if after.startswith(text)]
    if not ends:
        return None
    token = tokenizer.convert_tokens_to_ids(max(ends, key=len))
    assert isinstance(token, int)
    return token
