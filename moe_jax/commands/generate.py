"""`moe-jax generate`."""

import argparse
from pathlib import Path

from moe_jax.commands import Run
from moe_jax.commands.arguments import LESS_MEMORY_FLAGS, add_adapters, add_dtype, add_mesh

EPILOG = """\
prompts:
  --prompt TEXT is continued as it is; with --chat it is the user's turn of a conversation, and with
  --template the instruction in a prompt such as training makes. --prompts FILE holds several:

    .txt     a prompt a line; blank lines are skipped
    .jsonl   an object a line (.json, .parquet: a row each) with `prompt`, or `messages` for a
             conversation of role and content; optional `adapter` (the name of one that is loaded,
             or `base`), `input` (for --template) and `id` (repeated in the output)

  Every prompt that does not name an adapter is answered by each --adapter, side by side in a batch.

interactive:
  With --chat, a conversation; otherwise each line is a prompt, and an empty one goes on with the
  last answer. Ctrl-C stops an answer, Ctrl-D ends. /adapter NAME changes the adapter, /reset
  forgets the conversation, /help lists these.

output:
  The answer to a single prompt appears on stdout while it is written. --output FILE.jsonl gets a
  line for each answer as the batches finish, and is put in the order of the prompts at the end:
  index, id, prompt or messages, adapter, sample, text, tokens, finish (`stop` or `length`).

examples:
  moe-jax generate --adapter runs/mine/adapters/default --prompt "Once upon a time"
  moe-jax generate --base models/llama --adapter a=runs/a --adapter b=runs/b --with-base \\
      --prompts questions.jsonl --temperature 0.7 --top-p 0.9 --samples 4 --output answers.jsonl
  moe-jax generate --base models/llama-chat --chat --system "Answer in one sentence." --interactive
"""


def add(parser: argparse.ArgumentParser) -> Run:
    """Continue prompts or talk, with a base or with adapters on it."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "--base",
        help="folder in the Hugging Face format, or hub id (default: the adapter's own)",
    )
    parser.add_argument("--revision", help="of a hub id")
    add_adapters(parser)
    parser.add_argument(
        "--with-base", action="store_true", help="let the base without an adapter answer too"
    )

    asked = parser.add_argument_group("what to answer (one of these)")
    asked.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given several times"
    )
    asked.add_argument("--prompts", type=Path, metavar="FILE", help="see below")
    asked.add_argument("--interactive", action="store_true", help="talk; see below")

    form = parser.add_argument_group("what stands around a prompt")
    form.add_argument("--chat", action="store_true", help="the tokenizer's chat template")
    form.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    form.add_argument(
        "--template", metavar="NAME", help="prompt template: bare, instruction, question, or a file"
    )

    picked = parser.add_argument_group("how tokens are picked")
    picked.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 takes the likeliest token (default); below 1 sharpens, above 1 flattens",
    )
    picked.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest only")
    picked.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="from those that together pass X"
    )
    picked.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="from those X times the likeliest"
    )
    picked.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1 makes tokens rarer that were there already",
    )
    picked.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)"
    )

    length = parser.add_argument_group("how much")
    length.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        metavar="N",
        help="of an answer (default: 128)",
    )
    length.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end an answer before this; \n is a line break; may be given several times",
    )
    length.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers to each prompt (default: 1)"
    )
    length.add_argument("--output", type=Path, metavar="FILE.jsonl", help="a new file; see below")

    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="answers written side by side (default: 8)",
    )
    add_dtype(machine)
    add_mesh(machine)
    return _run


def _run(arguments: argparse.Namespace) -> None:
    # With libraries that other commands do not need.
    from moe_jax.commands.answering import run
    from moe_jax.sharding.memory import memory_errors

    with memory_errors(f"give a smaller --batch-size or --max-new-tokens, {LESS_MEMORY_FLAGS}"):
        run(arguments)
