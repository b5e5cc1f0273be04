"""The reproduction of the study by one command: a grid of cells and a report on them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import vae_sae
from ..reproduction import (
    REQUEST,
    GridOutcome,
    checked_jobs,
    checked_names,
    locked,
    read_cells,
    run_grid,
)
from ..runs import check_one_process, check_packages, usable_device
from . import grid, report
from .config import DATASETS, VAESAEConfig
from .grid import Cell, asked_cells, cell_config, cells, parsed_overrides
from .images import check_file

GROUPS = {
    "study": grid.STUDY,
    "controls": grid.CONTROLS,
    "cures": grid.CURES,
    "all": tuple(grid.ARMS),
}


@dataclass(frozen=True)
class Request:
    """What to reproduce."""

    preset: str
    datasets: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: int
    """Seeds 0..seeds-1."""
    data: Mapping[str, str]
    """Published files, by data set."""
    overrides: Mapping[str, Any]
    """Fields of the config that differ from the preset."""

    @classmethod
    def from_options(
        cls,
        preset: str,
        datasets: Sequence[str],
        arms: Sequence[str],
        seeds: int | None,
        data: Sequence[str],
        settings: Sequence[str],
    ) -> Request:
        """Make a request of the words of the command line.

        Raises:
            ValueError: an unknown name or a value out of its range.
        """
        names = [name for arm in arms for name in GROUPS.get(arm, (arm,))]
        seeds = grid.SEEDS[preset] if seeds is None else seeds
        if seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {seeds}")
        sets = checked_names("--datasets", datasets, DATASETS)
        files = {}
        for item in data:
            name, equals, path = item.partition("=")
            if not equals or name not in DATASETS or not path:
                known = ", ".join(DATASETS)
                raise ValueError(f"--data must be SET=FILE with SET one of {known}, got {item!r}")
            if name in files:
                raise ValueError(f"--data must name each data set once, got {name} twice")
            files[name] = os.path.abspath(path)
        return cls(
            preset,
            tuple(sets),
            tuple(checked_names("--arms", names, tuple(grid.ARMS))),
            seeds,
            files,
            parsed_overrides(settings),
        )

    def digests(self) -> dict[str, str]:
        """Hash the data files with SHA-256, by data set: a file may move, but not change."""
        digests_by_set = {}
        for name, path in self.data.items():
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            digests_by_set[name] = digest.hexdigest()
        return digests_by_set

    def configs(self) -> dict[Cell, VAESAEConfig]:
        """Make the config of each cell."""
        wanted = cells(self.datasets, self.arms, range(self.seeds))
        return {
            cell: cell_config(cell, self.preset, self.overrides, self.data.get(cell.dataset))
            for cell in wanted
        }


def reproduce(
    request: Request, folder: str | Path, *, jobs: int | None = None, progress: bool = True
) -> GridOutcome:
    """Run what is not finished yet and write the report on everything that is.

    Args:
        request: what to run.
        folder: of the report; an earlier reproduction there is continued, and must have been asked
            for with the same preset, settings and data files.
        jobs: cells at a time; by default one for each processor, or one with a GPU.
        progress: show a progress bar.

    Raises:
        ValueError: settings that do not fit together.
        DataError: a data file cannot be used.
        RunError: the folder is in use, or holds something else.
    """
    check_packages()
    check_one_process()
    configs = request.configs()
    jobs = checked_jobs(jobs)
    device = usable_device(next(iter(configs.values())).device)
    for cell, config in configs.items():
        if cell.seed == 0:
            check_file(config)
    folder = Path(folder)
    for name in request.data:
        # Later calls for other data sets must name the files of all.
        if name not in request.datasets and not (folder / REQUEST).exists():
            raise ValueError(f"--data must be of the data sets asked for, got one of {name}")
    with locked(folder):
        outcome, asked = run_grid(
            vae_sae,
            folder,
            configs,
            {**asdict(request), "digests": request.digests()},
            fixed=("preset", "overrides", "digests"),
            lists=("datasets", "arms"),
            jobs=jobs,
            device=device,
            progress=progress,
        )
        wanted = asked_cells(asked)
        finished = read_cells(vae_sae, folder, wanted)
        if finished:
            report.write(folder, asked, finished, failed=outcome.failed, total=len(wanted))
    return outcome
