"""`moe-jax generate --interactive`: a conversation, or one prompt after the other."""

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from moe_jax.config.parse import suggest
from moe_jax.errors import DataError, UserError, report
from moe_jax.inference.api import InferenceSession
from moe_jax.inference.prompts import Message, Prompt, PromptEncoder, PromptFormat
from moe_jax.inference.text_generator import GenerationConfig, TextGenerator
from moe_jax.loaded.model import BASE

HELP = """\
/adapter NAME  another adapter answers from here on, or `base`
/reset         forgets what was said
/help          shows this
Ctrl-C stops an answer, Ctrl-D ends."""

COMMANDS = ("/adapter", "/reset", "/help")


class Talk:
    """Reads lines and answers them until the input ends.

    With a chat template the whole conversation is the prompt of each answer. Without, each line is
    a prompt of its own; after one without a prompt template, an empty line goes on with the answer.
    """

    def __init__(
        self,
        session: InferenceSession,
        encoder: PromptEncoder,
        prompt_format: PromptFormat,
        config: GenerationConfig,
        adapter: str | None,
    ):
        """Gets ready; the base's weights are read before the first line is.

        Args:
          session: what answers.
          encoder: makes prompts, in `prompt_format`.
          prompt_format: whether it is a conversation.
          config: of each answer.
          adapter: that answers first; None is the base.
        """
        self._session = session
        self._encoder = encoder
        self._is_chat = prompt_format.chat
        self._can_go_on = not prompt_format.chat and prompt_format.template is None
        self._config = config
        self._adapter = adapter
        self._messages: list[Message] = []
        self._text = ""  # the last prompt and its answer
        self._turns = 0

    def run(self) -> None:
        """Talks, until Ctrl-D or the end of the input."""
        generator = self._session.text_generator(is_chat=self._is_chat)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lets `input` edit lines and remember them
        if sys.stdin.isatty():
            _say(HELP)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                _say("Ctrl-D ends")
                continue
            try:
                if line.split()[:1] and line.split()[0].startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line.strip() or (self._can_go_on and self._text):
                    self._answer(line, generator)
            except UserError as error:
                report(error)

    def _command(self, name: str, argument: str = "") -> None:
        if name == "/reset":
            self._messages, self._text = [], ""
            _say("forgotten")
        elif name == "/adapter":
            known = [BASE, *self._session.adapters]
            if argument.strip() not in known:
                _say(f"{argument.strip() or 'no name'}: {suggest(argument.strip(), known)}")
                return
            self._adapter = None if argument.strip() == BASE else argument.strip()
            _say(f"{argument.strip()} answers")
        elif name == "/help":
            _say(HELP)
        else:
            _say(f"{name}: unknown; {suggest(name, COMMANDS)}")

    def _answer(self, line: str, generator: TextGenerator) -> None:
        if self._is_chat:
            asked: list[Message] = [*self._messages, {"role": "user", "content": line}]
            tokens = self._encoder.conversation(asked, "the conversation")
        else:
            asked = []
            line = line if line.strip() else self._text
            tokens = self._encoder.text(line, "the prompt")
        room = self._session.context - len(tokens)
        if room < 1:
            raise DataError(
                f"with this there are {len(tokens)} tokens, and the context of "
                f"{self._session.context} has no room for an answer; /reset begins anew"
            )
        config = dataclasses.replace(
            self._config, max_new_tokens=min(room, self._config.max_new_tokens)
        )
        prompt = Prompt(tokens, self._adapter, "the prompt")
        self._session.check([prompt], config)
        answer, is_cut = "", False
        with contextlib.suppress(KeyboardInterrupt), _interrupts_noted() as is_interrupted:
            with contextlib.closing(generator.stream(prompt, config, self._turns)) as pieces:
                for piece in pieces:
                    print(piece.text, end="", flush=True)
                    answer += piece.text
                    is_cut = piece.finish == "length"
                    if is_interrupted():
                        break
        print()
        if is_cut:
            _say(self._why_cut(room))
        self._turns += 1
        self._text = line + answer
        if self._is_chat:
            self._messages = [*asked, {"role": "assistant", "content": answer}]

    def _why_cut(self, room: int) -> str:
        if room <= self._config.max_new_tokens:
            return f"(the context of {self._session.context} tokens is full; /reset begins anew)"
        more = "; an empty line goes on" if self._can_go_on else ""
        return f"({self._config.max_new_tokens} tokens, as --max-new-tokens says{more})"


def _say(text: str) -> None:
    """Tells the user something that is no answer."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _interrupts_noted() -> Iterator[Callable[[], bool]]:
    """While entered, a first Ctrl-C is only noted, so that a step is not left half done.

    A second one is a KeyboardInterrupt: compiling may take long.
    """
    noted = False

    def note(*_: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # no signal arrives here
        return
    former = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, former)
