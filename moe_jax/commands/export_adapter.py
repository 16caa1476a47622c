"""`moe-jax export`."""

import argparse
from pathlib import Path
from typing import get_args

import moe_jax
from moe_jax.commands import Run
from moe_jax.commands.choices import EXPORT_FORMATS, EXPORT_WEIGHTS
from moe_jax.config.model import FloatType


def add(parser: argparse.ArgumentParser) -> Run:
    """Write an adapter in the format of another tool, with a model card, and push it to the hub."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    formats = [f"  {name:9} {summary}" for name, summary in EXPORT_FORMATS.items()]
    parser.epilog = "\n".join(["formats:", *formats, _EXAMPLES])
    parser.add_argument(
        "--adapter",
        type=Path,
        required=True,
        metavar="DIR_OR_ID",
        help="a folder, as in WORKDIR/adapters/NAME, or a hub id",
    )
    parser.add_argument("--to", required=True, choices=tuple(EXPORT_FORMATS), help="see below")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="a folder that does not exist yet, or is empty",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(FloatType),
        default="float32",
        help="the type of the tensors that are written (default: %(default)s, what was trained)",
    )
    parser.add_argument(
        "--base",
        metavar="DIR_OR_ID",
        help="the base as the other tool will find it, and where that of a whole model is read "
        "(default: the path that it was trained with)",
    )
    parser.add_argument(
        "--weights",
        choices=EXPORT_WEIGHTS,
        help="llama: how experts become one, all alike or by their share of the tokens of --data "
        "(default: average)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="llama: text on which the KL divergence from the exact model is measured, a .txt or "
        "rows with a column `text`; needed for experts",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the export there once it is complete; log in with `hf auth login` before",
    )
    parser.add_argument(
        "--private",
        action="store_true",
        help="with --push-to-hub: make the repository for its owner alone",
    )
    parser.add_argument(
        "--revision",
        metavar="BRANCH",
        help="with --push-to-hub: the branch, made if there is none (default: the main one)",
    )
    parser.add_argument(
        "--commit-message", metavar="TEXT", help="with --push-to-hub: of the upload"
    )
    return _run


_EXAMPLES = """
  peft and mixlora take adapters on all bases; of Phi-3, Phi-4 and GLM-4, whose projections are
  stored fused, only those on the others. Whole models are written a matrix at a time and bring the
  tokenizer along. --dtype bfloat16 rounds each tensor once, to 8 bits: for logits of about one that
  is 1e-2, where float32 is exact to 1e-4.

examples:
  moe-jax export --adapter runs/mine/adapters/default --to peft --output exported
  moe-jax export --adapter runs/mine/adapters/default --to mixtral --dtype bfloat16 \\
      --output merged --push-to-hub me/merged --private
  moe-jax export --adapter runs/mine/adapters/default --to llama --weights utilisation \\
      --data text.txt --output dense"""


def _run(arguments: argparse.Namespace) -> None:
    notes = moe_jax.export_adapter(
        arguments.adapter,
        arguments.to,
        arguments.output,
        dtype=arguments.dtype,
        base=arguments.base,
        weights=arguments.weights,
        data=arguments.data,
        push_to_hub=arguments.push_to_hub,
        private=arguments.private,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
    )
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {arguments.output} ({arguments.to}, {arguments.dtype})")
