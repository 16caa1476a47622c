"""Prompts as token ids, in the format that training used."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_jax.config.parse import FieldError
from moe_jax.data.chat_template import ChatTemplate, Message
from moe_jax.data.prompt_template import load_prompt_template
from moe_jax.data.tokenizer import encode, encode_prompt
from moe_jax.data.values import check_text
from moe_jax.errors import DataError
from moe_jax.inference.settings import PromptFormat


class Prompt(NamedTuple):
    """Encoded prompt.

    Attributes:
      tokens: token ids.
      adapter: name of the adapter; None is the base alone.
      where: name of the prompt in error messages.
    """

    tokens: tuple[int, ...]
    adapter: str | None
    where: str


class PromptEncoder:
    """Encoder of texts and conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat):
        """Loads the prompt template, if the format has one.

        Raises:
          ConfigError: the tokenizer has no chat template, or the prompt template is named 'none'.
          DataError: the prompt template does not exist.
        """
        self._tokenizer = tokenizer
        self._format = prompt_format
        name = prompt_format.template
        if name is not None and name.lower() == "none" and not Path(name).exists():
            raise FieldError("template", "leave it out for none: the text is then given as it is")
        self._template = None if name is None else load_prompt_template(name)
        if prompt_format.chat and not tokenizer.chat_template:
            raise FieldError("chat", self._no_chat_template())

    def text(self, text: str, where: str, material: str = "") -> tuple[int, ...]:
        """Encodes a text in the encoder's format.

        Args:
          text: a prompt, an instruction, or a user's turn.
          where: name of the prompt in error messages.
          material: input of the instruction; for prompt templates only.

        Raises:
          DataError: the text is empty or not Unicode, or does not fit the format.
        """
        if not text.strip():
            raise DataError(f"{where}: is empty; give some text")
        if material and self._template is None:
            raise DataError(
                f"{where}: has an input, which only a prompt template takes; give a template too"
            )
        if self._format.chat:
            return self.conversation([{"role": "user", "content": text}], where)
        if self._template is not None:
            text = self._template.fill(text, material, where)
        check_text(text, where)
        return tuple(encode_prompt(self._tokenizer, text))

    def conversation(self, messages: Sequence[Message], where: str) -> tuple[int, ...]:
        """Encodes a conversation that ends before the assistant's turn.

        Raises:
          DataError: the conversation is invalid, or the tokenizer has no chat template or its
            template rejects the conversation.
        """
        if not self._tokenizer.chat_template:
            raise DataError(f"{where}: {self._no_chat_template()}")
        _check_messages(messages, where)
        system = self._format.system
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        text = ChatTemplate(self._tokenizer, where).render(messages, answer_follows=True)
        check_text(text, where)
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
                f"{where}: message {number}: must have the strings 'role' and 'content', got "
                f"{message!r:.60}"
            )
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: ends with the assistant's turn; end it with the user's")
