"""Draw the committed rows: the speed table as ratios to the peers, and the sweep of top-k.

    python bench/plots.py                   PNGs beside the rows, in bench/results
    python bench/plots.py --out FOLDER

Exit codes: 0 done, 2 there are no rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter
from rows import Row, load
from table import Line, newest
from targets import TARGETS

RESULTS = Path(__file__).resolve().parent / "results"
OURS, PEER, BAR = "#1f6f8b", "#c8553d", "#222222"
LEAST_WIDTHS = 3  # fewer make no curve
FORWARD_ONLY = {"mode": "forward", "fill": "normal", "op": "topk", "peer": "torch.topk"}


def draw_table(lines: Sequence[Line], title: str, path: Path) -> None:
    """Horizontal bars: peer's time over ours for each line, a mark at what is required."""
    lines = [line for line in lines if line.row and not line.row["refused"]][::-1]
    figure, axes = plt.subplots(figsize=(12, 1.4 + 0.24 * len(lines)), layout="constrained")
    ratios = [line.row["ratio"] for line in lines]
    colors = [OURS if line.good else PEER for line in lines]
    axes.barh(range(len(lines)), ratios, color=colors, height=0.7)
    for at, line in enumerate(lines):
        if line.target.bar is not None:
            axes.plot([line.target.bar] * 2, [at - 0.42, at + 0.42], color=BAR, linewidth=2)
        axes.annotate(f" {line.row['ratio']:.2f}", (line.row["ratio"], at), va="center", fontsize=7)
    axes.set_yticks(range(len(lines)), [_label(line) for line in lines], fontsize=7)
    axes.set_xscale("log")
    bars = [line.target.bar for line in lines if line.target.bar is not None]
    axes.set_xlim(0.25, 1.5 * max([1, *ratios, *bars]))
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="grey", linewidth=0.8)
    figure.supxlabel("peer's time / our time; black marks: required; red: missed", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label(line: Line) -> str:
    name = f"{line.target.workload} vs {line.target.peer}"
    return f"{name} [{line.target.backend}]" if line.target.workload.device == "cuda" else name


def sweep_rows(rows: Sequence[Row], machine: str) -> list[Row]:
    """The newest row of each top-k case on normal data against torch.topk on a machine."""
    newest_rows: dict[tuple, Row] = {}
    for row in rows:
        plain = all(row[name] == value for name, value in FORWARD_ONLY.items())
        if plain and row["machine"] == machine and not row["refused"]:
            key = (row["n"], row["k"], row["dtype"], row["backend"])
            newest_rows[key] = row
    found = list(newest_rows.values())
    return found if len({row["n"] for row in found}) >= LEAST_WIDTHS else []


def draw_sweep(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bandwidth over width, a panel per dtype and k, a line per backend and for the peer."""
    dtypes = sorted({row["dtype"] for row in rows})
    ks = sorted({row["k"] for row in rows})
    figure, grid = plt.subplots(
        len(dtypes), len(ks), figsize=(3 * len(ks), 2.6 * len(dtypes)),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for dtype, panels in zip(dtypes, grid, strict=True):
        for k, axes in zip(ks, panels, strict=True):
            shown = [row for row in rows if (row["dtype"], row["k"]) == (dtype, k)]
            for backend in sorted({row["backend"] for row in shown}):
                points = sorted((r["n"], r["gbps"]) for r in shown if r["backend"] == backend)
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=backend)
            peer = sorted((r["n"], r["traffic_bytes"] / r["peer_median_ms"] / 1e6) for r in shown)
            if peer:
                axes.plot(*zip(*peer, strict=True), color=PEER, marker=".", label="torch.topk")
                roof = shown[-1]["roofline"][shown[-1]["roof"]]
                axes.axhline(roof, color="grey", linestyle=":", label="measured roofline")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{dtype}, k = {k}", fontsize=8)
    labelled = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled, loc="outside lower right", fontsize=7, ncols=4)
    figure.supxlabel("n", fontsize=8)
    figure.supylabel("GB/s of the data read once", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Draw the rows of bench/results.")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--out", type=Path, help="folder for the PNGs (default: the results')")
    options = parser.parse_args(arguments)
    rows = load(options.results)
    if not rows:
        sys.stderr.write(f"plots: no rows in {options.results}; run bench/run.py first\n")
        return 2
    out = options.out or options.results
    out.mkdir(parents=True, exist_ok=True)
    for machine in sorted({row["machine"] for row in rows}):
        here = [row for row in rows if row["machine"] == machine]
        found = newest(here)
        title = f"{machine}, {here[-1]['date'][:10]}, commit {here[-1]['commit']}"
        drawn = []
        if found:
            lines = [Line(target, found.get(target.key)) for target in TARGETS]
            draw_table(lines, title, out / f"{machine}-table.png")
            drawn.append(f"{machine}-table.png")
        if swept := sweep_rows(here, machine):
            draw_sweep(swept, f"topk on {title}", out / f"{machine}-sweep.png")
            drawn.append(f"{machine}-sweep.png")
        sys.stdout.write(f"{out}: {', '.join(drawn)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
