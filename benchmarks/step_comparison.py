"""Comparison of training steps of several methods by alternating timing."""

import contextlib
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from benchmarks.compiled_flops import Flops, compiled_flops
from benchmarks.peft_process import PeftProcess, peft_process
from benchmarks.random_inputs import params_of, random_batch
from benchmarks.report import say, usable_cores
from benchmarks.sizes import hf_fields, model_of
from benchmarks.timing import OUT_OF_MEMORY, interleaved, seconds_of, spread
from benchmarks.training_steps import (
    ALPHA,
    LORA,
    OPTIMIZER,
    CompiledStep,
    compiled_step,
    method_named,
    needed_of_frozen,
    ranks_of,
    run_config,
)
from moe_jax.compiled.matrix_rate import MatrixProduct
from moe_jax.errors import is_out_of_memory

PEFT = "peft"
PRODUCT = "matrix product"
FIRST_LOSS = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
"""Relative tolerance of peft's first loss to this package's, by dtype."""


class StepComparison:
    """Training steps of several methods, timed alternately in one process.

    A method that runs out of memory is left out from then on.

    Attributes:
      rows: figures by method, with the `error` of a method that was left out.
      product: matrix product that is timed in each round too.
      params: weights of the frozen base, once created.
      peft: process that trains peft's LoRA, or None.
    """

    def __init__(self, args: Namespace, rows: Mapping[str, dict[str, Any]]):
        """Compiles the matrix product; `prepare` compiles the methods.

        Args:
          args: parsed flags.
          rows: known figures of each method; a method with an `error` is left out.
        """
        self.rows = {name: {"method": name, "error": None} | row for name, row in rows.items()}
        self.params: Any = None
        self.peft: PeftProcess | None = None
        self.product = MatrixProduct(args.dtype, jax.devices() if args.mesh else jax.devices()[:1])
        self._args = args
        self._steps: dict[str, Callable[[], float]] = {}
        self._losses: dict[str, list[float]] = {name: [] for name in rows}

    def is_running(self, name: str) -> bool:
        """True if the method is compared and has not failed."""
        return name in self.rows and self.rows[name]["error"] is None

    def prepare(self, name: str) -> CompiledStep | None:
        """Compiles a method's step and creates its inputs; returns None if out of memory."""
        with self._memory_error_recorded(name):
            step = compiled_step(name, self._args)
            self.rows[name] |= compiled_figures(step)
            if self.params is None:
                self.params = params_of(step.program)
            run, losses = step.begin(step, self.params), self._losses[name]
            self._steps[name] = lambda: seconds_of(lambda: losses.append(run()))
            return step
        return None

    def prepare_peft(self, lora: CompiledStep | None, stack: contextlib.ExitStack) -> None:
        """Starts peft's process with the same base and the initial adapter of `lora`."""
        if lora is None:
            self.rows[PEFT]["error"] = (
                f"needs the initial weights of {LORA}, which ran out of memory"
            )
            return
        args = self._args
        tokens = random_batch(model_of(args.size, args.vocab), args.rows, args.length).tokens
        with self._memory_error_recorded(PEFT):
            inputs = self.params, lora.first_adapter, tokens
            running = peft_process(args.peft_python, *inputs, peft_settings(args))
            self.peft = stack.enter_context(running)
            self.rows[PEFT] |= {
                "trainable_parameters": self.peft.trainable,
                "versions": self.peft.versions,
                "threads": self.peft.threads,
            }
            self._steps[PEFT], self._losses[PEFT] = self.peft.step, self.peft.losses

    def run(self, rounds: int) -> None:
        """Warms up, runs the timed rounds and adds their figures to `rows`."""
        self._rounds(1)
        self._check_first_loss()
        samples = self._rounds(rounds)
        rates = [self.product.flops / seconds for seconds in samples.pop(PRODUCT)]
        lora = samples[LORA] if self.is_running(LORA) else []
        if self.peft is not None:
            self.rows[PEFT]["peak_bytes"] = self.peft.peak_bytes
        for name, row in self.rows.items():
            row["losses"] = self._losses[name][:2]
            if self.is_running(name):
                row |= speed_figures(samples[name], lora, row.get("compiled_flops"), self._args)
                for key in ("flops_per_second", "needed_flops_per_second"):
                    share = None if row[key] is None else row[key] / statistics.median(rates)
                    row[key.replace("flops_per_second", "share_of_product")] = share
        self.rate = spread(rates)

    def _rounds(self, rounds: int) -> dict[str, list[float]]:
        steps = {name: step for name, step in self._steps.items() if self.is_running(name)}
        samples, failed = interleaved({**steps, PRODUCT: self.product.seconds}, rounds)
        for name in failed:
            self.rows[name]["error"] = OUT_OF_MEMORY
        return samples

    def _check_first_loss(self) -> None:
        if self.is_running(PEFT) and self.is_running(LORA):
            lora, peft = self._losses[LORA][0], self._losses[PEFT][0]
            if not abs(lora - peft) <= FIRST_LOSS[self._args.dtype] * lora:
                raise RuntimeError(
                    f"peft's first loss is {peft}, {LORA}'s is {lora}: the models differ"
                )

    @contextlib.contextmanager
    def _memory_error_recorded(self, name: str) -> Iterator[None]:
        """Records running out of memory as the method's error."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.rows[name]["error"] = OUT_OF_MEMORY


def compiled_figures(step: CompiledStep) -> dict[str, Any]:
    """Compiles a step; returns its size, compile time, FLOPs and memory."""
    compiled = step.compile()
    memory: Any = compiled.memory_analysis()
    flops = counted_flops(step.name, compiled)
    return {
        "trainable_parameters": step.trainable,
        "trace_seconds": step.trace_seconds,
        "compile_seconds": step.compile_seconds,
        # XLA counts the FLOPs of one device.
        "compiled_flops": None if flops is None else flops.total * step.program.mesh.size,
        "loops_of_unknown_length": None if flops is None else flops.unknown_loops,
        "argument_bytes": None if memory is None else memory.argument_size_in_bytes,
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
    }


def counted_flops(name: str, compiled: jax.stages.Compiled) -> Flops | None:
    """Counts FLOPs; returns None and prints a message if XLA cannot parse the program's text."""
    try:
        return compiled_flops(compiled)
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):
            raise
        say(f"{name}: FLOPs are not counted: {str(error).splitlines()[0]}")
        return None


def speed_figures(
    samples: Sequence[float], lora: Sequence[float], counted: float | None, args: Namespace
) -> dict[str, Any]:
    """Speed figures from the seconds of each round.

    Args:
      samples: seconds of each round.
      lora: seconds of LoRA in the same rounds; empty if it was not measured.
      counted: FLOPs of the compiled program, or None.
      args: parsed flags.
    """
    seconds = spread(samples)
    ratios = [time / base for time, base in zip(samples, lora, strict=bool(lora))]
    needed = needed_of_frozen(model_of(args.size, args.vocab), args.rows, args.length)
    return {
        "seconds": seconds._asdict(),
        "samples": list(samples),
        "ratio_to_lora": spread(ratios)._asdict() if ratios else None,
        "tokens_per_second": args.rows * args.length / seconds.median,
        "flops_per_second": None if counted is None else counted / seconds.median,
        "needed_flops_per_second": needed / seconds.median,
    }


def peft_settings(args: Namespace) -> dict[str, Any]:
    """Settings for `peft_lora.py`, with the same model and LoRA."""
    config = run_config(method_named(LORA, args), args)
    optimizer = next(iter(config.adapters.values())).optimizer
    return {
        "model": hf_fields(model_of(args.size, args.vocab)),
        "device": "cpu" if jax.devices()[0].platform == "cpu" else "cuda",
        "threads": usable_cores(),
        "dtype": args.dtype,
        "micro_batches": args.micro_batches,
        "remat": args.remat == "full",
        "rank": args.rank,
        "alpha": ALPHA,
        "rank_pattern": ranks_of(method_named(LORA, args)),
        "learning_rate": OPTIMIZER["learning_rate"],
        "clip_norm": optimizer.clip_norm,
    }
