"""Follows a run: reads metrics when they are there, writes lines, notices a run gone wrong."""

import collections
import contextlib
import datetime
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from moe_jax.errors import TrainingError
from moe_jax.training.records.metrics import TIME, PendingMetrics, Window, Writer
from moe_jax.training.run.progress import ProgressBar
from moe_jax.training.run.task_evaluation import Shares, sentences
from moe_jax.training.step.program import Program

_NOT_SHOWN = (
    *("loss", "grad_norm", "learning_rate", "target_tokens", "loss_scale"),  # in words of their own
    *("busiest_expert", "mean_entropy", "router_z", "importance_cv", "sequences"),  # in the file
)

_NAMED_ON_BAR = 3
"""So many adapters have their own numbers on the progress bar; of more, only the mean fits."""


class Recorder:
    """What the loop tells of its steps: `push` and `collect` each step, `drain` at the end.

    Attributes:
      window: the steps since the last line.
      losses: each adapter's training loss in the last line that has one; None where not finite.
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
    ):
        """Starts the clock.

        Args:
          program: the compiled computations of the run's present phase.
          steps: how many each adapter of the run makes; a line is written where one ends.
          writers: where lines of metrics go.
          window: the steps since the last line; not empty where a run resumes between two lines.
          say: prints a line for people.
          bar: shows where the run stands, between two lines.
          losses: those of the last lines so far, where a run resumes.
        """
        self.window = window
        self.losses = dict(losses or {})
        self._training = program.config.training
        self._ends = frozenset(steps.values())
        self._total_steps = max(steps.values())
        self._several = len(steps) > 1
        self._writers = writers
        self._say = say
        self._bar = bar
        self._pending = PendingMetrics()
        self._then: collections.deque[tuple[int, Callable[[], None]]] = collections.deque()
        self._start = time.perf_counter()
        self._speed = _Speed()
        self.follow(program)

    def follow(self, program: Program) -> None:
        """Takes the steps of `program` from now on; those before must have been drained."""
        self._program = program
        self._names = [segment.name for segment in program.segments]
        program.learning_rates(0)  # evaluates the schedules now, while the device is idle

    def push(self, step: int, metrics: Mapping[str, jax.Array], tokens: int) -> None:
        """Takes the metrics of a step that was just dispatched.

        Args:
          step: its number, from 1.
          metrics: as the device will deliver them.
          tokens: how many it has for the speed; 0 where it had to be compiled first.
        """
        self._pending.push(step, metrics)
        if tokens:
            self._speed.add(tokens)

    def collect(self) -> None:
        """Takes note of steps that ended a while ago; does not wait for the newest ones.

        Raises:
          TrainingError: too many gradients in a row were not finite.
        """
        self._note_all(self._pending.ready())

    def drain(self) -> None:
        """As `collect`, but waits for all steps that were pushed."""
        self._note_all(self._pending.drain())

    def when_noted(self, step: int, action: Callable[[], None]) -> None:
        """Calls `action` as soon as the metrics of `step`, the newest one, have been taken note of.

        If they say that the run has gone wrong, it is not called. At most one action waits: the
        metrics that a former one waits for are waited for here.
        """
        if self._then:
            self.drain()
        if self._pending.newest == step:
            self._then.append((step, action))
        else:
            action()

    def note_what_is_waited_for(self) -> None:
        """After an error: takes note of the steps that an action waits for, so that it is done.

        Waits for the device. Nothing else is raised beside the error at hand: an action whose own
        step has gone wrong, or that fails, is left.
        """
        while self._then and self._pending.newest is not None:
            with contextlib.suppress(Exception):
                self._note_all(itertools.islice(self._pending.drain(), 1))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count for the speed of training."""
        with self._speed.paused():
            yield

    def validation(
        self,
        step: int,
        losses: Mapping[str, float],
        metrics: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Writes what was measured after `step`.

        Args:
          step: how many steps were made.
          losses: by `adapter/set`.
          metrics: of classification adapters, by `adapter/set` and name.
        """
        line, metrics = dict[str, Any](), metrics or {}
        for name, loss in losses.items():
            own = {"loss": loss, **metrics.get(name, {})}
            line |= {f"validation/{name}/{metric}": value for metric, value in own.items()}
            values = "  ".join(f"{metric} {value:.4f}" for metric, value in own.items())
            self._say(f"step {step}  validation {name}  {values}")
        self._write(step, line, {})

    def evaluation(self, step: int, name: str, shares: Shares) -> None:
        """Writes the shares of right answers of adapter `name`, measured after `step`."""
        values = {f"evaluation/{name}/{key}": share.value for key, share in shares.items()}
        self._write(step, values, {})
        for text in sentences(step, name, shares):
            self._say(text)

    def _note_all(self, steps: Iterator[tuple[int, dict[str, Any]]]) -> None:
        while True:
            start = time.perf_counter()
            found = next(steps, None)
            self._speed.waited(time.perf_counter() - start)
            if found is None:
                return
            step, metrics = found
            self._note(step, metrics)
            if self._then and self._then[0][0] == step:
                _, action = self._then.popleft()
                action()

    def _note(self, step: int, metrics: dict[str, float]) -> None:
        self.window.add(metrics)
        self._show(step, metrics)
        for name in self._names:
            skipped = int(metrics[f"{name}/skipped_in_a_row"])
            at_end = step == self._program.total_steps[name]
            # A run shorter than that must not end as if it had trained.
            if skipped >= self._training.max_skipped_steps or (at_end and skipped == step):
                raise TrainingError(
                    f"adapter {name!r}: the last {skipped} gradients, up to step {step}, were not "
                    f"finite; try a lower config.adapters.{name}.optimizer.learning_rate, a "
                    "clip_norm, or compute.dtype 'bfloat16' or 'float32'"
                )
        if step % self._training.log_every == 0 or step in self._ends:
            self._close_window(step)

    def _show(self, step: int, metrics: dict[str, Any]) -> None:
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
        speed = self._speed.latest.get("tokens_per_second")
        self._bar.update(step, values if speed is None else {**values, "tokens/s": f"{speed:,.0f}"})

    def _close_window(self, step: int) -> None:
        line: dict[str, Any] = self.window.close()
        skipped = {name: int(line[f"{name}/skipped_total"]) for name in self._names}
        for name, count in skipped.items():
            # The schedule advances with the steps that were applied.
            rates = self._program.learning_rates(step - 1 - count)
            line[f"{name}/learning_rate"] = rates[name]
            if name in self._program.sites:  # whose rows, each with all layers, the metrics have
                line[f"{name}/sites"] = self._program.sites[name]
            self.losses[name] = _finite(line[f"{name}/loss"])
        elapsed = round(time.perf_counter() - self._start, 3)
        times = {"elapsed_seconds": elapsed, **self._speed.measure()}
        self._write(step, line, times)
        for text in self._sentences(step, line, times):
            self._say(text)

    def _write(self, step: int, line: Mapping[str, Any], times: Mapping[str, float]) -> None:
        values = {name: _finite(value) for name, value in line.items()}
        for writer in self._writers:
            writer.write(step, {**values, TIME: dict(times)})

    def _sentences(
        self, step: int, line: Mapping[str, Any], times: Mapping[str, float]
    ) -> list[str]:
        """One adapter's line with all in it; of several, one about the step and one of each."""
        width = len(str(self._total_steps))
        start = [f"step {step:{width}d}/{self._total_steps}"]
        end = [f"padding {line['padding_share']:.0%}"]
        if "tokens_per_second" in times:
            left = round((self._total_steps - step) * times["seconds_per_step"])
            end.append(f"{times['tokens_per_second']:,.0f} tokens/s")
            end.append(f"left {datetime.timedelta(seconds=left)}")
        if not self._several:
            return ["  ".join([*start, *self._parts(self._names[0], line), *end])]
        adapters = ["  ".join([f"  [{name}]", *self._parts(name, line)]) for name in self._names]
        return ["  ".join([*start, *end]), *adapters]

    def _parts(self, name: str, line: Mapping[str, Any]) -> list[str]:
        """What is said of one adapter."""
        own = {k.removeprefix(f"{name}/"): v for k, v in line.items() if k.startswith(f"{name}/")}
        parts = [f"loss {_number(own['loss'], '.4f')}"]
        parts += [
            f"{key} {_number(value, '.3g')}"
            for key, value in own.items()
            if key not in _NOT_SHOWN and not key.startswith("skipped")
            if not isinstance(value, list)
        ]
        parts.append(f"grad {_number(own['grad_norm'], '.3g')}")
        parts.append(f"lr {own['learning_rate']:.2e}")
        if own["skipped_total"]:
            parts.append(f"skipped {own['skipped_total']:.0f}")
        return parts


class _Speed:
    """Steps and tokens per second of the dispatched steps, which keep pace with the device."""

    _FEWEST = 8
    """Steps to measure over; the host runs ahead of the device by a few."""

    def __init__(self):
        self.latest: dict[str, float] = {}
        self._restart()

    def add(self, tokens: int) -> None:
        self._steps += 1
        self._tokens += tokens

    def waited(self, seconds: float) -> None:
        """The host had nothing to do for so long, because the device was still busy."""
        self._waited += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start

    def measure(self) -> dict[str, float]:
        """The speed since the last call, or that of the last call if few steps were made since.

        `host_share` is the share of the time that the host was busy. As long as that is below 1, it
        keeps ahead of the device, which then finds its next step waiting.
        """
        if self._steps >= self._FEWEST:
            seconds = time.perf_counter() - self._mark
            self.latest = {
                "seconds_per_step": round(seconds / self._steps, 6),
                "tokens_per_second": round(self._tokens / seconds, 1),
                "host_share": round(max(0.0, 1.0 - self._waited / seconds), 4),
            }
            self._restart()
        return self.latest

    def _restart(self) -> None:
        self._mark, self._steps, self._tokens = time.perf_counter(), 0, 0
        self._waited = 0.0


def _finite(value: Any) -> Any:
    """JSON has no numbers that are not finite; also within lists, they become None."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
