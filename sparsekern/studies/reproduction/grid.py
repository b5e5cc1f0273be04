"""What a reproduction does between its request and its report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...training.runs import write_atomically
from ..configs import SettingError
from .cells import AnyCell, GridOutcome, is_finished, run_cells, usable_processors
from .folder import REQUEST, merged_request


def checked_jobs(jobs: int | None) -> int | None:
    """Check a number of cells at a time, which may be None.

    Raises:
        ValueError: it is below 1.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
    return jobs


def run_grid(
    study: ModuleType,
    folder: Path,
    configs: Mapping[AnyCell, Any],
    request: Mapping[str, Any],
    *,
    fixed: Sequence[str],
    lists: Sequence[str],
    jobs: int | None,
    device: torch.device,
    progress: bool,
) -> tuple[GridOutcome, dict[str, Any]]:
    """Run what is not finished yet, in a locked folder.

    Args:
        study: its package, with Config, run and saved_config.
        folder: of the reproduction, see folder.locked.
        configs: what each cell runs.
        request: what was asked for; see folder.merged_request, also for fixed and lists.
        fixed: what must be as it was.
        lists: what may be added to.
        jobs: cells at a time; by default one for each processor, or one with a GPU.
        device: that the cells run on.
        progress: show a progress bar.

    Returns:
        How the cells ended, and the request together with earlier ones.

    Raises:
        RunError: the folder holds something else.
        ValueError: a setting has no effect on any cell.
    """
    if jobs is None:
        jobs = 1 if device.type == "cuda" else min(usable_processors(), len(configs))
    for name in request["overrides"]:
        reasons = [config.without_effect().get(name) for config in configs.values()]
        if reasons and all(reasons):
            raise SettingError(name, f"has no effect {reasons[0]}")
    new = json.loads(json.dumps(request))
    asked = merged_request(new, folder, fixed=fixed, lists=lists)
    finished = [c for c, config in configs.items() if is_finished(study, folder, c, config)]
    text = json.dumps(asked, indent=2) + "\n"
    write_atomically(folder / REQUEST, text.encode())
    outcome = run_cells(study, folder, configs, finished, jobs=jobs, progress=progress)
    return outcome, asked
