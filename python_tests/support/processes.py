"""Processes that tests start, and kill."""

import os
import subprocess
import sys
from pathlib import Path

import sparsekern


def spawn(*arguments: str, threads: int = 1) -> subprocess.Popen[str]:
    """A Python process that imports the package that these tests import (not the source tree of the
    current folder, which may have no compiled code), finds what tests share, and uses so many
    threads."""
    here = str(Path(sparsekern.__file__).resolve().parent.parent)
    folders = os.pathsep.join([here, str(Path(__file__).resolve().parent)])
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=here,
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
