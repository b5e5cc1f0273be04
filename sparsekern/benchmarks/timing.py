"""Times callables against each other, in turns, on a CPU or a CUDA GPU.

One loop calls ours, the peer, ours, the peer, ..., so that whatever else the machine does hits all
of them alike; the figures are medians over the rounds. On a GPU, events time the stream, and the
L2 cache is overwritten before each call, which also gives the host time to queue the call.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import sparsekern

# More than twice the L2 cache of any GPU of today; writing it takes about 0.1 ms, longer than the
# host needs to launch a call.
FLUSH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Effort:
    """How long to measure: for about `seconds`, but at least and at most so many rounds."""

    seconds: float = 1.5
    least: int = 11
    most: int = 500


@dataclass(frozen=True)
class Subject:
    """Something to time; `backend` forces an implementation around each call, outside the clock."""

    name: str
    call: Callable[[], object]
    backend: str | None = None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile over the rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


class CpuClock:
    """Wall time of one call; what it returns is freed after the clock has stopped."""

    def time(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of a call."""
        start = time.perf_counter_ns()
        result = call()
        stop = time.perf_counter_ns()
        del result
        return (stop - start) / 1e6


class CudaClock:
    """Time between two events around one call, with a cold L2 cache."""

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.start = torch.cuda.Event(enable_timing=True)
        self.stop = torch.cuda.Event(enable_timing=True)

    def time(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of a call."""
        self.flushed.zero_()
        self.start.record()
        result = call()
        self.stop.record()
        self.stop.synchronize()
        del result
        milliseconds: float = self.start.elapsed_time(self.stop)
        return milliseconds


def clock_for(device: str) -> CpuClock | CudaClock:
    """Return the clock of a device type."""
    return CudaClock() if device == "cuda" else CpuClock()


def forced(backend: str | None) -> contextlib.AbstractContextManager[object]:
    """Force a backend, or leave the automatic choice."""
    return contextlib.nullcontext() if backend is None else sparsekern.backend(backend)


def automatic(op: str, device: str) -> str:
    """Return the backend that the library chooses by itself for an operation on a device."""
    for row in sparsekern.describe()["implementations"]:
        if (row["operation"], row["device"]) == (op, device):
            return str(row["backend"])
    raise ValueError(f"automatic: no operation {op!r} on {device!r}")


def interleave(
    subjects: Sequence[Subject], device: str = "cpu", effort: Effort | None = None
) -> dict[str, Timing]:
    """Time all subjects in turns and return a timing for each name."""
    effort = effort or Effort()
    clock = clock_for(device)
    # Changing the backend clears the library's choices; an untimed call makes them again.
    primed = any(subject.backend for subject in subjects)

    def turn(subject: Subject) -> float:
        with forced(subject.backend):
            if primed:
                subject.call()
            return clock.time(subject.call)

    for subject in subjects:
        turn(subject)
    began = time.perf_counter()
    times = {subject.name: [turn(subject)] for subject in subjects}
    round_seconds = time.perf_counter() - began
    rounds = min(max(int(effort.seconds / round_seconds), effort.least), effort.most)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds - 1):
            for subject in subjects:
                times[subject.name].append(turn(subject))
    finally:
        if collecting:
            gc.enable()
    return {name: summary(figures) for name, figures in times.items()}


def summary(milliseconds: Sequence[float]) -> Timing:
    """Median and percentiles of the times of one subject."""
    if len(milliseconds) == 1:
        milliseconds = [milliseconds[0]] * 2
    tenths = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return Timing(statistics.median(milliseconds), tenths[1], tenths[7], len(milliseconds))
