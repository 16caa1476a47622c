"""`moe-jax train` and `moe-jax plan`; `train.py` is the former."""

import argparse
import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moe_jax.commands import Run
from moe_jax.commands.arguments import add_column
from moe_jax.commands.run_config import CONFIG_FILE, config_file_text, raw_config
from moe_jax.compiled.chips import CHIPS
from moe_jax.config.command_line import apply_overrides, load_config_file
from moe_jax.config.data import Schema
from moe_jax.errors import ConfigError
from moe_jax.terminal import print_shown

if TYPE_CHECKING:  # jax is imported when the command runs, not for --help
    from moe_jax.config.model import ModelConfig
    from moe_jax.config.run import RunConfig

RUNS = Path("runs")
"""Parent of the work directories that the command line does not name."""

WAIT_SECONDS = 300.0
"""Default time for which a process waits for the others to start."""

EPILOG = """\
configuration:
  --config FILE names a Python file with a function get_config(), such as those in configs/.
  Without it, --base and --data are required: all other settings follow from the size of the base,
  the length of the rows and the memory of the devices, and are written to WORKDIR/config.py, a file
  for --config. --config.FIELD=VALUE (or --set FIELD=VALUE) sets a field of either, for example
  --config.adapters.default.optimizer.learning_rate=1e-4.

  The same command again resumes where the run stopped.

examples:
  moe-jax train --base HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl
  moe-jax train --config configs/llama7b_mixlora.py
  moe-jax plan --config configs/llama7b_mixlora.py --devices 8
  moe-jax plan --config configs/llama7b_mixlora.py --compile-for h200

exit status:
  0 done; 2 invalid input, one line on stderr; 130 and 143 stopped by Ctrl-C or SIGTERM. The state
  is then saved after the present step; before the first step there is none to save. When one of
  several processes ends early, the others end with its status, or with 1 if it was killed.
"""


def add_train(parser: argparse.ArgumentParser) -> Run:
    """Train adapters on a frozen base model."""
    _add_run(parser)
    parser.add_argument(
        "--plan", action="store_true", help="as `moe-jax plan`: do not train, print the memory"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="run as one of several processes"
    )
    processes = parser.add_argument_group("with --distributed")
    processes.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    processes.add_argument(
        "--num-processes", "--num_processes", type=int, metavar="N", help="number of processes"
    )
    processes.add_argument(
        "--process-id", "--process_id", type=int, metavar="I", help="index of this process, from 0"
    )
    processes.add_argument(
        "--wait",
        type=float,
        default=WAIT_SECONDS,
        metavar="SECONDS",
        help=f"time to wait for the other processes to start (default: {WAIT_SECONDS:.0f})",
    )
    return _train


def add_plan(parser: argparse.ArgumentParser) -> Run:
    """Print the memory of a training step, compiled without weights, data or an accelerator."""
    _add_run(parser)
    parser.set_defaults(plan=True, distributed=False)
    return _train


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--config", metavar="FILE", help="Python file with get_config()")
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help=f"folder of the run, which resumes if it holds one (default: {RUNS}/NAME, with the "
        "name of the configuration or of base, method and data)",
    )
    parser.add_argument("--base", metavar="DIR_OR_ID", help="base model, folder or hub id")
    parser.add_argument(
        "--data", metavar="FILE_OR_ID", help="training data: file, folder, pattern or hub id"
    )
    parser.add_argument(
        "--schema",
        metavar="NAME",
        choices=[schema for schema in get_args(Schema) if schema != "task"],
        help="schema of the rows (default: found from the columns)",
    )
    add_column(parser)
    parser.add_argument("--method", metavar="NAME", help="mixlora, lora, ... (default: mixlora)")
    parser.add_argument(
        "--preference",
        metavar="NAME",
        help="preference loss: dpo, orpo, simpo or kto (default: none, supervised fine-tuning)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="set a field of the configuration; the same as --config.FIELD=VALUE",
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="with a plan: number of simulated devices"
    )
    parser.add_argument(
        "--compile-for",
        metavar="CHIP",
        help="with a plan: compile for a chip that need not be present, and estimate the time of a "
        f"step on it; {', '.join(CHIPS)}",
    )


def _train(arguments: argparse.Namespace) -> int:
    _check(arguments)
    with contextlib.ExitStack() as opened:
        if arguments.distributed:
            from moe_jax.processes.join import joined

            given = arguments.coordinator, arguments.num_processes, arguments.process_id
            opened.enter_context(joined(*given, arguments.wait, print_shown))
        return _train_or_plan(arguments)


def _train_or_plan(arguments: argparse.Namespace) -> int:
    overrides = {**arguments.overrides, **_assignments(arguments.set)}
    devices = _set_up_jax(arguments, overrides)
    workdir = _work_directory(arguments)
    raw, command = raw_config(arguments, workdir, overrides, devices)
    apply_overrides(raw, overrides)
    config_file = None if command is None else config_file_text(raw, command, overrides)

    # After the set-up of jax, since these modules import libraries that query devices.
    from moe_jax.adapters import METHODS
    from moe_jax.config.run import parse_run_config

    config = parse_run_config(raw, METHODS)
    if arguments.plan:
        return _plan(config, arguments.compile_for, devices)
    from moe_jax.evaluation.training_evaluator import TrainingTaskEvaluation
    from moe_jax.training.records.console import print_line
    from moe_jax.training.run.loop import train

    result = train(config, workdir, print_line, TrainingTaskEvaluation(), config_file=config_file)
    return 0 if result.interrupted_by is None else 128 + result.interrupted_by


def _check(arguments: argparse.Namespace) -> None:
    if arguments.config is None:
        for name in ("base", "data"):
            if getattr(arguments, name) is None:
                raise ConfigError(
                    f"--{name} is missing; give --config FILE, for example "
                    "configs/tiny_mixlora.py, or --base and --data"
                )
    else:
        for flag in ("method", "schema", "column", "preference"):
            if getattr(arguments, flag) not in (None, []):
                raise ConfigError(
                    f"--{flag}: the file of --config sets it; change it there, or with "
                    "--config.FIELD=VALUE"
                )
    if arguments.devices is not None:
        if not arguments.plan:
            raise ConfigError("--devices goes with a plan only; a run uses all devices")
        if arguments.devices < 1:
            raise ConfigError("--devices: must be at least 1")
    if arguments.compile_for is not None and not arguments.plan:
        raise ConfigError("--compile-for goes with a plan only; add --plan, or use `moe-jax plan`")
    if arguments.plan and arguments.distributed:
        raise ConfigError("--plan: cannot be combined with --distributed")


def _assignments(given: list[str]) -> dict[str, str]:
    """Parses the values of `--set FIELD=VALUE`."""
    fields = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {text}: expected FIELD=VALUE, as in training.steps=100")
        fields[name.removeprefix("config.")] = value
    return fields


def _set_up_jax(
    arguments: argparse.Namespace, overrides: Mapping[str, str]
) -> Sequence[Any] | None:
    """Sets up devices, before the first array.

    Returns:
      The devices of `--compile-for`; None without it, for those of the process.
    """
    import jax

    if arguments.compile_for is not None:
        from moe_jax.compiled.target import target_devices

        return target_devices(arguments.compile_for, _planned_devices(arguments, overrides))
    if arguments.devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    return None


def _planned_devices(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> int:
    """`--devices`, or else as many as the mesh of the configuration needs."""
    if arguments.devices is not None:
        return arguments.devices
    if arguments.config is None:
        return 1
    raw = load_config_file(arguments.config)
    apply_overrides(raw, overrides)
    sizes = raw.get("mesh", {}).values()
    return math.prod(size for size in sizes if isinstance(size, int) and size > 0)


def _work_directory(arguments: argparse.Namespace) -> Path:
    if arguments.workdir is not None:
        return Path(arguments.workdir)
    if arguments.config is not None:
        file = Path(arguments.config)
        is_in_run = file.name == CONFIG_FILE and file.with_suffix(".json").exists()
        return file.parent if is_in_run else RUNS / file.stem
    base, data = Path(arguments.base).name, Path(arguments.data).stem
    loss = "" if arguments.preference is None else f"-{arguments.preference}"
    name = f"{base}-{arguments.method or 'mixlora'}{loss}-{data}"
    return RUNS / re.sub(r"[^\w.-]+", "_", name)


def _plan(config: "RunConfig", chip_name: str | None, devices: Sequence[Any] | None) -> int:
    """Compiles the step for the longest rows, and prints the memory it needs.

    Args:
      config: configuration of the run.
      chip_name: chip to compile for; None for the devices of the process.
      devices: devices of the mesh; None for those of the process.
    """
    from moe_jax.errors import memory_errors
    from moe_jax.loaded.rank_match import match_ranks
    from moe_jax.training.records.chip_plan import describe_chip_plan
    from moe_jax.training.records.plan import describe_plan
    from moe_jax.training.run.start_up import MEMORY_ADVICE
    from moe_jax.training.step.program import build_program

    # The number of steps only affects the schedule; that of an epoch is unknown without the data.
    steps = {name: config.length_group(name)[1].steps or 1 for name in config.adapters}
    model = planned_model(config)
    ranks = match_ranks(config.methods, model)
    config = ranks.apply(config)
    program = build_program(config, model, steps, devices)
    longest = max(adapter.data.max_length for adapter in config.adapters.values())
    with memory_errors(MEMORY_ADVICE):  # the compiler for TPUs refuses what does not fit
        print_shown(describe_plan(program, longest, ranks.notes))
        if chip_name is not None:
            print_shown(describe_chip_plan(program, longest, chip_name))
    return 0


def planned_model(config: "RunConfig") -> "ModelConfig":
    """Architecture of the base, from a local checkpoint or else from the configuration."""
    from moe_jax.hf.config import model_config_from_hf, read_model_config
    from moe_jax.training.run.input_checks import require_specified_architecture

    folder = Path(config.base.path).expanduser()
    if folder.is_dir():
        model = read_model_config(folder)
        require_specified_architecture(config, model, folder)
        return model
    if config.base.hf_config is None:
        raise ConfigError(
            f"config.base.hf_config: a plan needs it, since {config.base.path} is not a local "
            "folder; give the fields of its config.json"
        )
    return model_config_from_hf(config.base.hf_config, "config.base.hf_config")
