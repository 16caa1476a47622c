"""Chat templates: programs of a tokenizer that render a list of messages as text."""

import datetime
import functools
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from moe_jax.config.data import Schema
from moe_jax.data.tokenizer import first_line
from moe_jax.errors import DataError

Message = dict[str, Any]
"""Turn of a conversation, with the keys `role` and `content`."""

_T = TypeVar("_T")

_DATE_FUNCTION = "strftime_now"
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True)
class ChatTemplate:
    """Chat template of a tokenizer, with all that it renders besides messages.

    Attributes:
      tokenizer: tokenizer with a chat template.
      where: file and row, for messages.
      date: date that the template takes for today, as YYYY-MM-DD; None is today.
      system: system message before the messages; empty for none.
      arguments: variables of the template: `tools`, `documents`, and further ones.
    """

    tokenizer: PreTrainedTokenizerBase
    where: str
    date: str | None = None
    system: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], answer_follows: bool = False) -> str:
        """Text of a conversation.

        A message without content, which holds tool calls, is given to the template as it is, and
        with an empty content if the template refuses that.

        Args:
          messages: messages with role and content.
          answer_follows: if true, the text ends with the generation prompt of the next answer.

        Raises:
          DataError: the template refuses the conversation.
        """
        return self._applied(functools.partial(self._text, answer_follows=answer_follows), messages)

    def generation_blocks(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Text of `render`, and start and end in it of each `generation` block.

        Raises:
          DataError: the template refuses the conversation.
        """
        return self._applied(self._text_and_blocks, messages)

    @property
    def has_generation_blocks(self) -> bool:
        """True if the template marks what the assistant writes with `{% generation %}`."""
        return _GENERATION.search(self._source()) is not None

    def without_argument(self, name: str) -> "ChatTemplate":
        """The same template with one variable less."""
        rest = {key: value for key, value in self.arguments.items() if key != name}
        return replace(self, arguments=rest)

    def _applied(self, apply: Callable[[list[Message]], _T], messages: Sequence[Message]) -> _T:
        """Result of `apply`, with empty contents if the template refuses messages without any."""
        if self.system:
            messages = [{"role": "system", "content": self.system}, *messages]
        try:
            try:
                return apply(list(messages))
            except (jinja2.UndefinedError, TypeError):
                complete = [{"content": "", **message} for message in messages]
                if complete == list(messages):
                    raise
                return apply(complete)
        except Exception as error:  # a template is a program, which can fail in any way
            raise DataError(
                f"{self.where}: the chat template refuses it ({first_line(error)})"
            ) from error

    def _text_and_blocks(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self._source(),
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.arguments},
        )
        (text,), (blocks,) = rendered
        return text, [(start, stop) for start, stop in blocks]

    def _text(self, messages: list[Message], answer_follows: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self._source(),
            tokenize=False,
            add_generation_prompt=answer_follows,
            **self.arguments,
        )
        assert isinstance(text, str)
        return text

    def _source(self) -> str:
        chosen = self.tokenizer.get_chat_template(tools=self.arguments.get("tools"))
        return chosen if self.date is None else _with_fixed_date(chosen, self.date)


@functools.lru_cache(maxsize=16)
def _with_fixed_date(template: str, date: str) -> str:
    """A template whose `strftime_now` formats the midnight that begins `date`.

    transformers takes no function as a variable of a template, so a macro hides its own.
    """
    if _DATE_FUNCTION not in template:
        return template
    day = datetime.datetime.fromisoformat(date)
    letters = set(string.ascii_letters) - {"s"}  # seconds since 1970, which depend on the time zone
    codes = {f"%{flag}{letter}" for flag in ("", "-") for letter in letters}
    texts = {code: day.strftime(code) for code in sorted(codes)}
    changed = {code: text for code, text in texts.items() if text != code}
    # The line break after the macro belongs to its block, as transformers sets `trim_blocks`.
    return (
        f"{{%- macro {_DATE_FUNCTION}(format) -%}}{{%- set result = namespace(text=format) -%}}"
        f"{{%- for code, text in {json.dumps(changed)}.items() -%}}"
        "{%- set result.text = result.text | replace(code, text) -%}"
        "{%- endfor -%}{{- result.text -}}{%- endmacro %}\n" + template
    )


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the chat template prints today's date."""
    return _DATE_FUNCTION in json.dumps(tokenizer.chat_template)


def reads_date(schema: Schema | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if rows of the schema can hold messages, and the chat template prints today's date."""
    return schema in ("chat", "preference", "feedback") and prints_date(tokenizer)


def require_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Refuses a tokenizer without a chat template for the data set or row at `path`.

    Raises:
      DataError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{path}: rendering messages needs a chat template, and the tokenizer "
            f"{tokenizer.name_or_path or ''} has none; add chat_template.jinja to the base model's "
            "folder, or give prompts and completions as texts"
        )


def end_of_turn_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts of the tokens that can end a turn: special and added tokens."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return tuple({*added, *tokenizer.all_special_tokens} - {""})


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token with which the chat template ends an assistant turn; None if it writes none.

    Raises:
      DataError: the template refuses a short conversation.
    """
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}]
    text = ChatTemplate(tokenizer, "a conversation").render(conversation)
    after = text.rpartition("answer")[2].strip()
    ends = [text for text in end_of_turn_texts(tokenizer) if after.startswith(text)]
    if not ends:
        return None
    token = tokenizer.convert_tokens_to_ids(max(ends, key=len))
    assert isinstance(token, int)
    return token
