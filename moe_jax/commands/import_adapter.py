"""`moe-jax import`."""

import argparse
from pathlib import Path

import moe_jax
from moe_jax.commands import Run


def add(parser: argparse.ArgumentParser) -> Run:
    """Read an adapter of PEFT, MoE-PEFT or its mixlora package, and write it in our own format."""
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        metavar="DIR_OR_ID",
        help="holds adapter_config.json and adapter_model.safetensors or adapter_model.bin, a "
        "folder or a hub id; of a .bin, only tensors are read, and no code in it is run",
    )
    parser.add_argument(
        "--base",
        required=True,
        metavar="DIR_OR_ID",
        help="the base that it was trained on, a folder or a hub id; the shapes have to fit",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="a folder that does not exist yet, or is empty",
    )
    parser.add_argument(
        "--name",
        type=_folder_name,
        help="writes to DIR/NAME instead, as a run does with its adapters",
    )
    return _run


def _folder_name(text: str) -> str:
    if text in ("", ".", "..") or text != Path(text).name:
        raise argparse.ArgumentTypeError(f"expected the name of a folder, got {text!r}")
    return text


def _run(arguments: argparse.Namespace) -> None:
    output = arguments.output / arguments.name if arguments.name else arguments.output
    adapter = moe_jax.import_adapter(arguments.source, arguments.base, output)
    print(f"wrote {output} ({type(adapter.method).registry.name_of(adapter.method)})")
