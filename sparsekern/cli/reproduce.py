"""The command ``sparsekern reproduce``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from ..studies.configs import out_folder


def add_reproduce(commands: Any) -> None:
    """Adds ``reproduce`` to the commands of a parser."""
    parser = commands.add_parser("reproduce", help="run a published study and write its report")
    studies = parser.add_subparsers(title="studies", metavar="STUDY", required=True)
    _add_vae_sae(studies)
    _add_sparling(studies)


def _add_vae_sae(studies: Any) -> None:
    from ..studies.vae_sae.config import DATASETS
    from ..studies.vae_sae.grid import ARMS, PRESETS

    text = "the collapse of a VAE-SAE's neurons under sparsification (arXiv 2603.18056)"
    parser = studies.add_parser(
        "vae-sae",
        help=text,
        description=(
            "Trains every data set x arm x seed of the VAE-SAE study, several at a time, and "
            "writes report.md, report.html, figures and CSV files into one folder. Started again "
            "with the same --out it keeps what is finished and goes on; arms, seeds and data sets "
            "may be added."
        ),
        epilog="arms: " + "; ".join(f"{name}: {arm.text}" for name, arm in ARMS.items()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default="small",
        help="small: 32 x 32 images for two cores; full: the whole sets, for a GPU")  # fmt: skip
    add("--out", metavar="FOLDER", help="of the report; by default runs/reproduce-vae-sae-<date>")
    add("--datasets", nargs="+", action="extend", metavar="SET",
        help=f"of {', '.join(DATASETS)} (default: both)")  # fmt: skip
    add("--arms", nargs="+", action="extend", metavar="ARM",
        help="names of arms, or study, controls, cures, all (default: study controls)")  # fmt: skip
    add("--seeds", type=int, metavar="N", help="seeds 0..N-1 (default: 2 for small, 3 for full)")
    add("--data", nargs="+", action="extend", metavar="SET=FILE", default=[],
        help="published files of the data sets; others are rendered")  # fmt: skip
    _add_run(parser, "vae-sae")
    parser.set_defaults(function=_vae_sae, command="reproduce vae-sae")


def _add_run(parser: argparse.ArgumentParser, study: str) -> None:
    """The flags of every study."""
    add = parser.add_argument
    add("--set", nargs="+", action="extend", metavar="NAME=VALUE", default=[], dest="settings",
        help=f"change the protocol: flags of 'train {study}' that no arm sets")  # fmt: skip
    add("--jobs", type=int, help="cells at a time (default: the processors, or 1 with a GPU)")
    add("--progress", action=argparse.BooleanOptionalAction, default=True,
        help="show a progress bar (default: yes)")  # fmt: skip


def _add_sparling(studies: Any) -> None:
    from ..studies.sparling.grid import ARMS, PRESETS

    parser = studies.add_parser(
        "sparling",
        help="motifs found end to end by extreme activation sparsity (arXiv 2302.01976)",
        description=(
            "Trains every arm x seed of the Sparling study, several at a time, and writes "
            "report.md, report.html, figures and CSV files into one folder. Started again with the "
            "same --out it keeps what is finished and goes on; arms and seeds may be added."
        ),
        epilog="arms: " + "; ".join(f"{name}: {arm.text}" for name, arm in ARMS.items()),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default="tiny",
        help="tiny: for two cores; the others are of the published size, for a GPU")  # fmt: skip
    add("--out", metavar="FOLDER", help="of the report; by default runs/reproduce-sparling-<date>")
    add("--arms", nargs="+", action="extend", metavar="ARM",
        help="names of arms, or study, l1, kl, ablations, all (default: study l1)")  # fmt: skip
    add("--seeds", type=int, metavar="N",
        help="seeds 0..N-1, at most 3 of other arms (default: 6 for tiny, else 1)")  # fmt: skip
    add("--data", metavar="FOLDER", help="of the AudioMNIST recordings (preset audio)")
    _add_run(parser, "sparling")
    parser.set_defaults(function=_sparling, command="reproduce sparling")


def _sparling(options: argparse.Namespace) -> int:
    from ..studies.sparling.reproduce import Request, reproduce

    request = Request.from_options(
        options.preset,
        options.arms or ["study", "l1"],
        options.seeds,
        options.data,
        options.settings,
    )
    return _reproduced("sparling", reproduce, request, options)


def _vae_sae(options: argparse.Namespace) -> int:
    from ..studies.vae_sae.config import DATASETS
    from ..studies.vae_sae.reproduce import Request, reproduce

    request = Request.from_options(
        options.preset, options.datasets or list(DATASETS), options.arms or ["study", "controls"],
        options.seeds, options.data,
        options.settings,
    )  # fmt: skip
    return _reproduced("vae-sae", reproduce, request, options)


def _reproduced(
    study: str, reproduce: Callable[..., Any], request: Any, options: argparse.Namespace
) -> int:
    """Reproduces a study and tells how that ended; the exit status."""
    with out_folder(options.out, f"reproduce-{study}") as out:
        ended = reproduce(request, out, jobs=options.jobs, progress=options.progress)
    if ended.signal is not None:
        sys.stdout.write(
            f"interrupted; finished cells are kept, the others are saved. Go on with the same "
            f"command and --out {out}\n"
        )
        return 128 + ended.signal
    for name, reason in ended.failed.items():
        sys.stderr.write(f"sparsekern: error: reproduce {study}: cell {name} failed: {reason}\n")
    sys.stdout.write(
        f"{len(ended.finished)} cells, {len(ended.failed)} failed; report: {out}/report.html and "
        f"report.md\n"
    )
    return 2 if ended.failed else 0
