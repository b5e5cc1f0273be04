"""What the commands offer of this study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..study import Reproduction, Study
from . import grid
from .config import PRESETS, SparlingConfig
from .run import FILES, run, saved_config, table


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", choices=tuple(grid.PRESETS), default="tiny",
        help="tiny: for two cores; the others are of the published size, for a GPU")  # fmt: skip
    add("--out", metavar="FOLDER", help="of the report; by default runs/reproduce-sparling-<date>")
    add("--arms", nargs="+", action="extend", metavar="ARM",
        help="names of arms, or study, l1, kl, ablations, all (default: study l1)")  # fmt: skip
    add("--seeds", type=int, metavar="N",
        help="seeds 0..N-1, at most 3 of other arms (default: 6 for tiny, else 1)")  # fmt: skip
    add("--data", metavar="FOLDER", help="of the AudioMNIST recordings (preset audio)")


def _reproduce(options: argparse.Namespace, folder: Path) -> Any:
    from .reproduce import Request, reproduce  # the report draws

    request = Request.from_options(
        options.preset,
        options.arms or ["study", "l1"],
        options.seeds,
        options.data,
        options.settings,
    )
    return reproduce(request, folder, jobs=options.jobs, progress=options.progress)


STUDY = Study(
    name="sparling",
    help="motifs found by extreme activation sparsity",
    description=(
        "Trains a local network, a bottleneck of extreme sparsity and a readout end to end on "
        "inputs labelled with sequences of symbols, while the bottleneck's density falls, and "
        "measures whether its activations are the motifs. Without arguments it takes minutes."
    ),
    config=SparlingConfig,
    presets=PRESETS,
    files=FILES,
    run=run,
    table=table,
    saved_config=saved_config,
    reproduction=Reproduction(
        help="motifs found end to end by extreme activation sparsity (arXiv 2302.01976)",
        description=(
            "Trains every arm x seed of the Sparling study, several at a time, and writes "
            "report.md, report.html, figures and CSV files into one folder. Started again with the "
            "same --out it keeps what is finished and goes on; arms and seeds may be added."
        ),
        epilog="arms: " + "; ".join(f"{name}: {arm.text}" for name, arm in grid.ARMS.items()),
        add_flags=_add_flags,
        run=_reproduce,
    ),
)
