"""The reproduction of the study by one command: a grid of cells and a report on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import sparling
from ..reproduction import GridOutcome, checked_jobs, checked_names, locked, read_cells, run_grid
from ..runs import check_one_process, check_packages, usable_device
from . import grid, report
from .config import SparlingConfig
from .grid import Cell, asked_cells, cell_config, cells, parsed_overrides
from .run import domain_of


@dataclass(frozen=True)
class Request:
    """What to reproduce."""

    preset: str
    arms: tuple[str, ...]
    seeds: int
    """Seeds 0..seeds-1."""
    data: str | None
    """Folder of recordings."""
    overrides: dict[str, Any]
    """Fields of the config that differ from the preset."""

    @classmethod
    def from_options(
        cls,
        preset: str,
        arms: Sequence[str],
        seeds: int | None,
        data: str | None,
        settings: Sequence[str],
    ) -> Request:
        """Make a request of the words of the command line.

        Raises:
            ValueError: an unknown name or a value out of its range.
        """
        names = [name for arm in arms for name in grid.GROUPS.get(arm, (arm,))]
        seeds = grid.SEEDS[preset] if seeds is None else seeds
        if seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {seeds}")
        wanted = tuple(checked_names("--arms", names, tuple(grid.ARMS)))
        data_path = None if data is None else os.path.abspath(data)
        return cls(preset, wanted, seeds, data_path, parsed_overrides(settings))

    def configs(self) -> dict[Cell, SparlingConfig]:
        """Make the config of each cell."""
        return {
            cell: cell_config(cell, self.preset, self.overrides, self.data)
            for cell in cells(self.arms, self.seeds)
        }


def reproduce(
    request: Request, folder: str | Path, *, jobs: int | None = None, progress: bool = True
) -> GridOutcome:
    """Run what is not finished yet and write the report on everything that is.

    Args:
        request: what to run.
        folder: of the report; an earlier reproduction there is continued, and must have been asked
            for with the same preset, settings and data.
        jobs: cells at a time; by default one for each processor, or one with a GPU.
        progress: show a progress bar.

    Raises:
        ValueError: settings that do not fit together.
        DataError: the recordings cannot be used.
        RunError: the folder is in use, or holds something else.
    """
    check_packages()
    check_one_process()
    configs = request.configs()
    jobs = checked_jobs(jobs)
    first = next(iter(configs.values()))
    device = usable_device(first.device)
    domain = domain_of(first)  # reads the recordings
    folder = Path(folder)
    with locked(folder):
        outcome, asked = run_grid(
            sparling,
            folder,
            configs,
            asdict(request),
            fixed=("preset", "overrides", "data"),
            lists=("arms",),
            jobs=jobs,
            device=device,
            progress=progress,
        )
        wanted = asked_cells(asked)
        finished = read_cells(sparling, folder, wanted)
        if finished:
            report.write(folder, asked, finished, domain, failed=outcome.failed, total=len(wanted))
    return outcome
