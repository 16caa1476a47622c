"""Descriptions: `moe-jax show` of an adapter, and `moe-jax inspect --base` of a base."""

import argparse
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_jax.commands import Run
from moe_jax.commands.arguments import TARGETS, listed, numbers
from moe_jax.config.command_line import load_config_file
from moe_jax.config.parse import parse_member, to_plain
from moe_jax.config.run import parse_run_config
from moe_jax.errors import ConfigError
from moe_jax.terminal import print_shown

if TYPE_CHECKING:  # jax is imported when a command runs, not for --help
    from moe_jax.checkpoints.training_record import TrainingRecord


def add_show(parser: argparse.ArgumentParser) -> Run:
    """Describe an adapter or a run: method, size, training and base."""
    parser.add_argument(
        "folder",
        type=Path,
        help="an adapter, as in WORKDIR/adapters/NAME; a run's work directory; or a hub id",
    )
    return _show


def _show(arguments: argparse.Namespace) -> None:
    from moe_jax.checkpoints.adapter_files import described_method, read_description
    from moe_jax.checkpoints.training_record import read_record
    from moe_jax.inspection.base_description import leaf_modules, module_lines
    from moe_jax.loaded.run_adapters import is_workdir, resolve_adapter

    given = arguments.folder.expanduser()
    if is_workdir(given):
        _show_run(given)
        return
    folder = resolve_adapter(arguments.folder)
    description, record = read_description(folder), read_record(folder)
    described_method(folder, description)  # refuses unknown fields
    size = sum(math.prod(spec.shape) for spec in description.leaves.values())
    print_shown(f"method   {description.method['name']}")
    for field, value in description.method.items():
        if field != "name":
            print_shown(f"         {field} = {value}")
    print_shown(f"size     {size:,} parameters in {len(description.leaves)} leaves")
    for line in module_lines(leaf_modules(description.leaves)):
        print_shown(f"       {line}")
    print_shown(f"trained  {description.step} steps, moe_jax {description.package_version}")
    if record is not None:
        _show_record(record)
    print_shown(f"base     {description.base.path}")
    print_shown(f"         fingerprint {description.base.fingerprint[:16]}")


def _show_run(workdir: Path) -> None:
    """Prints how far a run is, its adapters, and its newest losses."""
    from moe_jax.checkpoints.store import latest_step, read_metadata
    from moe_jax.loaded.run_adapters import ADAPTERS, CHECKPOINTS, read_run_config
    from moe_jax.training.records.metric_lines import METRICS_FILE, read_metrics
    from moe_jax.training.run.workdir import WorkDir

    config, work = read_run_config(workdir), WorkDir(workdir)
    step = latest_step(workdir / CHECKPOINTS)
    print_shown(f"run      {workdir}")
    print_shown(f"base     {config.base.path}")
    if step is None:
        print_shown("state    none saved yet")
        total = {}
    else:
        total = read_metadata(workdir / CHECKPOINTS, step)["steps"]
        print_shown(
            f"state    step {step} of {max(total.values())}, in {workdir / CHECKPOINTS / str(step)}"
        )
    newest: dict[str, tuple[int, Any]] = {}
    for line in read_metrics(workdir / METRICS_FILE, missing_ok=True):
        newest |= {name: (line["step"], value) for name, value in line.items()}
    for name, adapter in config.adapters.items():
        finished = work.exported_step(name)
        state = "not finished" if finished is None else f"finished at step {finished}"
        print_shown(f"adapter  {name}: {to_plain(adapter.method)['name']}, {state}")
        if step is not None or finished is not None:
            print_shown(f"         {workdir / ADAPTERS / name} names it in other commands")
        for key, (at, value) in newest.items():
            is_loss = key == f"{name}/loss" or (
                key.startswith(f"validation/{name}/") and key.endswith("/loss")
            )
            if is_loss and value is not None:
                print_shown(f"         {key} {value:.4f} at step {at}")


def _show_record(record: "TrainingRecord") -> None:
    name, rate = record.optimizer.get("name"), record.optimizer.get("learning_rate")
    print_shown(f"         {name}, learning rate {rate}, ", end="")
    print_shown(f"{record.batch_size} rows a step, seed {record.seed}")
    if record.start_from is not None:
        print_shown(f"         began from {record.start_from}")
    for use, sets in (("train", record.train), ("validation", record.validation)):
        for name, data in sets.items():
            rows = "streamed rows" if data.rows is None else f"{data.rows:,} rows"
            print_shown(f"data     {use} {name}: {rows} of {data.path or data.task}")
    losses = {"training": record.training_loss, **record.validation_losses}
    if any(loss is not None for loss in losses.values()):
        print_shown(f"loss     {_numbers(losses)}")
    for kind, groups in (("metrics", record.validation_metrics), ("tasks", record.accuracies)):
        for name, metrics in groups.items():
            print_shown(f"{kind:9}{name}: {_numbers(metrics)}")


def _numbers(values: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items() if value is not None)


def add_adapter_fit(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that specify an adapter on the base of `show_base`."""
    group.add_argument("--config", metavar="FILE", help="configuration of a run, as for train.py")
    group.add_argument(
        "--method", metavar="NAME", help="or an adapter of this method: lora, mixlora, ..."
    )
    group.add_argument(
        "--rank", type=int, metavar="N", help="rank of the LoRA matrices (default: 8)"
    )
    group.add_argument(
        "--num-experts",
        metavar="N",
        help="number of experts; for mola also N,N,..., one per group of layers (default: 8)",
    )
    group.add_argument(
        "--target-modules", metavar="A,B,...", help="adapted projections (default: all seven)"
    )
    group.add_argument("--dora", action="store_true", help="use DoRA")
    fields = ("rank", "num_experts", "target_modules", "dora")
    flags = {f"method.{field}": f"--{field.replace('_', '-')}" for field in fields}
    group.set_defaults(flags={"method.name": "--method", **flags, "method": "--method"})


def show_base(arguments: argparse.Namespace) -> None:
    """Prints the description of a base, and of the adapters that the flags state."""
    from moe_jax.inspection.base_description import adapter_lines, describe_base
    from moe_jax.loaded.rank_match import match_ranks

    given = _methods(arguments)
    base = describe_base(arguments.base, arguments.revision)
    ranks, lines = match_ranks(given, base.config), base.lines()
    for name, method in ranks.methods.items():
        lines += ["", *adapter_lines(base.adapter(name, method), base)]
        if name in ranks.notes:
            lines.append(ranks.notes[name])
    print_shown("\n".join(lines))


def _methods(arguments: argparse.Namespace) -> dict[str, Any]:
    """Method of each adapter that the flags state, see `RunConfig.methods`."""
    from moe_jax.adapters import METHODS

    if arguments.method is None:
        for name in ("rank", "num_experts", "target_modules", "dora"):
            value = getattr(arguments, name)
            if value is not None and value is not False:
                raise ConfigError(f"--{name.replace('_', '-')}: requires --method")
        if arguments.config is None:
            return {}
        return parse_run_config(load_config_file(arguments.config), METHODS).methods
    if arguments.config is not None:
        raise ConfigError("--method: --config specifies the methods of its adapters; leave one out")
    targets = arguments.target_modules
    fields: dict[str, Any] = {
        "name": arguments.method,
        "rank": 8 if arguments.rank is None else arguments.rank,
        "alpha": 1.0,  # required, but does not change the size
        "target_modules": listed(",".join(TARGETS) if targets is None else targets),
        "dora": arguments.dora,
    }
    cls = METHODS.get(arguments.method)
    if cls is not None:
        fields |= _expert_counts(arguments, typing.get_type_hints(cls).get("num_experts"))
    return {"default": parse_member(METHODS, fields, "method")}


def _expert_counts(arguments: argparse.Namespace, hint: Any) -> dict[str, Any]:
    """The field `num_experts`, for a method that declares it with the type `hint`."""
    if hint is None:
        if arguments.num_experts is not None:
            raise ConfigError(f"--num-experts: {arguments.method} has no experts")
        return {}
    text = "8" if arguments.num_experts is None else arguments.num_experts
    counts = numbers(text, "--num-experts")
    if typing.get_origin(hint) is tuple:
        return {"num_experts": counts}
    if len(counts) > 1:
        raise ConfigError(f"--num-experts: {arguments.method} takes one number for all layers")
    return {"num_experts": counts[0]}
