"""top-k over a grid of widths, k and dtypes: each backend and torch.topk, interleaved.

    python bench/sweep.py --device cuda     native and triton against torch.topk
    python bench/sweep.py --device cpu      native against torch.topk

A cell's rows are appended as soon as it is measured. Exit codes: 0 done, 1 a kernel failed its
check (it got no time).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from measuring.checkout import RESULTS
from rows import append
from targets import Target
from workloads import describe, measure_workload

from sparsekern.benchmarks.timing import Effort
from sparsekern.benchmarks.workload import Workload

WIDTHS = (4096, 16384, 65536, 262144, 1048576)
KS = (8, 32, 64, 128, 512)
DTYPES = ("float32", "bfloat16")
PEER = "torch.topk"
# Elements of a cell: on a GPU far more than its L2 cache, at most 4096 rows.
ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
MOST_ROWS = 4096
BACKENDS = {"cpu": ("native",), "cuda": ("native", "triton")}


def cells(device: str) -> Iterator[Workload]:
    """The grid, widest variety first: a sweep that is cut short has seen every width."""
    for k, dtype, n in itertools.product(KS, DTYPES, WIDTHS):
        rows = min(max(ELEMENTS[device] // n, 1), MOST_ROWS)
        yield Workload("topk", rows, n, k, dtype=dtype, device=device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure top-k over a grid and append rows.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each cell's loop")
    parser.add_argument("--limit", type=float, default=600.0, help="stop after so many seconds")
    parser.add_argument("--dry-run", action="store_true", help="append no rows")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("sweep: torch sees no GPU; use --device cpu\n")
        return 2
    grid, began, refused = list(cells(options.device)), time.monotonic(), 0
    effort = Effort(options.seconds, least=5)
    for number, workload in enumerate(grid, 1):
        if time.monotonic() - began > options.limit:
            sys.stdout.write(f"stopped at the limit of {options.limit:g} s\n")
            break
        targets = [Target(workload, PEER, backend=name) for name in BACKENDS[options.device]]
        rows = measure_workload(workload, targets, effort, memory=False)
        if not options.dry_run:
            append(options.results, rows)
        for row in rows:
            refused += row["refused"] is not None
            sys.stdout.write(f"[{number}/{len(grid)}] {describe(row)}\n")
        sys.stdout.flush()
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
