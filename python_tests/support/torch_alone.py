"""Programs that begin where torch is imported, which takes a second, and nothing else."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import sparsekern

# It forks for each program; of a program that raises, the child prints what Python prints.
SERVER = """
import json, os, sys, torch
for line in sys.stdin:
    code, environment, outputs = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in zip((0, 1, 2), (os.devnull, *outputs)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(environment)
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        sys.exit()
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It imports the package that these tests import, and ends with this process."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(sparsekern.__file__).resolve().parent.parent,
    )


def run_after_torch(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program with these variables, and return its exit code, standard output and error.

    torch is imported with the variables of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("out", "err")]
        server = _server()
        job = code, {**os.environ, **environment}, list(map(str, outputs))
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(path.read_text() for path in outputs))
