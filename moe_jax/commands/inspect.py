"""`moe-jax inspect`: routing of an adapter, or the description of a base."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any, get_args

from moe_jax.commands import Run
from moe_jax.commands.arguments import add_column, add_dtype, listed, named_columns
from moe_jax.commands.describe import add_adapter_fit, show_base
from moe_jax.config.data import Schema
from moe_jax.errors import ConfigError, memory_errors
from moe_jax.tasks.selection import named_task
from moe_jax.terminal import print_shown

_SCHEMAS_WITHOUT_TEXT = ("task", "classification", "preference", "feedback")
"""Schemas whose rows are not one text; tasks have their own flag."""

EPILOG = """\
routing of an adapter:
  moe-jax inspect --adapter runs/mine/adapters/default --output seen \\
      --data questions=data/questions.jsonl --data stories=data/stories.txt

  writes to the folder `seen`
      load.png .csv           load of each expert by layer; 1 is an equal share
      coactivation.png .csv   how often two experts serve the same token; and by layer
      entropy.png .csv        entropy of the routers by layer
      load_by_data.png .csv   load by data set, if there are several
      routing.json            all of these numbers
      tokens.html             a page that colors each token by its experts

  If a layer has several routers (loramoe, mola), the first of mlp/gate_proj, mlp/up_proj,
  mlp/down_proj, self_attn/q_proj, ... is inspected, or the one of --site.

description of a base (reads only the headers of its files):
  moe-jax inspect --base models/llama
  moe-jax inspect --base models/llama --method mixlora --rank 16 --num-experts 8
  moe-jax inspect --base models/llama --config configs/mine.py
"""


def add(parser: argparse.ArgumentParser) -> Run:
    """Inspect the routing of an adapter's experts on text, or describe a base checkpoint."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "--base",
        metavar="DIR_OR_ID",
        help="folder in the Hugging Face format, or hub id (default with --adapter: the base that "
        "it was trained on)",
    )
    parser.add_argument("--revision", help="revision of a hub id")
    routing = parser.add_argument_group("routing of an adapter")
    _add_text(routing)
    _add_inspection(routing)
    fit = parser.add_argument_group("description of a base, and of an adapter on it")
    add_adapter_fit(fit)

    def run(arguments: argparse.Namespace) -> None:
        if arguments.adapter is not None:
            problem = "cannot be combined with --adapter; its folder defines the method"
            _refuse(arguments, fit, problem)
            _inspect_routing(arguments)
        else:
            _refuse(arguments, routing, "requires --adapter")
            if arguments.base is None:
                raise ConfigError(
                    "give --adapter with --data, --tasks or --text to inspect its routing, or "
                    "--base to describe a checkpoint"
                )
            show_base(arguments)

    return run


def _add_text(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR_OR_ID",
        help="folder, as in WORKDIR/adapters/NAME, or hub id",
    )
    group.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="file, folder, pattern or hub id to read rows from; may be given several times",
    )
    group.add_argument(
        "--tasks",
        default="",
        metavar="A,B,...",
        help="tasks as in moe-jax evaluate: their questions, each with its correct label",
    )
    group.add_argument(
        "--tasks-folder",
        metavar="FOLDER",
        help="folder with a folder for each task (default: the hub)",
    )
    group.add_argument(
        "--text", action="append", default=[], help="a text itself; may be given several times"
    )
    group.add_argument(
        "--schema",
        choices=[name for name in get_args(Schema) if name not in _SCHEMAS_WITHOUT_TEXT],
        help="schema of the rows of --data, as in training (default: the one that the columns fit)",
    )
    group.add_argument(
        "--prompt",
        default="instruction",
        metavar="NAME_OR_FILE",
        help="prompt template of --schema instruction (default: %(default)s)",
    )
    add_column(group)
    group.add_argument(
        "--limit",
        type=int,
        default=200,
        metavar="N",
        help="use the first N rows of each data set (default: %(default)s)",
    )


def _add_inspection(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", type=Path, metavar="DIR", help="a folder that does not exist yet, or is empty"
    )
    group.add_argument("--site", metavar="SITE", help="router of a layer, see below")
    group.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="largest number of tokens of a row (default: 512, or the base's context if less)",
    )
    group.add_argument(
        "--page-tokens",
        type=int,
        default=2000,
        metavar="N",
        help="largest number of tokens on the page; 0 writes no page (default: %(default)s)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="rows computed side by side (default: %(default)s)",
    )
    add_dtype(group)


def _refuse(arguments: argparse.Namespace, group: argparse._ArgumentGroup, reason: str) -> None:
    """Rejects flags of a group that are given; flags with a default value are ignored."""
    for action in group._group_actions:
        if not action.default and getattr(arguments, action.dest) != action.default:
            raise ConfigError(f"{action.option_strings[0]}: {reason}")


def _inspect_routing(arguments: argparse.Namespace) -> None:
    if arguments.output is None:
        raise ConfigError("--output: is missing; give a folder for the pictures and tables")
    if arguments.page_tokens < 0:
        raise ConfigError(f"--page-tokens: must not be negative, got {arguments.page_tokens}")
    if arguments.limit < 1:
        raise ConfigError(f"--limit: must be positive, got {arguments.limit}")
    if not all(text.strip() for text in arguments.text):
        raise ConfigError("--text: is empty; give a text")
    fields = {
        "schema": arguments.schema,
        "prompt": arguments.prompt,
        "columns": named_columns(arguments.column),
    }
    data: dict[str, Any] = {
        name: {"path": path, **fields} for name, path in _data(arguments.data).items()
    }
    for name in listed(arguments.tasks):
        if name in data:
            raise ConfigError(f"--tasks: {name!r} is also the name of a --data; give NAME=FILE")
        data[name] = named_task(name, data=arguments.tasks_folder, limit=arguments.limit)
    if arguments.text:
        if "text" in data:
            raise ConfigError("--data: the name 'text' is that of --text; give NAME=FILE")
        data["text"] = arguments.text
    if not data:
        raise ConfigError(
            "--data: there is no text; give a file with --data, tasks with --tasks or a text with "
            "--text (moe-jax show describes an adapter's folder)"
        )
    # Imports jax and transformers, which --help does not need.
    from moe_jax.files.folders import require_unused
    from moe_jax.inspection.report_files import save_routing_report
    from moe_jax.inspection.routing_inspection import InspectionOptions, inspect_routing

    require_unused(arguments.output)
    with memory_errors("a smaller --batch-size or --max-length, or --dtype bfloat16"):
        report = inspect_routing(
            arguments.adapter,
            data,
            arguments.base,
            revision=arguments.revision,
            site=arguments.site,
            options=InspectionOptions(
                limit=arguments.limit,
                max_length=arguments.max_length,
                keep_tokens=arguments.page_tokens,
                batch_size=arguments.batch_size,
                dtype=arguments.dtype,
            ),
        )
    for note in report.notes:
        print_shown(note, file=sys.stderr)
    written = save_routing_report(report, arguments.output)
    print_shown("\n".join(report.summary()))
    print_shown(f"wrote     {arguments.output}: {', '.join(path.name for path in written)}")


def _data(values: list[str]) -> dict[str, str]:
    data: dict[str, str] = {}
    for text in values:
        name, equals, path = text.partition("=")
        if not equals or re.search(r"[/\\]", name):
            name, path = Path(text).stem, text
        if not path or not name:
            raise ConfigError(f"--data {text}: give [NAME=]FILE")
        if name in data:
            raise ConfigError(
                f"--data {text}: another one is named {name!r}; give names with NAME=FILE"
            )
        data[name] = path
    return data
