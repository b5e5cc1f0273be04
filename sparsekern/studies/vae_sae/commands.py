"""What the commands offer of this study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..study import Reproduction, Study
from . import grid
from .config import DATASETS, PRESETS, VAESAEConfig
from .run import FILES, run, saved_config, table


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--preset", choices=tuple(grid.PRESETS), default="small",
        help="small: 32 x 32 images for two cores; full: the whole sets, for a GPU")  # fmt: skip
    add("--out", metavar="FOLDER", help="of the report; by default runs/reproduce-vae-sae-<date>")
    add("--datasets", nargs="+", action="extend", metavar="SET",
        help=f"of {', '.join(DATASETS)} (default: both)")  # fmt: skip
    add("--arms", nargs="+", action="extend", metavar="ARM",
        help="names of arms, or study, controls, cures, all (default: study controls)")  # fmt: skip
    add("--seeds", type=int, metavar="N", help="seeds 0..N-1 (default: 2 for small, 3 for full)")
    add("--data", nargs="+", action="extend", metavar="SET=FILE", default=[],
        help="published files of the data sets; others are rendered")  # fmt: skip


def _reproduce(options: argparse.Namespace, folder: Path) -> Any:
    from .reproduce import Request, reproduce  # the report draws

    request = Request.from_options(
        options.preset,
        options.datasets or list(DATASETS),
        options.arms or ["study", "controls"],
        options.seeds,
        options.data,
        options.settings,
    )
    return reproduce(request, folder, jobs=options.jobs, progress=options.progress)


STUDY = Study(
    name="vae-sae",
    help="VAE with a top-k sparse layer on dSprites",
    description=(
        "Trains the VAE-SAE hybrid on dSprites while k falls from 500 to 50. Without arguments "
        "it renders a dSprites-compatible subset and takes a few minutes on two cores."
    ),
    config=VAESAEConfig,
    presets=PRESETS,
    files=FILES,
    run=run,
    table=table,
    saved_config=saved_config,
    reproduction=Reproduction(
        help="the collapse of a VAE-SAE's neurons under sparsification (arXiv 2603.18056)",
        description=(
            "Trains every data set x arm x seed of the VAE-SAE study, several at a time, and "
            "writes report.md, report.html, figures and CSV files into one folder. Started again "
            "with the same --out it keeps what is finished and goes on; arms, seeds and data sets "
            "may be added."
        ),
        epilog="arms: " + "; ".join(f"{name}: {arm.text}" for name, arm in grid.ARMS.items()),
        add_flags=_add_flags,
        run=_reproduce,
    ),
)
