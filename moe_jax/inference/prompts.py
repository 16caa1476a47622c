"""What a user says as the tokens that the model reads, just as training would have shown them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_jax.config.parse import FieldError, require
from moe_jax.data.chat import render
from moe_jax.data.prompt_template import load_prompt_template
from moe_jax.data.tokenizer import encode, encode_prompt
from moe_jax.errors import DataError

Message = dict[str, Any]
"""A turn of a conversation: `role` and `content`."""


@dataclass(frozen=True)
class PromptFormat:
    """How a text becomes a prompt.

    Attributes:
      chat: it is a user's turn, and the tokenizer's chat template says what stands around it.
      system: the system message that conversations begin with; with `chat` only.
      template: it is an instruction, for a prompt template as in training: the name of one in
        `moe_jax/data/prompts/`, or a file. Without `chat` and `template` the text is the prompt.

    Raises:
      ConfigError: fields contradict each other.
    """

    chat: bool = False
    system: str | None = None
    template: str | None = None

    def __post_init__(self):
        require(
            not (self.chat and self.template),
            "template",
            "is for prompts without a chat template; give it or `chat`, not both",
        )
        require(
            self.chat or self.system is None,
            "system",
            "a system message is for conversations; give `chat` too",
        )


class Prompt(NamedTuple):
    """A prompt as the model reads it.

    Attributes:
      tokens: its ids.
      adapter: whose it is; None is the base as it is.
      where: names it in messages.
    """

    tokens: tuple[int, ...]
    adapter: str | None
    where: str


class PromptEncoder:
    """Makes prompts of texts and of conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat):
        """Reads the prompt template, if there is one.

        Raises:
          ConfigError: the tokenizer has no chat template.
          DataError: there is no such template.
        """
        self._tokenizer = tokenizer
        self._format = prompt_format
        name = prompt_format.template
        self._template = None if name is None else load_prompt_template(name)
        if prompt_format.chat and not tokenizer.chat_template:
            raise FieldError("chat", self._no_chat_template())

    def text(self, text: str, where: str, material: str = "") -> tuple[int, ...]:
        """The ids of a text in the encoder's format.

        Args:
          text: a prompt, an instruction, or what a user says.
          where: for messages.
          material: the instruction's input; for a prompt template only.

        Raises:
          DataError: the text is empty, or does not go with the format.
        """
        if not text.strip():
            raise DataError(f"{where}: is empty; write something for the model to continue")
        if material and self._template is None:
            raise DataError(f"{where}: has an input, which only a prompt template has a place for")
        if self._format.chat:
            return self.conversation([{"role": "user", "content": text}], where)
        if self._template is not None:
            text = self._template.fill(text, material, where)
        return tuple(encode_prompt(self._tokenizer, text))

    def conversation(self, messages: Sequence[Message], where: str) -> tuple[int, ...]:
        """The ids of a conversation that the assistant is to go on with.

        Raises:
          DataError: the tokenizer has no chat template, it refuses the conversation, or that is
            none.
        """
        if not self._tokenizer.chat_template:
            raise DataError(f"{where}: {self._no_chat_template()}")
        _check_messages(messages, where)
        system = self._format.system
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        text = render(messages, self._tokenizer, where, answer_follows=True)
        return tuple(encode(self._tokenizer, [text])[0])

    def _no_chat_template(self) -> str:
        return (
            f"the tokenizer {self._tokenizer.name_or_path or ''} has no chat template; add "
            "chat_template.jinja to the base's folder, or give plain prompts"
        )


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f"{where}: a conversation must be a list of messages, got {messages!r:.60}")
    for number, message in enumerate(messages, 1):
        is_object = isinstance(message, Mapping)
        fields = (message.get("role"), message.get("content")) if is_object else (None,)
        if not all(isinstance(text, str) for text in fields):
            raise DataError(
                f"{where}: message {number}: must have the texts 'role' and 'content', got "
                f"{message!r:.60}"
            )
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: ends with the assistant, which then has nothing to answer")
