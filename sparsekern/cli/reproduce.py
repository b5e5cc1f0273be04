"""The command ``sparsekern reproduce``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..studies.registry import STUDIES
from ..studies.runs import out_folder
from ..studies.study import Reproduction


def add_reproduce(commands: Any) -> None:
    """Add ``reproduce`` to the commands of a parser."""
    parser = commands.add_parser("reproduce", help="run a published study and write its report")
    studies = parser.add_subparsers(title="studies", metavar="STUDY", required=True)
    for study in STUDIES.values():
        if study.reproduction is not None:
            _add_study(studies, study.name, study.reproduction)


def _add_study(studies: Any, name: str, reproduction: Reproduction) -> None:
    """Add a study to the studies that can be reproduced."""
    parser = studies.add_parser(
        name,
        help=reproduction.help,
        description=reproduction.description,
        epilog=reproduction.epilog,
        allow_abbrev=False,
    )
    reproduction.add_flags(parser)
    add = parser.add_argument
    add("--set", nargs="+", action="extend", metavar="NAME=VALUE", default=[], dest="settings",
        help=f"change the protocol: flags of 'train {name}' that no arm sets")  # fmt: skip
    add("--jobs", type=int, help="cells at a time (default: the processors, or 1 with a GPU)")
    add("--progress", action=argparse.BooleanOptionalAction, default=True,
        help="show a progress bar (default: yes)")  # fmt: skip
    parser.set_defaults(
        function=_reproduce, command=f"reproduce {name}", study=name, reproduction=reproduction
    )


def _reproduce(options: argparse.Namespace) -> int:
    """Reproduce a study and tell how that ended; return the exit status."""
    study = options.study
    with out_folder(options.out, f"reproduce-{study}") as out:
        outcome = options.reproduction.run(options, out)
    if outcome.signal is not None:
        sys.stdout.write(
            f"interrupted; finished cells are kept, the others are saved. Go on with the same "
            f"command and --out {out}\n"
        )
        return 128 + int(outcome.signal)
    for name, reason in outcome.failed.items():
        sys.stderr.write(f"sparsekern: error: reproduce {study}: cell {name} failed: {reason}\n")
    sys.stdout.write(
        f"{len(outcome.finished)} cells, {len(outcome.failed)} failed; report: "
        f"{out}/report.html and report.md\n"
    )
    return 2 if outcome.failed else 0
