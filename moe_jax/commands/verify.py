"""`moe-jax verify`."""

import argparse

from moe_jax.commands import Run
from moe_jax.commands.arguments import add_dtype
from moe_jax.errors import ConfigError, memory_errors
from moe_jax.terminal import print_shown

EPILOG = """\
checks:
  logits and greedy text against transformers, two training steps of LoRA and MixLoRA, the frozen
  base, and the export to peft and to a whole model, each read back. Comparisons with transformers
  and peft need torch, and are left out without it. The output can be pasted into a bug report.

example:
  moe-jax verify --base models/llama

exit status:
  0 all checks passed; 1 a check failed; 2 the base cannot be read.
"""


def add(parser: argparse.ArgumentParser) -> Run:
    """Check that a base computes, trains and is exported as in transformers and peft."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "--base", required=True, metavar="DIR_OR_ID", help="folder or hub id of the model"
    )
    parser.add_argument("--revision", metavar="REVISION", help="revision of a hub id")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=32,
        metavar="N",
        help="tokens of the text, and tokens that are generated (default: %(default)s)",
    )
    add_dtype(parser)
    return _run


def _run(arguments: argparse.Namespace) -> int:
    if arguments.max_tokens < 4:
        raise ConfigError(f"--max-tokens: must be at least 4, got {arguments.max_tokens}")
    from moe_jax.verification.checks import verify_base

    with memory_errors("a smaller --max-tokens, or --dtype bfloat16"):
        checks = verify_base(
            arguments.base,
            arguments.revision,
            max_tokens=arguments.max_tokens,
            dtype=arguments.dtype,
            say=print_shown,
        )
    failed = [check.name for check in checks if check.passed is False]
    skipped = sum(check.passed is None for check in checks)
    passed = len(checks) - len(failed) - skipped
    print_shown(f"{passed} passed, {len(failed)} failed, {skipped} skipped")
    if failed:
        print_shown(f"failed: {', '.join(failed)}")
    return 1 if failed else 0
