"""Outputs of `moe-jax generate`: stdout, a file of JSON lines, or an interactive conversation."""

import contextlib
import dataclasses
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moe_jax.config.parse import suggest
from moe_jax.errors import DataError, UserError, report
from moe_jax.files.atomic import write_atomic
from moe_jax.files.disk import disk_errors
from moe_jax.inference.api import InferenceSession
from moe_jax.inference.prompts import Message, Prompt, PromptEncoder
from moe_jax.inference.settings import GenerationConfig, PromptFormat
from moe_jax.inference.text_generator import Answer, TextGenerator
from moe_jax.loaded.inference_model import BASE
from moe_jax.terminal import print_shown

HELP = """\
/adapter NAME  changes the adapter; `base` is the base alone
/reset         clears the conversation
/help          shows this
Ctrl-C stops an answer, Ctrl-D ends."""

COMMANDS = ("/adapter", "/reset", "/help")


class AnswerPrinter:
    """Printer of answers in the order of their prompts."""

    def __init__(self, headings: Sequence[tuple[str, str]], samples: int):
        """Prepares an output.

        Args:
          headings: label and text of each prompt.
          samples: number of answers per prompt.
        """
        self._headings = headings
        self._order = [(i, sample) for i in range(len(headings)) for sample in range(samples)]
        self._samples = samples
        self._waiting: dict[tuple[int, int], Answer] = {}

    def add(self, answers: Sequence[Answer]) -> None:
        """Adds the answers of a batch; prints those whose predecessors are all printed."""
        self._waiting |= {(answer.prompt, answer.sample): answer for answer in answers}
        while self._order and self._order[0] in self._waiting:
            prompt, sample = self._order.pop(0)
            label, text = self._headings[prompt]
            if self._samples > 1:
                label += f", sample {sample + 1}"
            print_shown(f"[{label}] {text}\n{self._waiting.pop((prompt, sample)).text}\n")


class AnswerFile:
    """File of JSON lines, one per answer.

    Lines are appended as batches finish. At the end the file is replaced by one that is sorted by
    prompt. It is removed if there are no answers.
    """

    def __init__(self, file: Path, prompts: Sequence[Mapping[str, Any]], samples: int):
        """Prepares an output.

        Args:
          file: path of the file; must not exist.
          prompts: fields of each prompt, which come first in its lines.
          samples: number of answers per prompt.
        """
        self._file = file
        self._prompts = prompts
        self._total = len(prompts) * samples
        self._lines: dict[tuple[int, int], str] = {}
        self._open: Any = None

    def __enter__(self) -> Self:
        with disk_errors(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._open = self._file.open("x", encoding="utf-8")
        return self

    def add(self, answers: Sequence[Answer]) -> None:
        """Writes the answers of a batch."""
        with disk_errors(self._file, "earlier answers are in the file"):
            for prompt, sample, text, tokens, finish in answers:
                fields = dict(sample=sample, text=text, tokens=tokens, finish=finish)
                line = json.dumps({**self._prompts[prompt], **fields}, ensure_ascii=False) + "\n"
                self._lines[prompt, sample] = line
                self._open.write(line)
            self._open.flush()
        print_shown(f"{len(self._lines)} of {self._total} answers", file=sys.stderr)

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._open.close()
        if not self._lines:
            self._file.unlink()
        elif kind is None:
            ordered = "".join(self._lines[key] for key in sorted(self._lines))
            write_atomic(self._file, ordered, "all answers are in the file, but not sorted")
            print_shown(f"wrote {self._file}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print_shown(
                f"stopped; {len(self._lines)} of {self._total} answers are in {self._file}",
                file=sys.stderr,
            )


class Conversation:
    """Interactive session: reads lines and answers them until the input ends.

    With a chat template, the whole conversation is the prompt of each answer. Without one, each
    line is a separate prompt; an empty line continues the last answer, unless there is a prompt
    template.
    """

    def __init__(
        self,
        session: InferenceSession,
        encoder: PromptEncoder,
        prompt_format: PromptFormat,
        config: GenerationConfig,
        adapter: str | None,
    ):
        """Starts an empty conversation.

        Args:
          session: base, adapters and tokenizer.
          encoder: encoder of prompts in `prompt_format`.
          prompt_format: format of the prompts.
          config: settings of each answer.
          adapter: adapter of the first answer; None is the base.
        """
        self._session = session
        self._encoder = encoder
        self._is_chat = prompt_format.chat
        self._can_continue = not prompt_format.chat and prompt_format.template is None
        self._config = config
        self._adapter = adapter
        self._messages: list[Message] = []
        self._text = ""  # the last prompt and its answer
        self._turns = 0

    def run(self) -> None:
        """Runs until Ctrl-D or the end of the input; loads the weights before the first line."""
        generator = self._session.text_generator(is_chat=self._is_chat)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` line editing and a history
        if sys.stdin.isatty():
            _note(HELP)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                print_shown()
                return
            except KeyboardInterrupt:
                print_shown()
                _note("Ctrl-D ends")
                continue
            try:
                if line.split()[:1] and line.split()[0].startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line.strip() or (self._can_continue and self._text):
                    self._answer(line, generator)
            except UserError as error:
                report(error)

    def _command(self, name: str, argument: str = "") -> None:
        argument = argument.strip()
        if name == "/reset":
            self._messages, self._text = [], ""
            _note("conversation cleared")
        elif name == "/adapter":
            known = [BASE, *self._session.adapters]
            if argument not in known:
                _note(f"{argument or 'no name'}: {suggest(argument, known)}")
                return
            self._adapter = None if argument == BASE else argument
            _note(f"adapter: {argument}")
        elif name == "/help":
            _note(HELP)
        else:
            _note(f"{name}: unknown; {suggest(name, COMMANDS)}")

    def _answer(self, line: str, generator: TextGenerator) -> None:
        messages: list[Message] = []
        if self._is_chat:
            messages = [*self._messages, {"role": "user", "content": line}]
            tokens = self._encoder.conversation(messages, "the conversation")
        else:
            line = line if line.strip() else self._text
            tokens = self._encoder.text(line, "the prompt")
        room = self._session.context - len(tokens)
        if room < 1:
            raise DataError(
                f"with this line there are {len(tokens)} tokens, and the context of "
                f"{self._session.context} has no room for an answer; /reset clears it"
            )
        config = dataclasses.replace(
            self._config, max_new_tokens=min(room, self._config.max_new_tokens)
        )
        prompt = Prompt(tokens, self._adapter, "the prompt")
        self._session.check([prompt], config)
        answer, is_cut = "", False
        with contextlib.suppress(KeyboardInterrupt), _deferred_interrupt() as is_interrupted:
            with contextlib.closing(generator.stream(prompt, config, self._turns)) as pieces:
                for piece in pieces:
                    print_shown(piece.text, end="")
                    answer += piece.text
                    is_cut = piece.finish == "length"
                    if is_interrupted():
                        break
        print_shown()
        if is_cut:
            _note(self._reason_for_cut(room))
        self._turns += 1
        self._text = line + answer
        if self._is_chat:
            self._messages = [*messages, {"role": "assistant", "content": answer}]

    def _reason_for_cut(self, room: int) -> str:
        if room <= self._config.max_new_tokens:
            return f"(the context of {self._session.context} tokens is full; /reset clears it)"
        advice = "; an empty line continues" if self._can_continue else ""
        return f"(stopped at --max-new-tokens {self._config.max_new_tokens}{advice})"


def _note(text: str) -> None:
    """Prints something that is not part of an answer."""
    print_shown(text, file=sys.stderr)


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Defers Ctrl-C, so that the current step is completed; yields a check for it.

    A second Ctrl-C raises KeyboardInterrupt, because compilation may take long.
    """
    is_interrupted = False

    def handle(*_: object) -> None:
        nonlocal is_interrupted
        if is_interrupted:
            raise KeyboardInterrupt
        is_interrupted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals only arrive in the main thread
        return
    former = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: is_interrupted
    finally:
        signal.signal(signal.SIGINT, former)
