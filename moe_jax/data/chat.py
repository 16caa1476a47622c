"""Conversations rendered by a chat template, divided into prompts and the assistant's turns.

A template that marks the assistant's text with `{% generation %}` blocks, as transformers'
`return_assistant_tokens_mask` reads them, says itself what the targets are. For all others:
rendering the messages before an assistant turn with `add_generation_prompt` gives exactly the
prompt that the model sees at inference. The target is the remainder of the rendering up to and
including that turn: its content and the template's end of turn. Two properties of the template are
checked for every row:

- The rendered answer begins with the generation prompt. A template without this property would
  train the model on another prompt than the one it sees at inference, and is refused.
- A turn is rendered alike whatever follows it. A template without this property (some remove the
  reasoning from earlier turns) gives one example per assistant turn instead of one for all turns.

The whole conversation is rendered once. Answers 1, 2, 3, 5, 9, 17, ... are checked against it with
all messages before them. Every other one is rendered after the messages before the first answer and
the answer before it: what this adds must be what the whole conversation has next. So the text to
render grows with the length of a conversation, not with its square. An answer that fails this is
checked with all messages before it. One example per turn takes the square, as its text does.
"""

import bisect
import contextlib
from collections.abc import Sequence
from dataclasses import replace

from moe_jax.data.chat_template import ChatTemplate, Message, end_of_turn_texts
from moe_jax.data.messages import UNTRAINED
from moe_jax.errors import DataError

Span = tuple[str, bool | None]
"""Text, and whether it is a target; None if it is none even where prompts are targets."""

# Spans in order, and true if an end-of-text token is still to be added.
Conversation = tuple[list[Span], bool]

_TALKERS = ("user", "assistant")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field in transformers
_LOSABLE_KEYS = (("tool_calls",), _REASONING, ("name",))


def conversation_spans(messages: Sequence[Message], template: ChatTemplate) -> list[Conversation]:
    """Divides a conversation into spans of prompt and spans that the assistant wrote.

    Messages after the last answer to learn are dropped: they hold no target.

    Args:
      messages: messages with role and content; the first is not the assistant's. An answer with
        `UNTRAINED` is not learned.
      template: chat template.

    Returns:
      One conversation, or for some templates one per answer; none if no answer is to be learned.

    Raises:
      DataError: the template refuses the conversation, or its rendered answers do not begin with
        its generation prompt.
    """
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    while answers and UNTRAINED in messages[answers[-1]]:
        answers.pop()
    if not answers:
        return []
    targets = [None if UNTRAINED in messages[answer] else True for answer in answers]
    messages = _unmarked(messages[: answers[-1] + 1])
    ends = end_of_turn_texts(template.tokenizer)
    if template.has_generation_blocks:
        return [_divide_at_blocks(messages, targets, template, ends)]
    text = template.render(messages)
    places = _places(messages, answers, text, template)
    if places is not None:
        return [_divide(text, places, targets, ends)]
    conversations = []
    for number, answer in enumerate(answers):
        if targets[number]:
            before, through = _turn(messages, answer, template)
            places = [(len(before), len(through))]
            spans, lacks_end = _divide(through, places, [True], ends)
            if None in targets[:number]:  # the prompt holds an answer that must not be learned
                spans[0] = (before, None)
            conversations.append((spans, lacks_end))
    return conversations


def _places(
    messages: Sequence[Message], answers: Sequence[int], text: str, template: ChatTemplate
) -> list[tuple[int, int]] | None:
    """Start and end of each answer in `text`; None if not every turn is rendered as in it.

    Args:
      messages: conversation.
      answers: positions of the answers among the messages.
      text: the rendered conversation.
      template: chat template.
    """
    places: list[tuple[int, int]] = []
    for number, answer in enumerate(answers):
        place = None
        if number & (number - 1):  # neither 0 nor a power of two
            first, previous = messages[: answers[0]], answers[number - 1]
            part = [*first, *messages[previous : answer + 1]]
            with contextlib.suppress(DataError):  # of the shortened conversation
                seen = template.render(part[: len(first) + 1])
                place = _place(part, template, text, seen, places[-1][1])
        place = place or _place(messages[: answer + 1], template, text)
        if place is None:
            return None
        places.append(place)
    return places


def _place(
    messages: Sequence[Message], template: ChatTemplate, text: str, seen: str = "", known: int = 0
) -> tuple[int, int] | None:
    """Start and end in `text` of the last message, an answer; None if it is not rendered there.

    Args:
      messages: conversation that ends with the answer.
      template: chat template.
      text: a longer rendering.
      seen: beginning of the rendering of `messages` that stands for `text[:known]`.
      known: see `seen`.
    """
    before = template.render(messages[:-1], answer_follows=True)
    through = template.render(messages)
    is_alike = before.startswith(seen) and through.startswith(before)
    if not is_alike or not text.startswith(through[len(seen) :], known):
        return None
    shift = known - len(seen)
    return shift + len(before), shift + len(through)


def _divide_at_blocks(
    messages: Sequence[Message],
    targets: Sequence[bool | None],
    template: ChatTemplate,
    ends: tuple[str, ...],
) -> Conversation:
    """Divides a conversation at the template's `generation` blocks, any number for each answer."""
    text, blocks = template.generation_blocks(messages)
    numbers = [len(blocks)]
    if not all(targets):  # to know whose answer each block is
        ends_of_answers = [n for n, m in enumerate(messages, 1) if m["role"] == "assistant"]
        numbers = [len(template.generation_blocks(messages[:end])[1]) for end in ends_of_answers]
    some_each = numbers == sorted({0, *numbers})[1:] and numbers[-1:] == [len(blocks)]
    if len(blocks) < len(targets) or not some_each:
        raise DataError(
            f"{template.where}: the chat template writes {len(blocks)} generation blocks for "
            f"{len(targets)} answers, and not some for each; correct the template, or leave its "
            "generation blocks out"
        )
    spans: list[Span] = []
    done = 0
    for number, (start, stop) in enumerate(blocks):
        target = targets[bisect.bisect_right(numbers, number)]
        spans += [(text[done:start], False), (text[start:stop], target)]
        done = stop
    # An end of turn behind the last block is the template's choice: it is not learned.
    return spans, not text[blocks[-1][0] :].rstrip().endswith(ends)


def _turn(messages: Sequence[Message], answer: int, template: ChatTemplate) -> tuple[str, str]:
    """Rendering before and through the answer at position `answer`."""
    before = template.render(messages[:answer], answer_follows=True)
    through = template.render(messages[: answer + 1])
    if not through.startswith(before):
        raise DataError(
            f"{template.where}: message {answer + 1}: the chat template renders this answer "
            "without its generation prompt, so training would see another prompt than inference; "
            "give the tokenizer another template"
        )
    return before, through


def _divide(
    text: str,
    places: Sequence[tuple[int, int]],
    targets: Sequence[bool | None],
    ends: tuple[str, ...],
) -> Conversation:
    spans: list[Span] = []
    done, has_end = 0, False
    for (start, end), target in zip(places, targets, strict=True):
        # Line breaks after the end of the turn belong to the template, not to the answer.
        answer = text[start:end].rstrip()
        has_end = answer.endswith(ends)
        stop = start + len(answer) if has_end else end
        spans += [(text[done:start], False), (text[start:stop], target)]
        done = stop
    return spans, not has_end


def lost_fields(messages: Sequence[Message], template: ChatTemplate) -> list[str]:
    """Names of the fields of a conversation that its template leaves out.

    A field is left out if the rendering is the same without it. A key of messages is looked for
    where the conversation ends with the last message that has it, since templates may keep it in
    the last message only.

    Args:
      messages: messages with role and content.
      template: chat template.

    Raises:
      DataError: the template refuses the conversation.
    """
    messages = _unmarked(messages)
    roles = dict.fromkeys(m["role"] for m in messages if m["role"] not in _TALKERS)
    reduced = {name: (messages, template.without_argument(name)) for name in template.arguments}
    if template.system:
        reduced["a system message"] = messages, replace(template, system="")
    for role in roles:
        others = [message for message in messages if message["role"] != role]
        reduced[f"messages of the role {role!r}"] = others, template
    text = template.render(messages) if reduced else ""
    lost = [name for name, (others, rest) in reduced.items() if _renders(others, rest, text)]
    for keys in _LOSABLE_KEYS:
        having = [n for n, message in enumerate(messages) if not message.keys().isdisjoint(keys)]
        if not having:
            continue
        shown = messages[: having[-1] + 1]
        rest = [{k: v for k, v in message.items() if k not in keys} for message in shown]
        with contextlib.suppress(DataError):  # of a conversation that ends there
            if _renders(rest, template, template.render(shown)):
                lost.append(next(key for key in keys if key in shown[-1]))
    return lost


def _unmarked(messages: Sequence[Message]) -> list[Message]:
    return [{k: v for k, v in message.items() if k != UNTRAINED} for message in messages]


def _renders(messages: Sequence[Message], template: ChatTemplate, text: str) -> bool:
    """True if the template renders these messages as `text`; false if it refuses them."""
    try:
        return template.render(messages) == text
    except DataError:
        return False
