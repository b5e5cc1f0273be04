"""What a study hands to the commands: each declares one `STUDY` in its `commands.py`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .configs import StudyConfig
from .runs import RunResult


@dataclass(frozen=True)
class Reproduction:
    """The command `sparsekern reproduce NAME`."""

    help: str
    description: str
    epilog: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    """Add the flags that are the study's own to a parser."""
    run: Callable[[argparse.Namespace, Path], Any]
    """Run what the options ask for into a folder; return how the cells ended
    (reproduction.GridOutcome)."""


@dataclass(frozen=True)
class Study:
    """The command `sparsekern train NAME`, and `reproduce` where there is one."""

    name: str
    help: str
    description: str
    config: type[StudyConfig]
    """A dataclass whose fields become flags."""
    presets: Mapping[str, Mapping[str, Any]]
    """Settings to start from by name; "default" is one."""
    files: tuple[str, ...]
    """What a finished run leaves in its folder, for the last line of the command."""
    run: Callable[..., RunResult]
    """Train, given a config and a folder."""
    table: Callable[[Mapping[str, Any], Any], str]
    """The results of a run as text, given the results and the config."""
    saved_config: Callable[[str | Path], Any]
    """The config of the run in a folder."""
    several_processes: bool = False
    """Whether `run` takes a mesh of processes, which torchrun started."""
    reproduction: Reproduction | None = None
