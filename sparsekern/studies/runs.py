"""What the runs of all studies share: where they run, their folders, and how they end."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import BackendUnavailableError, describe
from ..training import CheckpointError, Outcome, RunError, RunFolder, TrainingError
from ..training.runs import unused_folder
from .configs import AnyConfig, SettingError, StudyConfig, with_absolute_paths
from .processes import process_count

# What bad input, a full disk or a missing package raise: reported in a line, without a trace.
# ValueError: bad values and data files. OSError: a full disk, for one.
EXPECTED_ERRORS = (
    BackendUnavailableError, CheckpointError, ModuleNotFoundError, OSError, RunError, TrainingError,
    ValueError,
)  # fmt: skip
NEEDED = ("matplotlib", "tqdm")


class RunResult(NamedTuple):
    """What a run ends with."""

    outcome: Outcome
    results: dict[str, Any] | None
    """Final measurements, or None when training was interrupted."""


def usable_device(name: str) -> torch.device:
    """Find the device of a name; "auto" is a GPU when there is one.

    Of several processes, each takes the GPU of its number on its machine (LOCAL_RANK).

    Raises:
        ValueError: there is no such device, or it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and process_count() > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError("device", f"{name!r} cannot be used: {reason}") from error
    return device


@contextmanager
def out_folder(given: str | None, name: str) -> Iterator[Path]:
    """Yield the folder of --out; without it a new one of the time, taken back if unused.

    Raises:
        ValueError: an empty name, such as that of an unset variable.
    """
    if given == "":
        raise ValueError("--out must name a folder, got an empty name")
    if given is not None:
        yield Path(given)
        return
    with unused_folder(time.strftime(f"runs/{name}-%Y%m%d-%H%M%S")) as folder:
        yield folder


def check_packages() -> None:
    """Raise ModuleNotFoundError, naming them, when packages of the extra "data" are missing."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"{', '.join(missing)} not installed (pip install 'sparsekern[data]')"
        )


def check_one_process() -> None:
    """Raise RunError under torchrun with several processes, which would all do the same."""
    if (count := process_count()) != 1:
        raise RunError(
            f"a study runs in one process, not in {count} (WORLD_SIZE): start it without torchrun, "
            "or with --nproc-per-node 1"
        )


def prepared(config: AnyConfig, *, several_processes: bool = False) -> AnyConfig:
    """Check that a run can begin here, and make the config's paths absolute.

    several_processes: whether the study can use them.

    Raises:
        ModuleNotFoundError, RunError: packages are missing, or there are several processes.
    """
    check_packages()
    if not several_processes:
        check_one_process()
    return with_absolute_paths(config)


@contextmanager
def run_folder(
    folder: Path,
    study: str,
    config: StudyConfig,
    *,
    resume: bool,
    on_metrics: Callable[[Mapping[str, Any]], object] | None,
    first: bool = True,
) -> Iterator[RunFolder]:
    """Open the run's folder, locked while it is used: a new one with the config, or the old one.

    first: False in other processes of the run than the one that writes.

    Raises:
        RunError: there is a run already, none to resume, or another process is at it.
    """
    if not first:
        yield RunFolder.followed(folder)
        return
    stored = {"study": study, "config": asdict(config)}
    with RunFolder.open(folder) if resume else RunFolder.create(folder, stored) as place:
        place.on_metrics = on_metrics
        yield place


def read_config(folder: str | Path, study: str, kind: type[AnyConfig]) -> AnyConfig:
    """Read the config of the run in a folder.

    Raises:
        RunError: there is no run, or not one of this study.
    """
    stored = RunFolder.read_config(folder)
    if stored.get("study") != study:
        raise RunError(f"{folder} holds a run of {stored.get('study')!r}, not of {study!r}")
    try:
        return kind(**stored["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder} holds a config this version cannot read: {error}") from error


def backends_of(operations: Sequence[str], device: str) -> dict[str, str]:
    """Look up which backend serves each of these operations on a device type."""
    return {
        row["operation"]: row["backend"]
        for row in describe()["implementations"]
        if row["device"] == device and row["operation"] in operations
    }
