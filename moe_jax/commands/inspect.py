"""`moe-jax inspect`."""

import argparse
import re
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moe_jax.commands import Run
from moe_jax.commands.arguments import add_dtype, listed, numbers
from moe_jax.commands.choices import TARGETS
from moe_jax.config.command_line import load_config_file
from moe_jax.config.data import Schema
from moe_jax.config.parse import parse_member
from moe_jax.config.run import parse_run_config
from moe_jax.errors import ConfigError
from moe_jax.tasks.selection import named_task

if TYPE_CHECKING:
    from moe_jax.adapters.method import AdapterMethod

_NOT_TEXT = ("task", "classification")
"""Schemas whose rows are no text by themselves; tasks have a flag of their own."""

_OF_ADAPTERS = ("data", "tasks", "tasks-folder", "text", "output", "site", "column", "max-length")
_OF_BASES = ("config", "method", "rank", "num-experts", "target-modules", "dora")
"""Flags without a default, which mean nothing beside or without --adapter."""

EPILOG = """\
what an adapter's routers do:
  moe-jax inspect --adapter runs/mine/adapters/default --output seen \\
      --data questions=data/questions.jsonl --data stories=data/stories.txt

  leaves in the folder `seen`
      load.png .csv           each expert's load by layer, 1 is an equal share
      coactivation.png .csv   how often two experts serve the same token; and by layer
      entropy.png .csv        how decided the routers are, by layer
      load_by_data.png .csv   the load of each data set, where there are several
      routing.json            all of these numbers
      tokens.html             a page on which each token is coloured by its experts

  Where a layer has several routers (loramoe, mola), one of them is looked at: the first that there
  is of mlp/gate_proj, mlp/up_proj, mlp/down_proj, self_attn/q_proj, ..., or that of --site.

what a checkpoint is (only the headers of its files are read):
  moe-jax inspect --base models/llama
  moe-jax inspect --base models/llama --method mixlora --rank 16 --num-experts 8
  moe-jax inspect --base models/llama --config configs/mine.py
"""


def add(parser: argparse.ArgumentParser) -> Run:
    """See what an adapter's experts do with texts, or what a base checkpoint is."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "--base",
        metavar="DIR_OR_ID",
        help="folder in the Hugging Face format, or hub id (with --adapter: the path that it was "
        "trained with)",
    )
    parser.add_argument("--revision", help="of a hub id")
    seen = parser.add_argument_group("what an adapter's routers do")
    seen.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR_OR_ID",
        help="its folder, as in WORKDIR/adapters/NAME, or a hub id",
    )
    seen.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="a file, folder or hub id to read rows from; may be given several times",
    )
    seen.add_argument(
        "--tasks",
        default="",
        metavar="A,B,...",
        help="tasks as in moe-jax evaluate, their questions with the right label after them",
    )
    seen.add_argument(
        "--tasks-folder", metavar="FOLDER", help="has a folder for each task; otherwise the hub"
    )
    seen.add_argument(
        "--text", action="append", default=[], help="a text itself; may be given several times"
    )
    seen.add_argument("--output", type=Path, metavar="DIR", help="a folder that is new, or empty")
    seen.add_argument("--site", metavar="SITE", help="which routers of a layer, see below")
    seen.add_argument(
        "--schema",
        choices=[schema for schema in get_args(Schema) if schema not in _NOT_TEXT],
        default="text",
        help="what a row of --data holds, as in training (default: %(default)s)",
    )
    seen.add_argument(
        "--prompt",
        default="instruction",
        metavar="NAME_OR_FILE",
        help="the prompt template of --schema instruction (default: %(default)s)",
    )
    seen.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="the rows' own name of a field of the schema; may be given several times",
    )
    seen.add_argument(
        "--limit",
        type=int,
        default=200,
        metavar="N",
        help="only the first N rows of each data set (default: %(default)s)",
    )
    seen.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a row (default: 512, or what the base was trained on if that is less)",
    )
    seen.add_argument(
        "--page-tokens",
        type=int,
        default=2000,
        metavar="N",
        help="tokens on the page, at most; 0 writes no page (default: %(default)s)",
    )
    seen.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="rows at once (default: %(default)s)"
    )
    add_dtype(seen)
    fits = parser.add_argument_group("what an adapter on a base would be")
    fits.add_argument("--config", metavar="FILE", help="of its adapters, as for train.py")
    fits.add_argument("--method", metavar="NAME", help="or of this method: lora, mixlora, ...")
    fits.add_argument("--rank", type=int, metavar="N", help="of each pair (default: 8)")
    fits.add_argument(
        "--num-experts",
        metavar="N",
        help="of methods with experts; of mola also N,N,..., one of each group of layers "
        "(default: 8)",
    )
    fits.add_argument(
        "--target-modules",
        metavar="A,B,...",
        help="projections that are adapted (default: all seven)",
    )
    fits.add_argument("--dora", action="store_true", help="with DoRA")
    return _run


def _run(arguments: argparse.Namespace) -> None:
    if arguments.adapter is None:
        _refuse_without_adapter(arguments)
        if arguments.base is None:
            raise ConfigError(
                "give --adapter with --data, --tasks or --text to see what its experts do, or "
                "--base to see what a checkpoint is"
            )
        _show_base(arguments)
        return
    for flag in _OF_BASES:
        if _is_given(arguments, flag):
            raise ConfigError(f"--{flag}: goes without --adapter, which says itself what it is")
    _show_routing(arguments)


def _refuse_without_adapter(arguments: argparse.Namespace) -> None:
    for flag in _OF_ADAPTERS:
        if _is_given(arguments, flag):
            raise ConfigError(f"--{flag}: goes with --adapter, which is not given")


def _is_given(arguments: argparse.Namespace, flag: str) -> bool:
    value = getattr(arguments, flag.replace("-", "_"))
    return value not in (None, "", []) and value is not False


def _show_routing(arguments: argparse.Namespace) -> None:
    if arguments.output is None:
        raise ConfigError("--output: is not given; name a folder for the pictures and tables")
    if arguments.page_tokens < 0:
        raise ConfigError(f"--page-tokens: must not be negative, got {arguments.page_tokens}")
    data: dict[str, Any] = _data(arguments.data)
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
            "--data: no text is given; name a file with --data, tasks with --tasks or a text "
            "with --text (moe-jax show says what an adapter's folder holds)"
        )
    # With libraries that other commands, and --help, do not need.
    from moe_jax.errors import memory_errors
    from moe_jax.files.folders import require_unused
    from moe_jax.inspection.routing_inspection import inspect_routing

    require_unused(arguments.output)
    with memory_errors("a smaller --batch-size or --max-length, or --dtype bfloat16"):
        report = inspect_routing(
            arguments.adapter,
            data,
            arguments.base,
            revision=arguments.revision,
            site=arguments.site,
            schema=arguments.schema,
            prompt=arguments.prompt,
            columns=_columns(arguments.column),
            limit=arguments.limit,
            max_length=arguments.max_length,
            keep_tokens=arguments.page_tokens,
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
        )
    for note in report.notes:
        print(note, file=sys.stderr)
    written = report.save(arguments.output)
    print("\n".join(report.summary()))
    print(f"wrote     {arguments.output}: {', '.join(path.name for path in written)}")


def _data(given: list[str]) -> dict[str, str]:
    data: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or re.search(r"[/\\]", name):
            name, path = Path(text).stem, text
        if not path or not name:
            raise ConfigError(f"--data {text}: give [NAME=]FILE")
        if name in data:
            raise ConfigError(
                f"--data {text}: another one is called {name!r}; give names with NAME=FILE"
            )
        data[name] = path
    return data


def _columns(given: list[str]) -> dict[str, str]:
    columns = {}
    for text in given:
        field, equals, name = text.partition("=")
        if not equals:
            raise ConfigError(f"--column {text}: give FIELD=NAME")
        columns[field] = name
    return columns


def _show_base(arguments: argparse.Namespace) -> None:
    # With libraries that other commands do not need.
    from moe_jax.inspection.base_description import describe_base, fit_lines

    methods = _methods(arguments)
    base = describe_base(arguments.base, arguments.revision)
    lines = base.lines()
    for name, method in methods.items():
        lines += ["", *fit_lines(base.fit(name, method), base)]
    print("\n".join(lines))


def _methods(arguments: argparse.Namespace) -> dict[str, "AdapterMethod"]:
    """The adapters that the arguments describe, by name."""
    from moe_jax.adapters import METHODS

    own = {
        "rank": arguments.rank,
        "num_experts": arguments.num_experts,
        "target_modules": arguments.target_modules,
    }
    given = {field: value for field, value in own.items() if value is not None}
    if arguments.method is None:
        for field in [*given, *(["dora"] if arguments.dora else [])]:
            raise ConfigError(f"--{field.replace('_', '-')}: goes with --method")
    if arguments.config is not None:
        if arguments.method is not None:
            raise ConfigError("--method: --config says what its adapters are; leave one out")
        config = parse_run_config(load_config_file(arguments.config), METHODS)
        return {name: adapter.method for name, adapter in config.adapters.items()}
    if arguments.method is None:
        return {}
    targets = given.get("target_modules", ",".join(TARGETS))
    fields: dict[str, Any] = {
        "name": arguments.method,
        "rank": given.get("rank", 8),
        "alpha": 1.0,  # which makes no parameter
        "target_modules": listed(targets),
        "dora": arguments.dora,
    }
    cls = METHODS.get(arguments.method)
    hints = {} if cls is None else typing.get_type_hints(cls)
    if "num_experts" in hints:
        counts = numbers(given.get("num_experts", "8"), "--num-experts")
        several = typing.get_origin(hints["num_experts"]) is tuple
        if len(counts) > 1 and not several:
            raise ConfigError(f"--num-experts: {arguments.method} has as many in every layer")
        fields["num_experts"] = counts if several else counts[0]
    elif cls is not None and "num_experts" in given:
        raise ConfigError(f"--num-experts: {arguments.method} has no experts")
    return {"default": parse_member(METHODS, fields, "--method")}
