"""Reprint the speed table from the newest committed row of each of its lines.

    python bench/table.py               for the terminal
    python bench/table.py --markdown    as Markdown; hard inputs are shown by their worst case

bench/pages.py writes the tables of the documentation.

Exit codes: 0 every measured line reaches its bar, 1 one does not, or a line of the CPU has no row.
GPU lines without a row are shown as not measured and do not count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rows import Row, load
from targets import CPU_TARGETS, GPU_TARGETS, MIB, RUN, Target, key_of

from sparsekern.benchmarks.cases.topk import ITSELF
from sparsekern.benchmarks.measure import peak_of
from sparsekern.benchmarks.workload import BY_CHANNEL

RESULTS = Path(__file__).resolve().parent / "results"
HEADER = (
    "operation", "case", "ours", "against", "its time", "ratio", "required", "", "roofline",
    "peak memory", "its peak",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line of the table with its newest row, if there is one."""

    target: Target
    row: Row | None

    @property
    def good(self) -> bool:
        """Measured, correct, and at its bar; GPU lines that were not measured count as good."""
        if self.row is None:
            return self.target.workload.device == "cuda"
        if self.row["refused"]:
            return False
        fraction = self.row["roofline_fraction"]
        return self.target.reached(self.row["ratio"], fraction, peak_of(self.row))

    def cells(self) -> tuple[str, ...]:
        """What is printed, in the order of the header."""
        workload, target, row = self.target.workload, self.target, self.row
        cast = f"{workload.autocast} autocast" if workload.autocast else workload.dtype
        names = [workload.op, cast]
        names += [workload.mode] * (workload.mode != "forward")
        names += [target.backend] * (workload.device == "cuda")
        extras = [workload.fill] * (workload.fill != "normal")
        transposed = workload.layout == "column-major" and workload.op not in BY_CHANNEL
        extras += ["nn.Linear weight"] * transposed
        start = (" ".join(names), ", ".join([workload.case, *extras]))
        if row is None:
            where = "on a GPU" if workload.device == "cuda" else "on this machine"
            rest = (f"not measured {where}", target.peer, "", "", target.requirement(), "")
            return (*start, *rest, "", "", "")
        if row["refused"]:
            rest = (f"no time: {row['refused'][:40]}", target.peer, "", "", target.requirement())
            return (*start, *rest, "MISSED", "", "", "")
        ratio = 1 / row["ratio"] if target.at_most else row["ratio"]
        verdict = "reached" if self.good else "MISSED"
        return (
            *start,
            f"{row['median_ms']:.4g} ms",
            target.peer,
            f"{row['peer_median_ms']:.4g} ms",
            f"{ratio:.2f}x",
            target.requirement(),
            verdict if target.required else "",
            f"{row['roofline_fraction']:.0%} of {row['roof']}" if row["roof"] else "",
            _size(peak_of(row) if target.with_gradients else row["peak_allocated_bytes"]),
            _size(row["peer_peak_allocated_bytes"]),
        )


def _size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 2**10:.1f} KiB"


def newest(rows: Sequence[Row], machine: str | None = None) -> dict[tuple, Row]:
    """The newest row of each line, from one machine per device type: the named one, else the one
    with the newest row of the table. Machines are never mixed."""
    found: dict[tuple, Row] = {}
    for device, targets in (("cpu", CPU_TARGETS), ("cuda", GPU_TARGETS)):
        keys = {target.key for target in targets}
        about = [row for row in rows if row["device"] == device and key_of(row) in keys]
        if machine is not None and any(row["machine"] == machine for row in about):
            chosen = machine
        elif about:
            chosen = max(about, key=lambda row: row["date"])["machine"]
        else:
            continue
        found |= {key_of(row): row for row in about if row["machine"] == chosen}
    return found


def worst_of_hard(lines: Sequence[Line]) -> list[Line]:
    """Hard inputs by their worst size, all other lines as they are."""
    kept: list[Line] = []
    worst: dict[tuple[str, str], int] = {}
    for line in lines:
        key = (line.target.workload.fill, line.target.workload.dtype)
        if line.target.peer != ITSELF or line.row is None or line.row["refused"]:
            kept.append(line)
        elif key not in worst:
            worst[key] = len(kept)
            kept.append(line)
        elif line.row["ratio"] < kept[worst[key]].row["ratio"]:
            kept[worst[key]] = line
    return kept


def render(lines: Sequence[Line], markdown: bool) -> str:
    """The table as text."""
    cells = [HEADER, *(line.cells() for line in lines)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(HEADER))]
    padded = [
        [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)] for row in cells
    ]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in padded)
    rule = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:]))


def provenance(lines: Sequence[Line]) -> list[str]:
    """Where the figures come from: one sentence per machine."""
    said = []
    for device in ("cpu", "cuda"):
        rows = [line.row for line in lines if line.row and line.row["device"] == device]
        if not rows:
            continue
        last = max(rows, key=lambda row: row["date"])
        threads = " or ".join(str(count) for count in sorted({row["threads"] for row in rows}))
        where = last["gpu"] if device == "cuda" else f"{last['cpu']}, {threads} threads"
        dates = sorted({row["date"][:10] for row in rows})
        commits = sorted({row["commit"] for row in rows})
        said.append(
            f"{where}, {last['instruction_set']}, torch {last['versions']['torch']}, "
            f"{' and '.join(dates)}, commit {', '.join(commits)}; rows in "
            f"bench/results/{last['machine']}.jsonl."
        )
    return said


def origins(lines: Sequence[Line]) -> list[str]:
    """Which command measures what, and which versions of other packages were compared."""
    others: dict[str, list[str]] = {}
    for line in lines:
        if line.target.command != RUN and line.row:
            others.setdefault(line.target.command, []).append(line.target.workload.op)
    said = [f"{', '.join(dict.fromkeys(ops))}: `{command}`" for command, ops in others.items()]
    text = f"Measured by `{RUN}`" + "".join(f"; {what}" for what in said) + "."
    versions = {
        f"{line.row['peer']} {line.row['peer_version']}"
        for line in lines
        if line.row and line.row.get("peer_version")
    }
    return [text] + [f"Packages compared with: {', '.join(sorted(versions))}."] * bool(versions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Reprint the speed table from committed rows.")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument("--machine", help="rows of this machine (a file name in bench/results)")
    parser.add_argument("--device", choices=("all", "cpu", "cuda"), default="all")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    found = newest(load(options.results), options.machine)
    targets = [t for t in CPU_TARGETS + GPU_TARGETS if options.device in ("all", t.workload.device)]
    lines = [Line(target, found.get(target.key)) for target in targets]
    shown = worst_of_hard(lines) if options.markdown else lines
    bad = [line for line in lines if not line.good]
    barred = [line for line in lines if line.target.required and line.row is not None]
    reached = sum(line.good for line in barred)
    text = [render(shown, options.markdown), "", *provenance(lines), *origins(lines)]
    text.append(f"{reached} of {len(barred)} measured bars reached.")
    if options.device != "cpu" and not any(t.key in found for t in GPU_TARGETS):
        text.append("The GPU lines were not measured on a GPU.")
    sys.stdout.write("\n".join(text) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
