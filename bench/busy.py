"""Small calls on the CPU, alone and beside busy processes.

    python bench/busy.py [--rounds 300]

A second thread pays only where it saves more than it costs to have one. On a quiet machine that is
microseconds; where another process has the core that the second thread needs, the first waits for
it for milliseconds. Each call is timed in turns: with the threads that the kernels choose, and with
teams forced for any work; then again beside one spinning process per core. Prints the median and
the 95th percentile in microseconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable

import torch
from measuring.checkout import sparsekern

from sparsekern.dispatch import modules

FORCED_NANOSECONDS = 1.0  # of work that pay for a thread when teams are forced


def calls() -> dict[str, Callable[[], object]]:
    """Calls from a few microseconds to about a millisecond of one core's work."""
    row, long_row = torch.randn(1, 16384), torch.randn(1, 1 << 20)
    few, many = torch.randn(8, 4096), torch.randn(512, 4096)
    weight, values = torch.randn(4096, 256), torch.randn(64, 32)
    indices = torch.randint(0, 4096, (64, 32))
    return {
        "topk (1, 16384)": lambda: sparsekern.topk(row, 32),
        "topk (1, 2^20)": lambda: sparsekern.topk(long_row, 32),
        "topk (8, 4096)": lambda: sparsekern.topk(few, 32),
        "topk (512, 4096)": lambda: sparsekern.topk(many, 32),
        "sparse_matmul (64, 32)": lambda: sparsekern.sparse_matmul(values, indices, weight),
    }


def timed(call: Callable[[], object]) -> float:
    """Microseconds of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def measure(call: Callable[[], object], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each round: as the kernels choose, and with forced teams, in turns."""
    module, reason = modules.native_module("cpu")
    if module is None:
        raise SystemExit(reason)
    times: dict[str, list[float]] = {"chosen": [], "forced": []}
    usual = module.set_nanoseconds_per_thread(FORCED_NANOSECONDS)
    try:
        for _ in range(rounds):
            for name, per_thread in (("chosen", usual), ("forced", FORCED_NANOSECONDS)):
                module.set_nanoseconds_per_thread(per_thread)
                times[name].append(timed(call))
    finally:
        module.set_nanoseconds_per_thread(usual)
    return times


def spin() -> None:
    """Keeps a core busy until the process is ended."""
    while True:
        pass


def report(title: str, rounds: int) -> None:
    """Prints a line per call."""
    print(f"{title}: median (95 %) in microseconds, {torch.get_num_threads()} threads of torch")
    for name, call in calls().items():
        call()
        cells = []
        for how, times in measure(call, rounds).items():
            high = statistics.quantiles(times, n=20)[-1]
            cells.append(f"{how} {statistics.median(times):9.1f} ({high:9.1f})")
        print(f"  {name:24} {'   '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="timings of each kind")
    rounds = parser.parse_args().rounds
    report("alone", rounds)
    context = multiprocessing.get_context("spawn")
    neighbours = [context.Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1)]
    for process in neighbours:
        process.start()
    try:
        report(f"beside {len(neighbours)} busy processes", rounds)
    finally:
        for process in neighbours:
            process.terminate()


if __name__ == "__main__":
    main()
