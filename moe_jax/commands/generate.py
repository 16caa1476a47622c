"""`moe-jax generate`."""

import argparse
import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_jax.commands import Run
from moe_jax.commands.arguments import (
    LESS_MEMORY_FLAGS,
    add_adapters,
    add_base,
    add_dtype,
    add_mesh,
    base_path,
    mesh_config,
    named_folders,
    unescaped,
)
from moe_jax.config.parse import suggest
from moe_jax.data.files import file_kind
from moe_jax.errors import ConfigError, DataError, memory_errors
from moe_jax.inference.settings import (
    GenerateSettings,
    GenerationConfig,
    SamplingConfig,
    parse_settings,
)
from moe_jax.terminal import print_shown

if TYPE_CHECKING:  # jax and transformers are imported when the command runs, not for --help
    from moe_jax.inference.prompts import PromptEncoder

EPILOG = """\
prompts:
  --prompt TEXT is continued as it is. With --chat it is the user's turn of a conversation, with
  --template the instruction of a prompt template, as in training. --prompts FILE holds several:

    .txt     one prompt per line; blank lines are skipped
    .jsonl   one object per line (.json, .csv, .parquet and the other kinds of training data: one
             per row) with `prompt`, or `messages` for a conversation of role and content; optional:
             `adapter` (name of a loaded adapter, or `base`), `input` (for --template) and `id`
             (repeated in the output)

  A prompt that does not name an adapter is answered by each --adapter, side by side in a batch.

interactive:
  With --chat, a conversation. Otherwise each line is a prompt, and an empty line continues the
  last answer. Ctrl-C stops an answer, Ctrl-D ends. /adapter NAME changes the adapter, /reset
  clears the conversation, /help lists these commands.

output:
  The answer to a single prompt appears on stdout while it is generated. --output FILE.jsonl gets
  one line per answer as batches finish, and is sorted by prompt at the end. Fields: index, id,
  prompt or messages, adapter, sample, text, tokens, finish (`stop` or `length`).

examples:
  moe-jax generate --adapter runs/mine/adapters/default --prompt "Once upon a time"
  moe-jax generate --base models/llama --adapter a=runs/a --adapter b=runs/b --with-base \\
      --prompts questions.jsonl --temperature 0.7 --top-p 0.9 --samples 4 --output answers.jsonl
  moe-jax generate --base models/llama-chat --chat --system "Answer in one sentence." --interactive
"""

FIELDS = ("prompt", "messages", "input", "adapter", "id")

_HEADING_LENGTH = 60
"""Number of characters of a prompt in the heading of its answer."""


def add(parser: argparse.ArgumentParser) -> Run:
    """Generate text from prompts or interactively, with a base or with adapters on it."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_base(parser)
    add_adapters(parser)
    parser.add_argument("--with-base", action="store_true", help="answer with the base alone too")
    prompts = parser.add_argument_group("prompts (one of these)")
    prompts.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given several times"
    )
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="see below")
    prompts.add_argument(
        "--interactive", action="store_true", help="read prompts from the terminal; see below"
    )

    prompt_format = parser.add_argument_group("prompt format")
    prompt_format.add_argument(
        "--chat", action="store_true", help="use the tokenizer's chat template"
    )
    prompt_format.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    prompt_format.add_argument(
        "--template",
        metavar="NAME",
        help="prompt template: bare, instruction, question, or a file (default: the text as it is)",
    )
    _add_sampling(parser.add_argument_group("sampling"))
    _add_answers(parser.add_argument_group("answers"))
    computation = parser.add_argument_group("computation")
    computation.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="answers generated side by side (default: %(default)s)",
    )
    add_dtype(computation)
    add_mesh(computation)
    return _run


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--temperature",
        type=float,
        default=SamplingConfig.temperature,
        metavar="X",
        help="0 is greedy decoding (default); below 1 sharpens the distribution, above 1 flattens",
    )
    group.add_argument(
        "--top-k", type=int, metavar="N", help="sample from the N most likely tokens"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=SamplingConfig.top_p,
        metavar="X",
        help="sample from the most likely tokens with a total probability of X",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=SamplingConfig.min_p,
        metavar="X",
        help="sample from tokens with at least X times the largest probability",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=SamplingConfig.repetition_penalty,
        metavar="X",
        help="above 1 makes tokens that occurred before less likely",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=GenerationConfig.seed,
        metavar="N",
        help="random seed (default: %(default)s)",
    )


def _add_answers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=GenerationConfig.max_new_tokens,
        metavar="N",
        help="largest number of tokens of an answer (default: %(default)s)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end an answer before this text; \n is a line break; may be given several times",
    )
    group.add_argument(
        "--samples",
        type=int,
        default=GenerationConfig.samples,
        metavar="N",
        help="answers per prompt (default: %(default)s)",
    )
    group.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a new file; see below")


class UserPrompt(NamedTuple):
    """Prompt from the command line or from a file.

    Attributes:
      where: name of the prompt in error messages.
      text: text; empty if there are `messages`.
      messages: conversation.
      material: input of an instruction.
      adapter: name of the adapter, None for the base; valid if `has_adapter`.
      has_adapter: true if the prompt names an adapter or the base.
      id: identifier that results repeat.
    """

    where: str
    text: str = ""
    messages: Any = None
    material: str = ""
    adapter: str | None = None
    has_adapter: bool = False
    id: Any = None


class _Query(NamedTuple):
    """Prompt number `number` (from 0) for one adapter; None is the base."""

    number: int
    prompt: UserPrompt
    adapter: str | None


def _run(arguments: argparse.Namespace) -> None:
    with memory_errors(f"a smaller --batch-size or --max-new-tokens, {LESS_MEMORY_FLAGS}"):
        generate(arguments)


def generate(arguments: argparse.Namespace) -> None:
    """Answers the prompts. All flags are checked before the weights of the base are read."""
    from moe_jax.commands.generate_output import AnswerFile, AnswerPrinter, Conversation
    from moe_jax.inference.api import InferenceSession
    from moe_jax.inference.prompts import Prompt
    from moe_jax.loaded.inference_model import BASE

    _check_flags(arguments)
    adapters = named_folders(arguments.adapter)
    if BASE in adapters:
        raise ConfigError(f"--adapter: {BASE!r} is the base's name; give another with NAME=DIR")
    settings = {k: v for k, v in vars(arguments).items() if k in GenerateSettings.__annotations__}
    config, prompt_format = parse_settings(
        {**settings, "stop": [unescaped(text) for text in arguments.stop]}
    )
    user_prompts = _user_prompts(arguments)
    session = InferenceSession.open(
        base_path(arguments.base, adapters, arguments.revision),
        adapters,
        revision=arguments.revision,
        dtype=arguments.dtype,
        mesh=mesh_config(arguments.mesh),
    )
    if session.unread_note is not None:
        print_shown(session.unread_note, file=sys.stderr)
    encoder = session.encoder(prompt_format)
    names = [*([None] if arguments.with_base or not adapters else []), *adapters]
    if arguments.interactive:
        session.require_language_models()
        Conversation(session, encoder, prompt_format, config, names[0]).run()
        return
    queries = [
        _Query(number, prompt, name)
        for number, prompt in enumerate(user_prompts)
        for name in ([prompt.adapter] if prompt.has_adapter else names)
    ]
    prompts = [
        Prompt(_encode(encoder, query.prompt), query.adapter, query.prompt.where)
        for query in queries
    ]
    session.check(prompts, config)
    is_chat = arguments.chat or any(prompt.messages is not None for prompt in user_prompts)
    try:
        if arguments.output is None and len(prompts) == config.samples == 1:
            for piece in session.text_generator(is_chat=is_chat).stream(prompts[0], config):
                print_shown(piece.text, end="")
            print_shown()
            return
        if arguments.output is None:
            printer = AnswerPrinter(_headings(queries, BASE), config.samples)
            destination = contextlib.nullcontext(printer)
        else:
            destination = AnswerFile(arguments.output, [*map(_fields, queries)], config.samples)
        with destination as output:
            generator = session.text_generator(is_chat=is_chat)
            for answers in generator.answers(prompts, config, arguments.batch_size):
                output.add(answers)
    except KeyboardInterrupt:
        print_shown(file=sys.stderr)
        sys.exit(130)


def _check_flags(arguments: argparse.Namespace) -> None:
    sources = {
        "--prompt": bool(arguments.prompt),
        "--prompts": arguments.prompts is not None,
        "--interactive": arguments.interactive,
    }
    given = [flag for flag, is_given in sources.items() if is_given]
    if len(given) != 1:
        raise ConfigError(
            f"give one of {', '.join(sources)}; got {' and '.join(given) or 'none of them'}"
        )
    if arguments.interactive and (arguments.output is not None or arguments.samples != 1):
        raise ConfigError("--interactive: cannot be combined with --output or --samples")
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size: must be positive, got {arguments.batch_size}")
    if arguments.output is not None:
        if arguments.output.suffix.lower() != ".jsonl":
            raise ConfigError(f"--output {arguments.output}: must end in .jsonl")
        if arguments.output.exists():
            raise ConfigError(f"--output {arguments.output}: exists already; give a new name")


def _user_prompts(arguments: argparse.Namespace) -> list[UserPrompt]:
    if arguments.prompts is not None:
        return read_prompts(arguments.prompts.expanduser())
    several = len(arguments.prompt) > 1
    return [
        UserPrompt(f"--prompt {number}" if several else "--prompt", text)
        for number, text in enumerate(arguments.prompt, 1)
    ]


def read_prompts(path: Path) -> list[UserPrompt]:
    """Reads the prompts of a file.

    Raises:
      DataError: the file is unreadable or has no prompts, or a row is invalid.
    """
    from moe_jax.data.readers import read_lines, read_rows

    if file_kind(path) == ".txt":
        lines = ((where, line.rstrip("\r\n")) for where, line in read_lines(path))
        prompts = [UserPrompt(where, line) for where, line in lines if line.strip()]
    else:
        prompts = [_user_prompt(row, where) for where, row in read_rows(path)]
    if not prompts:
        raise DataError(f"{path}: has no prompts")
    return prompts


def _user_prompt(row: Any, where: str) -> UserPrompt:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row must be an object with named columns, got {row!r:.40}")
    for name in row:
        if name not in FIELDS:
            raise DataError(f"{where}: unknown column {name!r}; {suggest(str(name), FIELDS)}")
    texts = {name: row.get(name) for name in ("prompt", "input", "adapter")}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: column {name!r} must be text, got {value!r:.40}")
    if (texts["prompt"] is None) == (row.get("messages") is None):
        raise DataError(f"{where}: must have either the column 'prompt' or the column 'messages'")
    return UserPrompt(
        where,
        texts["prompt"] or "",
        row.get("messages"),
        texts["input"] or "",
        texts["adapter"],
        "adapter" in row,
        row.get("id"),
    )


def _encode(encoder: "PromptEncoder", prompt: UserPrompt) -> tuple[int, ...]:
    if prompt.messages is not None:
        return encoder.conversation(prompt.messages, prompt.where)
    return encoder.text(prompt.text, prompt.where, prompt.material)


def _headings(queries: list[_Query], base: str) -> list[tuple[str, str]]:
    """Label and shortened text of each prompt, for `AnswerPrinter`."""
    has_adapters = any(query.adapter is not None for query in queries)
    headings = []
    for number, prompt, adapter in queries:
        label = f"prompt {number + 1}" + (f", {adapter or base}" if has_adapters else "")
        line = " ".join((prompt.text or str(prompt.messages[-1]["content"])).split())
        is_long = len(line) > _HEADING_LENGTH
        headings.append((label, line[:_HEADING_LENGTH] + "..." if is_long else line))
    return headings


def _fields(query: _Query) -> dict[str, Any]:
    """Fields of a prompt in the output file, before those of its answer."""
    number, prompt, adapter = query
    fields: dict[str, Any] = {"index": number}
    if prompt.id is not None:
        fields["id"] = prompt.id
    if prompt.messages is None:
        fields["prompt"] = prompt.text
        if prompt.material:
            fields["input"] = prompt.material
    else:
        fields["messages"] = prompt.messages
    return {**fields, "adapter": adapter}
