"""Processes that tests start, and kill."""

import os
import subprocess
import sys
from pathlib import Path

import sparsekern


def spawn(*arguments: str) -> subprocess.Popen[str]:
    """A Python process that imports the package that these tests import (not the source tree of the
    current folder, which may have no compiled code) and, like them, uses one thread."""
    here = str(Path(sparsekern.__file__).resolve().parent.parent)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=here,
        env={**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
