"""Measure the speed table on this machine and append its rows to bench/results.

    python bench/run.py                     the lines of the CPU, and those of a GPU if there is one
    python bench/run.py --only topk         lines whose text contains "topk"
    python bench/run.py --dry-run           print, append nothing

New rows also go into the tables and figures of the README and the documentation (bench/pages.py).

Lines whose peer is not installed are left out, and so are those of bench/activations.py.
Exit codes: 0 done, 1 a kernel failed its check (it got no time), 2 nothing to measure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pages
import torch
from measuring.checkout import RESULTS, sparsekern
from rows import append
from targets import RUN, TARGETS, Target, by_workload, usable
from workloads import describe, measure_workload

from sparsekern.benchmarks.timing import Effort


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    wanted = [target for target in TARGETS if _wanted(target, options)]
    targets, notes = usable(target for target in wanted if target.command == RUN)
    notes += sorted({f"{t.command} measures {t.workload.op}" for t in wanted if t.command != RUN})
    for note in notes:
        _say(note)
    if options.device != "cpu" and not torch.cuda.is_available():
        _say("the GPU lines are left out: torch sees no GPU")
    if not targets:
        _say("nothing to measure: no line matches")
        return 2
    groups = by_workload(targets)
    began, refused = time.monotonic(), 0
    for number, (workload, lines) in enumerate(groups.items(), 1):
        rows = measure_workload(
            workload, lines, Effort(options.seconds, options.least), not options.no_memory
        )
        if not options.dry_run:
            append(options.results, rows)
        for row in rows:
            _say(f"[{number}/{len(groups)}] {describe(row)}")
            refused += row["refused"] is not None
        if workload.device == "cuda":
            torch.cuda.empty_cache()
    if not options.dry_run and options.results == RESULTS:
        pages.main([])
    _say(f"{len(groups)} workloads in {time.monotonic() - began:.0f} s")
    return 1 if refused else 0


def _wanted(target: Target, options: argparse.Namespace) -> bool:
    device = target.workload.device
    if device == "cuda" and not torch.cuda.is_available():
        return False
    if options.device not in ("all", device):
        return False
    return options.only in f"{target.workload} {target.backend} {target.peer}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the speed table and append its rows.")
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all")
    parser.add_argument("--only", default="", metavar="TEXT", help="lines that contain this text")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="time for each workload's loop (default 1.5)"
    )
    parser.add_argument(
        "--least", type=int, default=11, help="rounds of each loop at least (default 11)"
    )
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--dry-run", action="store_true", help="append no rows")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    return parser


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    with sparsekern.backend("auto"):  # whatever SPARSEKERN_BACKEND says
        sys.exit(main())
