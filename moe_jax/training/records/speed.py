"""Speed of training: steps, tokens and FLOPs per second."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class _Work(NamedTuple):
    """Steps, and the tokens, FLOPs and seconds of them."""

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def plus(self, other: "_Work") -> "_Work":
        return _Work(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.seconds + other.seconds,
        )


class Speed:
    """Steps, tokens and FLOPs per second, from dispatch times; dispatch keeps pace with the device.

    FLOPs are those that the model needs, see `moe_jax.training.step.needed_flops`.
    """

    _MIN_STEPS = 8
    """Steps to average over, as the host runs ahead of the device by a few."""

    def __init__(self, rate: float | None = None):
        """Starts the clock.

        Args:
          rate: FLOP/s of the devices' matrix products; None if unknown.
        """
        self.latest: dict[str, float] = {}
        self._rate = rate
        self._former = _Work()
        self._restart()

    def add(self, tokens: int, flops: float) -> None:
        self._work = self._work.plus(_Work(1, tokens, flops))

    def add_wait(self, seconds: float) -> None:
        """Adds time in which the host waited for the device."""
        self._waited += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start

    def measure(self) -> dict[str, float]:
        """Speed since the last call, or that of the last call if fewer than 8 steps were made.

        `host_share` is the share of the time in which the host was busy. Below 1, the host runs
        ahead of the device, which never waits for its next step. `mfu` is the share of the FLOPs
        that the devices' rate allows.
        """
        if self._work.steps >= self._MIN_STEPS:
            work = self._until_now()
            busy = max(0.0, 1.0 - self._waited / work.seconds)
            self.latest = {**self._figures(work), "host_share": round(busy, 4)}
            self._former = self._former.plus(work)
            self._restart()
        return self.latest

    def overall(self) -> dict[str, float]:
        """Speed over all steps so far; empty without any."""
        work = self._former.plus(self._until_now()) if self._work.steps else self._former
        return self._figures(work) if work.steps else {}

    def _until_now(self) -> _Work:
        return self._work._replace(seconds=time.perf_counter() - self._mark)

    def _figures(self, work: _Work) -> dict[str, float]:
        flops_per_second = work.flops / work.seconds
        figures = {
            "seconds_per_step": round(work.seconds / work.steps, 6),
            "tokens_per_second": round(work.tokens / work.seconds, 1),
            "model_tflops_per_second": float(f"{flops_per_second / 1e12:.5g}"),
        }
        if self._rate is not None:
            figures["mfu"] = float(f"{flops_per_second / self._rate:.5g}")
        return figures

    def _restart(self) -> None:
        self._mark, self._work, self._waited = time.perf_counter(), _Work(), 0.0


def speed_texts(speed: Mapping[str, float]) -> list[str]:
    """Speed as texts for the console."""
    texts = [
        f"{speed['tokens_per_second']:,.0f} tokens/s",
        f"{speed['model_tflops_per_second']:.3g} TFLOP/s",
    ]
    return [*texts, f"MFU {speed['mfu']:.0%}"] if "mfu" in speed else texts
