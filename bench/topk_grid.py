"""topk in the place of torch.topk: ratios over a grid of rows, widths and k.

    python bench/topk_grid.py               measure on one thread what is missing (about 5 minutes)
    python bench/topk_grid.py --again       measure every cell
    python bench/topk_grid.py --draw        the heat map and the summary of the rows that are there

Rows go to bench/results/topk-grid/<machine>.jsonl as soon as a cell is measured, the heat map lies
beside them. A cell is missing that has no row of these sources, this torch and so many threads.

Calls of both get another input each time, in turn, as calls do: a processor learns the branches of
a sort by heart when it sees one small input again and again, which makes torch.topk of 8 x 1000,
k = 500, 3 to 6 times as fast as it is on new data. Results are compared before they are timed.

Exit codes: 0 done, 1 a result was wrong (the cell got no time).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm
from measuring.checkout import RESULTS, sparsekern
from measuring.sources import commit, sources_digest
from rows import append, load

from sparsekern.benchmarks.machine import facts
from sparsekern.benchmarks.measure import Row, rounded
from sparsekern.benchmarks.timing import Effort, Subject, interleave

ROWS = (1, 8, 64, 1024, 16384)
WIDTHS = (16, 128, 1000, 4096, 16384, 65536, 262144)
KS = (1, 8, 32, 128, 500, 2048, 8192)
DTYPES = ("float32", "bfloat16", "float64")
MOST_ELEMENTS = 2**24  # of an input
# Elements of all inputs of a cell, where that takes no more inputs than these.
TURN_ELEMENTS, MOST_INPUTS = 2**20, 64
# The bar: the geometric mean for each dtype, and no cell slower that takes longer than this.
MEANS = {"float32": 3.5, "bfloat16": 3.5, "float64": 1.5}
SMALL_MS = 0.008
FOLDER = RESULTS / "topk-grid"
Cell = tuple[str, int, int, int]


def cells() -> Iterator[Cell]:
    """The grid: dtype, rows, n, k."""
    for dtype, rows, n, k in itertools.product(DTYPES, ROWS, WIDTHS, KS):
        if k <= n and rows * n <= MOST_ELEMENTS:
            yield dtype, rows, n, k


def cell_of(row: Row) -> Cell:
    return row["dtype"], row["rows"], row["n"], row["k"]


def make_inputs(dtype: str, rows: int, n: int) -> list[torch.Tensor]:
    """Normal data for the calls, in turn."""
    count = min(max(TURN_ELEMENTS // (rows * n), 1), MOST_INPUTS)
    x = torch.randn(count, rows, n, generator=torch.Generator().manual_seed(0))
    return list(x.to(getattr(torch, dtype)))


def is_right(x: torch.Tensor, k: int) -> bool:
    """Whether values equal torch's, and indices are theirs: of equal elements the first ones."""
    values, indices = sparsekern.topk(x, k)
    expected = torch.topk(x, k).values
    if not torch.equal(values, expected) or not torch.equal(x.gather(-1, indices), values):
        return False
    tied = values[:, 1:] == values[:, :-1]
    ascending = bool((indices[:, 1:] > indices[:, :-1])[tied].all())
    # as many as are equal to the last one and lie before the last of them that was taken
    last, taken = values[:, -1:], (values == values[:, -1:]).sum(-1)
    place = torch.arange(x.shape[-1])
    before = ((x == last) & (place <= indices[:, -1:])).sum(-1)
    return ascending and torch.equal(taken, before)


def measure(cell: Cell, inputs: Sequence[torch.Tensor], effort: Effort) -> Row:
    """Check one cell and time it: milliseconds of both, the peer's over ours; None where wrong."""
    dtype, rows, n, k = cell
    row = {"op": "topk", "rows": rows, "n": n, "k": k, "dtype": dtype, "inputs": len(inputs)}
    times: Row = dict.fromkeys(("median_ms", "peer_median_ms", "ratio", "repeats"))
    if is_right(inputs[0], k):
        ours = Subject("ours", _in_turn(sparsekern.topk, inputs, k))
        peer = Subject("torch.topk", _in_turn(torch.topk, inputs, k))
        timings = interleave([ours, peer], "cpu", effort)
        mine, theirs = timings["ours"], timings["torch.topk"]
        times = {
            "median_ms": rounded(mine.median_ms),
            "peer_median_ms": rounded(theirs.median_ms),
            "ratio": rounded(theirs.median_ms / mine.median_ms),
            "repeats": mine.repeats,
        }
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {**row, **times, **_session(), "date": date}


def _in_turn(
    topk: Callable[[torch.Tensor, int], object], inputs: Sequence[torch.Tensor], k: int
) -> Callable[[], object]:
    following = itertools.cycle(inputs).__next__
    return lambda: topk(following(), k)


@functools.cache
def _session() -> Row:
    found = facts("cpu")
    kept = ("machine", "cpu", "threads", "instruction_set")
    sources = {"commit": commit(), "sources": sources_digest(), "torch": torch.__version__}
    return {**{name: found[name] for name in kept}, **sources}


def newest(rows: Sequence[Row]) -> dict[Cell, Row]:
    """The newest timed row of each cell on this machine, of so many threads."""
    here = _session()
    kept = [row for row in rows if all(row[m] == here[m] for m in ("machine", "threads"))]
    return {cell_of(row): row for row in kept if row["ratio"] is not None}


def is_current(row: Row) -> bool:
    """Whether a row is of these sources and this torch."""
    here = _session()
    return all(row[name] == here[name] for name in ("sources", "torch", "instruction_set"))


def summary(found: dict[Cell, Row]) -> list[str]:
    """Lines that say how far the grid is from the bar."""
    lines = []
    for dtype, bar in MEANS.items():
        ratios = {cell: row["ratio"] for cell, row in found.items() if cell[0] == dtype}
        if not ratios:
            continue
        mean = math.exp(sum(math.log(ratio) for ratio in ratios.values()) / len(ratios))
        slower = [cell for cell, ratio in ratios.items() if ratio < 1]
        missed = [cell for cell in slower if found[cell]["median_ms"] > SMALL_MS]
        lines.append(
            f"{dtype}: {len(ratios)} cells, geometric mean {mean:.2f}x (bar {bar:g}x), least "
            f"{min(ratios.values()):.2f}x; slower than torch.topk: {len(slower)}, of them "
            f"{len(missed)} that take more than {1000 * SMALL_MS:g} us"
        )
        for cell in missed:
            row = found[cell]
            lines.append(
                f"  {cell[1]} x {cell[2]}, k = {cell[3]}: {row['ratio']:.2f}x, "
                f"{1000 * row['median_ms']:.1f} us against {1000 * row['peer_median_ms']:.1f}"
            )
    return lines


def draw(found: dict[Cell, Row], path: Path) -> None:
    """The heat map: a panel for each dtype and number of rows, n across, k upwards."""
    figure, grid = plt.subplots(
        len(DTYPES), len(ROWS), figsize=(3.1 * len(ROWS), 2.7 * len(DTYPES)),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    image = None
    for axes_row, dtype in zip(grid, DTYPES, strict=True):
        for axes, rows in zip(axes_row, ROWS, strict=True):
            ratios = [
                [found.get((dtype, rows, n, k), {}).get("ratio", math.nan) for n in WIDTHS]
                for k in KS
            ]
            image = axes.imshow(
                ratios, cmap="RdYlBu", norm=LogNorm(0.1, 10), origin="lower", aspect="auto"
            )
            for (j, k), (i, n) in itertools.product(enumerate(KS), enumerate(WIDTHS)):
                if row := found.get((dtype, rows, n, k)):
                    words = f"{row['ratio']:.1f}" if row["ratio"] < 10 else f"{row['ratio']:.0f}"
                    axes.annotate(words, (i, j), ha="center", va="center", fontsize=6)
            axes.set_title(f"{dtype}, {rows} row{'s' * (rows > 1)}", fontsize=8)
            axes.set_xticks(range(len(WIDTHS)), WIDTHS, fontsize=6, rotation=45)
            axes.set_yticks(range(len(KS)), KS, fontsize=6)
    for axes in grid[-1]:
        axes.set_xlabel("n", fontsize=7)
    for axes in grid[:, 0]:
        axes.set_ylabel("k", fontsize=7)
    figure.colorbar(image, ax=grid, label="torch.topk's time / topk's time", shrink=0.6)
    here = _session()
    figure.suptitle(
        f"topk against torch.topk: {here['cpu']}, threads: {here['threads']}", fontsize=9
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    effort = Effort(options.seconds, least=options.least, most=2000)
    done = newest(load(FOLDER)) if FOLDER.exists() else {}
    done = {} if options.again else {cell: row for cell, row in done.items() if is_current(row)}
    wanted = [] if options.draw else [c for c in cells() if c not in done and _asked(c, options)]
    wrong = 0
    for (dtype, rows, n), group in itertools.groupby(wanted, lambda cell: cell[:3]):
        inputs = make_inputs(dtype, rows, n)
        for cell in group:
            row = measure(cell, inputs, effort)
            wrong += row["ratio"] is None
            append(FOLDER, [row])
            said = "WRONG" if row["ratio"] is None else f"{row['ratio']:.2f}x"
            sys.stdout.write(f"{dtype} {rows} x {n}, k = {cell[3]}: {said}\n")
            sys.stdout.flush()
    found = newest(load(FOLDER)) if FOLDER.exists() else {}
    sys.stdout.writelines(f"{line}\n" for line in summary(found))
    if found:
        draw(found, FOLDER / f"{_session()['machine']}.png")
    return 1 if wrong else 0


def _asked(cell: Cell, options: argparse.Namespace) -> bool:
    dtype, rows, n, k = cell
    return options.only in f"{dtype} {rows} x {n}, k = {k}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure topk beside torch.topk over a grid.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.25, help="time for each cell's loop")
    parser.add_argument("--least", type=int, default=3, help="rounds of each loop at least")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells that contain this text")
    parser.add_argument("--again", action="store_true", help="measure cells that have a row, too")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    return parser


if __name__ == "__main__":
    with sparsekern.backend("auto"):  # whatever SPARSEKERN_BACKEND says
        sys.exit(main())
