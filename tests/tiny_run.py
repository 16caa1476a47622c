"""A complete run that takes seconds: base, tokenizer, data and a configuration file."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from xla_flags import xla_flags

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.config.command_line import apply_overrides, load_config_file
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.demo.tiny_llama import save_tokenizer, train_tokenizer, write_checkpoint
from moe_jax.errors import UserError

CONFIG = """
from pathlib import Path

HERE = Path(__file__).parent

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def source(name):
    return dict(path=str(HERE / f"{name}.jsonl"), schema="completion")


def adapter(rows, **method):
    return dict(
        method=dict(rank=4, alpha=8.0, target_modules=TARGETS, dropout=0.05, **method),
        data=dict(
            train={"words": source(rows)},
            validation={"held_out": source("held_out")},
            max_length=24,
            buckets=(16,),
            sort_window=2,
        ),
        optimizer=dict(
            learning_rate=5e-3, schedule=dict(kind="cosine", warmup_steps=2), weight_decay=0.01
        ),
        batch_size=8,
    )


def get_config():
    return dict(
        base=dict(path=str(HERE / "base"), param_dtype="float32"),
        compute=dict(dtype="float32", remat="none"),  # compiles faster
        adapters=dict(
            default=adapter(
                "train",
                name="mixlora",
                num_experts=4,
                router=dict(name="top_k", top_k=2, jitter_noise=0.1),
                losses=dict(load_balance=dict(coefficient=0.01)),
            )
        ),
        training=dict(steps=30, log_every=4, eval_every=10, seed=3),
        checkpoints=dict(every=5, keep=2),
    )
"""

WORDS = ["the", "a", "red", "blue", "small", "old", "fox", "dog", "tree", "sees", "finds", "likes"]


def write_inputs(folder: Path) -> Path:
    """Writes everything below `folder` and returns the configuration file."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 4, vocab_size=300)
    write_checkpoint(
        folder / "base",
        seed=0,
        hidden_size=32,
        intermediate_size=48,
        head_dim=8,
        num_hidden_layers=2,
        vocab_size=300,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    save_tokenizer(tokenizer, folder / "base")
    for name, count, start in (("train", 100, 0), ("held_out", 11, 1000), ("other", 60, 2000)):
        rows = [_row(start + i) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = folder / "config.py"
    config.write_text(CONFIG)
    return config


def _row(i: int) -> dict[str, str]:
    words = [WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(2 + i % 5)]
    return {"prompt": " ".join(words) + " ->", "completion": " " + " ".join(words[::-1])}


def read_config(config: Path, **overrides: Any) -> RunConfig:
    """The parsed configuration; overrides as on the command line, with `__` for the dots."""
    raw = load_config_file(str(config))
    apply_overrides(raw, {path.replace("__", "."): str(v) for path, v in overrides.items()})
    return parse_run_config(raw, METHODS)


def final_adapter(
    workdir: Path, name: str = "default", folder: str = "adapters"
) -> dict[str, np.ndarray]:
    """The weights in the final folder, by path."""
    tree = load_adapter(workdir / folder / name).tree
    return {path: np.asarray(leaf) for path, leaf in named_leaves(tree).items()}


def metric_lines(workdir: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


_PRELOADED = [
    "moe_jax.training.run.loop",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
]


def fork_server() -> ForkServerContext:
    """Starts processes that have the imports behind them, which saves seconds each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


class Run:
    """A run in a process of its own, which can be killed.

    Attributes:
      process: the process.
      workdir: the run's folder.
      log: what the run said so far, and its error.
    """

    def __init__(
        self,
        config: Path,
        workdir: Path,
        *,
        devices: int = 1,
        file_bytes: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        name: str = "run",
    ):
        """Starts it.

        Args:
          config: from `write_inputs`.
          workdir: the run's folder.
          devices: how many fake devices it sees.
          file_bytes: the largest file that it can write.
          overrides: as in `read_config`.
          name: name of the log, beside `workdir`.
        """
        self.workdir = workdir
        self.log = workdir.with_name(f"{workdir.name}.{name}.log")
        self.log.write_text("")
        self.process: BaseProcess = fork_server().Process(
            target=_run, args=(config, workdir, self.log, devices, file_bytes, overrides or {})
        )
        self.process.start()

    def wait_until(self, words: str, times: int = 1) -> None:
        """Returns when the run has printed `words` `times` times."""
        deadline = time.monotonic() + 600
        while self.log.read_text().count(words) < times:
            assert self.process.is_alive(), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)

    def join(self, seconds: float = 180) -> int:
        """The exit status, negative for the signal that ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.log.read_text()
        return self.process.exitcode


def _run(
    config: Path,
    workdir: Path,
    log: Path,
    devices: int,
    file_bytes: int | None,
    overrides: dict[str, Any],
) -> None:
    import jax

    from moe_jax.checkpoints.late_errors import silence_late_errors
    from moe_jax.training.run.loop import train

    silence_late_errors()  # as the commands do
    cache = Path(os.environ["HF_HOME"]).with_name("compiled")  # shared by all runs of the session
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ["XLA_FLAGS"] = xla_flags(devices)
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    with log.open("a", buffering=1) as stream:
        sys.stderr = stream
        try:
            result = train(
                read_config(config, **overrides), workdir, lambda line: stream.write(line + "\n")
            )
        except UserError as error:
            stream.write(f"error: {error}\n")
            sys.exit(2)
    sys.exit(0 if result.interrupted_by is None else 128 + result.interrupted_by)
