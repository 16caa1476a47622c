"""`moe-jax export` and `moe-jax import`."""

import argparse
import sys
from pathlib import Path
from typing import get_args

import moe_jax
from moe_jax.commands import Run
from moe_jax.commands.arguments import EXPORT_FORMATS, EXPORT_WEIGHTS, add_output
from moe_jax.config.model import FloatType
from moe_jax.terminal import print_shown

_EXAMPLES = """
  peft and mixlora take adapters on all bases; on Phi-3, Phi-4, GLM-4 and Granite 4, whose
  checkpoints store fused projections, only those on the projections that are not fused. Whole
  models are written one matrix at a time, in the dtype of their base, and include the tokenizer.
  Merged weights are computed in float32 and rounded once; --dtype float32 keeps them as computed.

examples:
  moe-jax export --adapter runs/mine/adapters/default --to peft --output exported
  moe-jax export --adapter runs/mine/adapters/default --to mixtral --dtype bfloat16 \\
      --output merged --push-to-hub me/merged --private
  moe-jax export --adapter runs/mine/adapters/default --to llama --weights utilization \\
      --data text.txt --output dense"""


def add_export(parser: argparse.ArgumentParser) -> Run:
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
    add_output(parser)
    parser.add_argument(
        "--dtype",
        choices=get_args(FloatType),
        help="dtype of the written tensors (default: a whole model's is its base's, an adapter's "
        "float32, as trained)",
    )
    parser.add_argument(
        "--base",
        metavar="DIR_OR_ID",
        help="path of the base for the other tool, and where a whole model's base is read "
        "(default: the path at training)",
    )
    parser.add_argument(
        "--weights",
        choices=EXPORT_WEIGHTS,
        help="llama: weights of the experts in the merged one, equal or by their share of the "
        "tokens of --data (default: average)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="llama: text on which the KL divergence from the exact model is measured, a "
        "file or folder as in training; required for experts",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the complete export to this repository; log in with `hf auth login` before",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push-to-hub: create a private repository"
    )
    parser.add_argument(
        "--revision",
        metavar="BRANCH",
        help="with --push-to-hub: branch, created if it does not exist (default: the main one)",
    )
    parser.add_argument("--commit-message", metavar="TEXT", help="with --push-to-hub: message")
    return _export


def _export(arguments: argparse.Namespace) -> None:
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
        say=lambda line: print_shown(line, file=sys.stderr),
    )
    for note in notes:
        print_shown(f"note: {note}")
    print_shown(f"wrote {arguments.output} ({arguments.to})")


def add_import(parser: argparse.ArgumentParser) -> Run:
    """Read an adapter of PEFT, MoE-PEFT or its mixlora package, and write it in our own format."""
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="DIR_OR_ID",
        help="folder or hub id with adapter_config.json and adapter_model.safetensors or "
        "adapter_model.bin; only tensors are read from a .bin, and no code in it is run",
    )
    parser.add_argument(
        "--base",
        required=True,
        metavar="DIR_OR_ID",
        help="folder or hub id of the base that it was trained on",
    )
    add_output(parser)
    parser.add_argument(
        "--name", type=_folder_name, help="write to DIR/NAME instead, like a training run"
    )
    return _import


def _import(arguments: argparse.Namespace) -> None:
    output = arguments.output / arguments.name if arguments.name else arguments.output
    adapter = moe_jax.import_adapter(arguments.source, arguments.base, output)
    print_shown(f"wrote {output} ({type(adapter.method).registry.name_of(adapter.method)})")


def _folder_name(text: str) -> str:
    if text in ("", ".", "..") or text != Path(text).name:
        raise argparse.ArgumentTypeError(f"expected the name of a folder, got {text!r}")
    return text
