"""Shuffled batches of the activation store against reading the same file in order.

    python bench/activations.py              append the two lines of the table
    python bench/activations.py --dry-run    print, append nothing

The file is written first, to the folder named (a disk, not memory), and removed at the end. Before
each pass its pages are dropped from the system's cache, so that both read the disk. The peer reads
into a preallocated array with h5py's read_direct, 16384 rows at a time, and does nothing else. Both
passes add up the first feature, which checks that the same rows came. Other sizes, and --cached,
make rows of their own, which the table does not show.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from measuring.checkout import RESULTS
from rows import Row, append
from targets import STORE_BYTES, Target, activation_store
from workloads import describe, judged

from sparsekern.benchmarks.measure import Comparison, Outcome, row_of
from sparsekern.benchmarks.problem import Problem
from sparsekern.benchmarks.timing import summary
from sparsekern.data import ActivationStore, write_activations

DTYPES = ("float16", "float32")
IN_ORDER_ROWS = 16384
PIECE_ROWS = 65536


def pieces(rows: int, features: int) -> Iterator[torch.Tensor]:
    """Normal rows in float16, every piece another rotation of the same numbers."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(PIECE_ROWS, features, generator=generator).half()
    for start in range(0, rows, PIECE_ROWS):
        yield numbers.roll(start // PIECE_ROWS, 0)[: rows - start]


def drop_pages(path: Path) -> None:
    """Drops the file's pages from the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def in_order(path: Path) -> float:
    """Reads everything in order; returns the sum of the first feature."""
    total = 0.0
    with h5py.File(path, "r") as file:
        rows = file["activations"]
        buffer = np.empty((IN_ORDER_ROWS, rows.shape[1]), rows.dtype)
        for start in range(0, len(rows), IN_ORDER_ROWS):
            count = min(IN_ORDER_ROWS, len(rows) - start)
            rows.read_direct(buffer[:count], np.s_[start : start + count])
            total += buffer[:count, 0].sum(dtype=np.float64)
    return total


def shuffled(path: Path, batch_size: int, dtype: torch.dtype, seed: int) -> float:
    """One epoch of shuffled batches; returns the sum of the first feature."""
    with ActivationStore(path) as store:
        batches = store.batches(batch_size, seed=seed, dtype=dtype)
        return sum(batch[:, 0].double().sum().item() for batch in batches)


def measure(path: Path, batch_size: int, repeats: int, cached: bool) -> dict[str, list[float]]:
    """Seconds of each pass, interleaved: "in order", and shuffled batches by their dtype."""

    def batches(dtype: str) -> Callable[[int], float]:
        return lambda seed: shuffled(path, batch_size, getattr(torch, dtype), seed)

    passes = {"in order": lambda seed: in_order(path), **{name: batches(name) for name in DTYPES}}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    expected = None
    for repeat in range(repeats):
        for name, run in passes.items():
            if not cached:
                drop_pages(path)
            start = time.perf_counter()
            total = run(repeat)
            seconds[name].append(time.perf_counter() - start)
            expected = total if expected is None else expected
            # float64 sums of float16 numbers of both signs, in another order
            if abs(total - expected) > 1e-6 * max(1.0, abs(expected)):
                raise SystemExit(f"{name}: other rows came, their sum is {total}, not {expected}")
    return seconds


def row(target: Target, seconds: dict[str, list[float]], dtype: str) -> Row:
    """The row of one line, in the form that all benchmarks share."""
    workload = target.workload
    timings = {
        name: summary([1e3 * time_ for time_ in seconds[which]])
        for name, which in ((target.backend, dtype), (target.peer, "in order"))
    }
    problem = Problem(
        ours=lambda: None,  # timed already
        peers={},
        check=lambda backend: 0.0,
        traffic=2 * workload.file_rows * workload.d,
        formula="the file read once",
        roof=None,
    )
    comparison = Comparison(target.backend, target.peer)
    made = row_of(problem, workload, comparison, Outcome(None, 0.0, None), timings, {})
    return judged(made, target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the file, measures, prints a line for each dtype and appends its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=STORE_BYTES / 1e9)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", default=".", help="where to write; on a disk")
    parser.add_argument("--cached", action="store_true", help="leave the pages in memory")
    parser.add_argument("--dry-run", action="store_true", help="append no rows")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    rows = max(1, int(options.gigabytes * 1e9 / (2 * options.features)))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "activations.h5"
        write_activations(path, pieces(rows, options.features))
        if options.cached:
            in_order(path)
        seconds = measure(path, options.batch_size, options.repeats, options.cached)
    pages = "cached" if options.cached else "dropped"
    sizes = (rows, options.features, options.batch_size)
    made = [row(activation_store(*sizes, dtype, pages), seconds, dtype) for dtype in DTYPES]
    if not options.dry_run:
        append(options.results, made)
    for one in made:
        sys.stdout.write(f"{describe(one)}\n")


if __name__ == "__main__":
    main()
