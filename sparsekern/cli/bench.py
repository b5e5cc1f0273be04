"""The command ``sparsekern bench``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

QUICK_SECONDS = 170.0


def add_bench(commands: Any) -> None:
    """Add ``bench`` to the commands of a parser."""
    parser = commands.add_parser(
        "bench",
        help="how fast the kernels are on this machine, beside torch and other libraries",
        description="Checks and times operations and training steps beside torch and those of "
        "eai-sparsify, sae-lens and dictionary-learning that are installed, each library in a "
        "process of its own, and leaves a report with a picture.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--quick", action="store_true", help="the headlines alone, in less than three minutes"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    parser.add_argument("--only", default="", metavar="TEXT", help="lines that contain this text")
    parser.add_argument("--out", metavar="FOLDER", help="new, default: runs/bench-<date>-<time>")
    parser.add_argument("--threads", type=int, help="of a CPU (default: as torch chooses)")
    parser.add_argument("--seconds", type=float, help="for each loop (default: 0.5, or 1)")
    parser.add_argument("--limit", type=float, help="seconds after which nothing more begins")
    parser.set_defaults(function=_bench, command="bench")


def _bench(options: argparse.Namespace) -> int:
    """Measure, print a line for each comparison, and write the report."""
    import torch

    from ..benchmarks import session, suites
    from ..studies.runs import out_folder, usable_device

    for name in ("seconds", "limit", "threads"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be positive, got {value:g}")
    device = usable_device(options.device).type
    if options.threads:
        torch.set_num_threads(options.threads)
    jobs = suites.quick(device) if options.quick else suites.sweep(device)
    jobs = [job for job in jobs if options.only in f"{job.workload} {' '.join(job.others)}"]
    if not jobs:
        raise ValueError(f"--only must be a part of some line, got {options.only!r}")
    with out_folder(options.out, "bench") as folder:
        if (folder / session.ROWS).exists():
            raise ValueError(
                f"--out must be a folder without earlier measurements, got {folder} with "
                f"{session.ROWS}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        machine = session.describe_machine(device)
        for line in machine:
            _say(line)
        rows: list[dict[str, Any]] = []
        notes: list[str] = []
        try:
            session.run(
                jobs,
                folder,
                device=device,
                seconds=options.seconds or (0.5 if options.quick else 1.0),
                least=3 if options.quick else 5,
                limit=options.limit or (QUICK_SECONDS if options.quick else float("inf")),
                say=_say,
                rows=rows,
                notes=notes,
            )
        except KeyboardInterrupt:
            if rows:
                session.write_report(folder, machine, rows, [*notes, "all else: interrupted"])
                _say(f"report of what was measured: {folder / 'report.md'}")
            raise
        for note in notes:
            _say(f"left out: {note}")
        if not rows:
            return 1
        session.write_report(folder, machine, rows, notes)
        _say(f"report: {folder / 'report.md'}")
    return 1 if any(row["refused"] for row in rows) else 0


def _say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
