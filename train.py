"""Trains adapters on a frozen Llama.

    python train.py --config configs/tiny_mixlora.py --workdir runs/tiny
    python train.py --config configs/tiny_mixlora.py --workdir runs/tiny --config.training.steps=50

The same command again resumes where the run stopped. `--plan` compiles the step without weights and
prints the memory it needs, on devices that need not be there:

    python train.py --config configs/llama7b_mixlora.py --plan --devices 8

Exit status: 0 done, 2 the input will not do (one line says why), 130 and 143 stopped by Ctrl-C and
SIGTERM with the state saved.
"""

import sys
from pathlib import Path

import jax
from absl import app, flags

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.late_errors import silence_late_errors
from moe_jax.commands.process import keep_compiled_programs
from moe_jax.config.command_line import apply_overrides, load_config_file, split_overrides
from moe_jax.config.model import ModelConfig
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.errors import ConfigError, UserError, report
from moe_jax.hf.config import model_config_from_hf, read_model_config

CONFIG = flags.DEFINE_string(
    "config", None, "Python file with get_config(); --config.FIELD=VALUE overrides a field."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; resumes if it holds one.")
PLAN = flags.DEFINE_bool("plan", False, "Print the memory of the compiled step and stop.")
DEVICES = flags.DEFINE_integer(
    "devices", None, "With --plan: pretend to have this many devices.", lower_bound=1
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes of the same run.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where not found.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many, where not found.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, where not found.")


def main(arguments: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    try:
        config = read_command_line(arguments)
        set_up_jax()
        return plan(config) if PLAN.value else run(config)
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:  # before training began; after that Ctrl-C saves first
        print("stopped; nothing to save", file=sys.stderr)
        return 130


def read_command_line(arguments: list[str]) -> RunConfig:
    """Parses the flags and the configuration; everything wrong with either ends here."""
    app.define_help_flags()
    others, overrides = split_overrides(arguments)
    try:
        positional = flags.FLAGS(others)[1:]
    except flags.Error as error:
        raise ConfigError(f"{error} (--help lists the flags)") from None
    if positional:
        raise ConfigError(f"{positional[0]!r} is no flag; write --flag=value (--help lists them)")
    if CONFIG.value is None:
        raise ConfigError("--config is missing; give a file, for example configs/tiny_mixlora.py")
    if WORKDIR.value is None and not PLAN.value:
        raise ConfigError("--workdir is missing; give the folder that the run is to be kept in")
    if DEVICES.value is not None and not PLAN.value:
        raise ConfigError("--devices goes with --plan only; a run takes the devices there are")
    raw = load_config_file(CONFIG.value)
    apply_overrides(raw, overrides)
    return parse_run_config(raw, METHODS)


def set_up_jax() -> None:
    """Devices, processes and the cache of compiled programs; before anything uses a device."""
    if DEVICES.value is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", DEVICES.value)
    keep_compiled_programs()
    if DISTRIBUTED.value:
        try:
            jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--distributed: {error}; give --coordinator, --num_processes and --process_id"
            ) from error


def run(config: RunConfig) -> int:
    """Trains, or goes on training."""
    # After set_up_jax: their libraries look at devices.
    from moe_jax.evaluation.training_evaluator import OnTasks
    from moe_jax.training.run.loop import train

    assert WORKDIR.value is not None
    result = train(config, Path(WORKDIR.value), on_tasks=OnTasks())
    return 0 if result.interrupted_by is None else 128 + result.interrupted_by


def plan(config: RunConfig) -> int:
    """Compiles the step for the longest rows, from shapes alone."""
    from moe_jax.training.records.plan import describe_plan
    from moe_jax.training.step.program import build_program

    # The number of steps only sets the schedule; an epoch's is unknown without the data. All
    # adapters are there, as they are when a run begins.
    steps = {name: config.length_group(name)[1].steps or 1 for name in config.adapters}
    program = build_program(config, planned_model(config), steps)
    longest = max(adapter.data.max_length for adapter in config.adapters.values())
    print(describe_plan(program, longest))
    return 0


def planned_model(config: RunConfig) -> ModelConfig:
    """The base's architecture, from a local checkpoint or else from the configuration."""
    from moe_jax.training.run.input_checks import require_stated_architecture

    folder = Path(config.base.path).expanduser()
    if folder.is_dir():
        model = read_model_config(folder)
        require_stated_architecture(config, model, folder)
        return model
    if config.base.hf_config is None:
        raise ConfigError(
            f"config.base.hf_config: --plan needs it, since {config.base.path} is not a local "
            "folder; give the fields of its config.json"
        )
    return model_config_from_hf(config.base.hf_config, "config.base.hf_config")


if __name__ == "__main__":
    silence_late_errors()
    sys.exit(main(sys.argv))
