"""The command `python train.py`; see its docstring for usage."""

import sys
from pathlib import Path

import jax
from absl import app, flags

from moe_jax.adapters import METHODS
from moe_jax.commands.process import set_up_process
from moe_jax.config.command_line import apply_overrides, load_config_file, split_overrides
from moe_jax.config.model import ModelConfig
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.errors import ConfigError, UserError, report
from moe_jax.hf.config import model_config_from_hf, read_model_config

CONFIG = flags.DEFINE_string(
    "config", None, "Python file with get_config(); --config.FIELD=VALUE sets a field."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumes if it holds a run.")
PLAN = flags.DEFINE_bool("plan", False, "Print the memory of the compiled step, without training.")
DEVICES = flags.DEFINE_integer(
    "devices", None, "With --plan: number of simulated devices.", lower_bound=1
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Run as one of several processes.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "With --distributed: host:port of process 0."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "With --distributed: number of processes."
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --distributed: index of this process.")


def main(arguments: list[str]) -> int:
    """Runs the command; returns the exit status."""
    try:
        config = read_command_line(arguments)
        set_up_jax()
        return plan(config) if PLAN.value else run(config)
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:  # before the first step; later Ctrl-C saves the state
        print("stopped; nothing to save", file=sys.stderr)
        return 130


def read_command_line(arguments: list[str]) -> RunConfig:
    """Parses the flags and the configuration.

    Raises:
      ConfigError: either is invalid.
    """
    app.define_help_flags()
    others, overrides = split_overrides(arguments)
    try:
        positional = flags.FLAGS(others)[1:]
    except flags.Error as error:
        raise ConfigError(f"{error} (see --help)") from None
    if positional:
        raise ConfigError(
            f"{positional[0]!r} is not a flag; write --flag=value (--help lists them)"
        )
    if CONFIG.value is None:
        raise ConfigError("--config is missing; give a file, for example configs/tiny_mixlora.py")
    if WORKDIR.value is None and not PLAN.value:
        raise ConfigError("--workdir is missing; give a folder for the run")
    if DEVICES.value is not None and not PLAN.value:
        raise ConfigError("--devices goes with --plan only; a run uses all devices")
    raw = load_config_file(CONFIG.value)
    apply_overrides(raw, overrides)
    return parse_run_config(raw, METHODS)


def set_up_jax() -> None:
    """Sets up devices, processes and the cache of compiled programs, before the first array."""
    if DEVICES.value is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", DEVICES.value)
    set_up_process()
    if DISTRIBUTED.value:
        try:
            jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--distributed: {error}; give --coordinator, --num_processes and --process_id"
            ) from error


def run(config: RunConfig) -> int:
    """Trains, or resumes training; returns the exit status."""
    # After set_up_jax, since these modules import libraries that query devices.
    from moe_jax.evaluation.training_evaluator import TrainingTaskEvaluation
    from moe_jax.training.run.loop import train

    assert WORKDIR.value is not None
    result = train(config, Path(WORKDIR.value), task_evaluation=TrainingTaskEvaluation())
    return 0 if result.interrupted_by is None else 128 + result.interrupted_by


def plan(config: RunConfig) -> int:
    """Compiles the step for the longest rows, and prints the memory it needs."""
    from moe_jax.training.records.plan import describe_plan
    from moe_jax.training.step.program import build_program

    # The number of steps only affects the schedule; that of an epoch is unknown without the data.
    steps = {name: config.length_group(name)[1].steps or 1 for name in config.adapters}
    program = build_program(config, planned_model(config), steps)
    longest = max(adapter.data.max_length for adapter in config.adapters.values())
    print(describe_plan(program, longest))
    return 0


def planned_model(config: RunConfig) -> ModelConfig:
    """Architecture of the base, from a local checkpoint or else from the configuration."""
    from moe_jax.training.run.input_checks import require_specified_architecture

    folder = Path(config.base.path).expanduser()
    if folder.is_dir():
        model = read_model_config(folder)
        require_specified_architecture(config, model, folder)
        return model
    if config.base.hf_config is None:
        raise ConfigError(
            f"config.base.hf_config: --plan needs it, since {config.base.path} is not a local "
            "folder; give the fields of its config.json"
        )
    return model_config_from_hf(config.base.hf_config, "config.base.hf_config")
