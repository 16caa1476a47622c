"""Recording of a run: metric lines, console lines, and non-finite gradients."""

import collections
import contextlib
import datetime
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from moe_jax.compiled.matrix_rate import MatrixRate
from moe_jax.config.metric_names import metric_semantics
from moe_jax.data.batch import Batch
from moe_jax.errors import TrainingError
from moe_jax.training.records.console import ProgressBar
from moe_jax.training.records.metric_log import (
    TIME,
    PendingMetrics,
    Window,
    Writer,
    finite_or_none,
    nested_by_task,
)
from moe_jax.training.records.plan import resident_memory
from moe_jax.training.records.speed import Speed, speed_texts
from moe_jax.training.step.needed_flops import needed_flops
from moe_jax.training.step.program import Program

_NAMED_ON_BAR = 3
"""Largest number of adapters that the progress bar shows one by one; it shows a mean of more."""


_SHORT_ANSWER = 3
"""Largest mean number of target tokens for which the loss of the first one is printed."""

_SLOW_STEP = 1.0
"""Seconds of a step from which on the host of a single process waits for each step."""


class TaskScore(Protocol):
    """Score on a task, a share in [0, 1]."""

    @property
    def value(self) -> float: ...
    @property
    def standard_error(self) -> float | None: ...


TaskScores = Mapping[str, TaskScore]
"""Scores by `task/measure`."""


class Recorder:
    """Recorder of a run's steps: `push` and `collect` after each step, `drain` at the end.

    Attributes:
      bar: progress bar.
      window: metrics of the steps since the last line.
      losses: training loss of each adapter in its last line; None where not finite.
      step_seconds: seconds between the last two calls of `collect`; None before the first.
    """

    def __init__(
        self,
        program: Program,
        steps: Mapping[str, int],
        writers: Sequence[Writer],
        window: Window,
        say: Callable[[str], None],
        bar: ProgressBar,
        losses: Mapping[str, float | None] | None = None,
        rate: MatrixRate | None = None,
    ):
        """Starts the clock.

        Args:
          program: compiled computations of the current phase.
          steps: total steps of each adapter; a line is written where one ends.
          writers: destinations of the lines.
          window: metrics since the last line; not empty if a run resumes between two lines.
          say: prints a line on the console.
          bar: progress bar, updated after each step.
          losses: training losses of the last lines, if a run resumes.
          rate: rate of the devices, which the FLOP/s of the model are a share of; None without.
        """
        self.window = window
        self.losses = dict(losses or {})
        self._training = program.config.training
        self._ends = frozenset(steps.values())
        self._total_steps = max(steps.values())
        self._several = len(steps) > 1
        self._writers = writers
        self._say = say
        self.bar = bar
        self._pending = PendingMetrics()
        self._deferred: collections.deque[tuple[int, Callable[[], None]]] = collections.deque()
        self._start = self._collected = time.perf_counter()
        self.step_seconds: float | None = None
        self._rate = rate
        self._speed = Speed(None if rate is None else rate.flops)
        self.set_program(program)

    def set_program(self, program: Program) -> None:
        """Records the steps of `program` from here; steps of the former one must be drained."""
        self._program = program
        self._names = [rows.name for rows in program.adapter_rows]
        self._needed = needed_flops(
            program.model.config,
            program.config.methods,
            program.abstract_state.adapters,
            program.config.preferences,
        )
        program.learning_rates(0)  # evaluates the schedules now, while the device is idle

    def push(self, step: int, metrics: Mapping[str, jax.Array], batch: Batch | None) -> None:
        """Adds the metrics of a step that was just dispatched.

        Args:
          step: number of the step, from 1.
          metrics: metrics of the step, on the device.
          batch: NumPy arrays of the whole batch, whose tokens count for the speed; None for a step
            that was compiled first.
        """
        self._pending.push(step, metrics)
        if batch is not None:
            rows = {rows.name: rows.total for rows in self._program.adapter_rows}
            flops = self._needed.of_batch(batch, rows)
            self._speed.add(int((batch.segment_ids > 0).sum()), flops)

    def collect(self) -> None:
        """Records steps that ended a while ago; called after each step.

        It does not wait for the newest steps, so that the host runs ahead of the device. Steps of a
        second or more are awaited one by one: running ahead saves milliseconds of each, and an
        interrupt would have to wait for all that were dispatched. Not with several processes, whose
        clocks differ: a deferred action may compute together, between the same steps in each.

        Raises:
          TrainingError: too many gradients in a row were not finite.
        """
        seconds = self.step_seconds
        if seconds is None or (seconds >= _SLOW_STEP and jax.process_count() == 1):
            self.drain()
        else:
            self._record_steps(self._pending.ready())
        now = time.perf_counter()
        self.step_seconds, self._collected = now - self._collected, now

    def drain(self) -> None:
        """Records all steps that were pushed; waits for the device."""
        self._record_steps(self._pending.drain())

    def after_metrics(self, step: int, action: Callable[[], None]) -> None:
        """Calls `action` once the metrics of `step`, the newest one, are recorded.

        It is not called if they raise. At most one action is deferred: a former one is completed
        first, by draining.
        """
        if self._deferred:
            self.drain()
        if self._pending.newest == step:
            self._deferred.append((step, action))
        else:
            action()

    def complete_deferred(self) -> None:
        """Records the steps of deferred actions after an error, so that the actions are called.

        Waits for the device. Raises no second error: an action that fails, or whose step has
        failed, is dropped.
        """
        while self._deferred and self._pending.newest is not None:
            with contextlib.suppress(Exception):
                self._record_steps(itertools.islice(self._pending.drain(), 1))

    def speed(self) -> str | None:
        """Mean speed over all timed steps as a text; None without any."""
        mean = self._speed.overall()
        if not mean:
            return None
        of_rate = "" if self._rate is None else f" of {self._rate.describe()}"
        return "  ".join(speed_texts(mean)) + of_rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside from the speed of training."""
        with self._speed.paused():
            yield

    def write_validation(
        self,
        step: int,
        losses: Mapping[str, float],
        metrics: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Writes validation losses and metrics measured after `step`.

        Args:
          step: steps done.
          losses: losses by `adapter/set`.
          metrics: metrics of classification and preference adapters, by `adapter/set` and name.
        """
        line, metrics = dict[str, Any](), metrics or {}
        for label, loss in losses.items():
            values = {"loss": loss, **metrics.get(label, {})}
            line |= {f"validation/{label}/{name}": value for name, value in values.items()}
            text = "  ".join(
                f"{name} {value:.4f}"
                for name, value in values.items()
                if name == "loss" or metric_semantics(name).printed
            )
            self._say(f"step {step}  validation {label}  {text}")
        self._write(step, line, {})

    def write_task_scores(self, step: int, adapter: str, scores: TaskScores) -> None:
        """Writes the task scores of an adapter measured after `step`; percentages on the console.

        Args:
          step: steps done.
          adapter: name of the adapter.
          scores: scores by `task/measure`.
        """
        values = {f"evaluation/{adapter}/{key}": score.value for key, score in scores.items()}
        self._write(step, values, {})
        for task, by_measure in nested_by_task(scores).items():
            texts = [f"{measure} {_percent(score)}" for measure, score in by_measure.items()]
            self._say(f"step {step}  evaluation {adapter}/{task}  {'  '.join(texts)}")

    def _record_steps(self, steps: Iterator[tuple[int, dict[str, Any]]]) -> None:
        while True:
            start = time.perf_counter()
            pending = next(steps, None)
            self._speed.add_wait(time.perf_counter() - start)
            if pending is None:
                return
            step, metrics = pending
            self._record(step, metrics)
            if self._deferred and self._deferred[0][0] == step:
                _, action = self._deferred.popleft()
                action()

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        self.window.add(metrics)
        self._update_bar(step, metrics)
        for name in self._names:
            skipped = int(metrics[f"{name}/skipped_in_a_row"])
            at_end = step == self._program.total_steps[name]
            # A run shorter than `max_skipped_steps` must not end as if it had trained.
            if skipped >= self._training.max_skipped_steps or (at_end and skipped == step):
                is_half = self._program.config.compute.dtype == "float16"
                scale = "a lower training.initial_loss_scale, " if is_half else ""
                raise TrainingError(
                    f"adapter {name!r}: the last {skipped} gradients, up to step {step}, were not "
                    f"finite; try a lower config.adapters.{name}.optimizer.learning_rate, a "
                    f"clip_norm, {scale}or compute.dtype 'bfloat16' or 'float32'"
                )
        if step % self._training.log_every == 0 or step in self._ends:
            self._close_window(step)

    def _update_bar(self, step: int, metrics: dict[str, Any]) -> None:
        rates = self._program.learning_rates(step - 1)
        values = {}
        if len(self._names) > _NAMED_ON_BAR:
            losses = [metrics[f"{name}/loss"] for name in self._names]
            mean = math.fsum(losses) / len(losses)
            values = {"adapters": len(losses), "mean loss": f"{mean:.4f}"}
        else:
            for name in self._names:
                label = f"{name} " if self._several else ""
                values[f"{label}loss"] = f"{metrics[f'{name}/loss']:.4f}"
                values[f"{label}lr"] = f"{rates[name]:.1e}"
        speed = self._speed.latest
        if speed:
            values["tokens/s"] = f"{speed['tokens_per_second']:,.0f}"
            values["TFLOP/s"] = f"{speed['model_tflops_per_second']:.3g}"
        if "mfu" in speed:
            values["MFU"] = f"{speed['mfu']:.0%}"
        self.bar.update(step, values)

    def _close_window(self, step: int) -> None:
        line: dict[str, Any] = self.window.close()
        skipped = {name: int(line[f"{name}/skipped_total"]) for name in self._names}
        for name, count in skipped.items():
            # The schedule advances with the steps that were applied.
            rates = self._program.learning_rates(step - 1 - count)
            line[f"{name}/learning_rate"] = rates[name]
            if name in self._program.sites:  # labels of the rows of its routing metrics
                line[f"{name}/sites"] = self._program.sites[name]
            self.losses[name] = finite_or_none(line[f"{name}/loss"])
        elapsed = round(time.perf_counter() - self._start, 3)
        times = {"elapsed_seconds": elapsed, **self._speed.measure()}
        resident = resident_memory()
        if resident is not None:
            times["peak_resident_bytes"] = resident.peak
        self._write(step, line, times)
        for text in self._console_lines(step, line, times):
            self._say(text)

    def _write(self, step: int, line: Mapping[str, Any], times: Mapping[str, float]) -> None:
        values = {name: finite_or_none(value) for name, value in line.items()}
        for writer in self._writers:
            writer.write(step, {**values, TIME: dict(times)})

    def _console_lines(
        self, step: int, line: Mapping[str, Any], times: Mapping[str, float]
    ) -> list[str]:
        """Console lines of a step: one line if there is one adapter, else one more for each."""
        width = len(str(self._total_steps))
        head = [f"step {step:{width}d}/{self._total_steps}"]
        tail = [f"padding {line['padding_share']:.0%}"]
        if "tokens_per_second" in times:
            left = round((self._total_steps - step) * times["seconds_per_step"])
            tail += speed_texts(times)
            tail.append(f"left {datetime.timedelta(seconds=left)}")
        if not self._several:
            return ["  ".join([*head, *_adapter_texts(self._names[0], line), *tail])]
        adapters = ["  ".join([f"  [{name}]", *_adapter_texts(name, line)]) for name in self._names]
        return ["  ".join([*head, *tail]), *adapters]


def _adapter_texts(adapter: str, line: Mapping[str, Any]) -> list[str]:
    """Metrics of an adapter as texts for the console."""
    prefix = f"{adapter}/"
    metrics = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
    texts = [f"loss {_number(metrics['loss'], '.4f')}"]
    if "first_token_loss" in metrics and metrics["target_tokens"] <= (
        _SHORT_ANSWER * metrics["sequences"]
    ):
        # The end-of-text token, which is learned soon, is a large part of the loss of a label.
        texts.append(f"first token {_number(metrics['first_token_loss'], '.4f')}")
    texts += [
        f"{name} {_number(value, '.3g')}"
        for name, value in metrics.items()
        if metric_semantics(name).printed
    ]
    texts.append(f"grad {_number(metrics['grad_norm'], '.3g')}")
    texts.append(f"lr {metrics['learning_rate']:.2e}")
    if metrics["skipped_total"]:
        texts.append(f"skipped {metrics['skipped_total']:.0f}")
    return texts


def _percent(score: TaskScore) -> str:
    error = score.standard_error
    return f"{100 * score.value:.1f} ± {'-' if error is None else f'{100 * error:.1f}'}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
