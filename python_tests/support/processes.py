"""Processes that tests start, and kill."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import torch

import sparsekern

# Of what a process needs, what takes longest to import.
_IMPORTS = [
    "torch.distributed.tensor", "sparsekern.cli.command", "sparsekern.studies.registry",
    "sparsekern.distributed", "matplotlib.figure", "matplotlib.backends.backend_agg", "h5py",
]  # fmt: skip
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(_IMPORTS)


def spawn(*arguments: str, threads: int = 1) -> subprocess.Popen[str]:
    """A Python process that imports the package that these tests import (not the source tree of the
    current folder, which may have no compiled code), finds what tests share, and uses so many
    threads."""
    here = _place()
    folders = os.pathsep.join([here, str(Path(__file__).resolve().parent)])
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=here,
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _place() -> str:
    """The folder with the package that these tests import."""
    return str(Path(sparsekern.__file__).resolve().parent.parent)


@contextlib.contextmanager
def _in_folder(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Forked:
    """A process of one thread that calls a function, and ends with what it returns.

    It begins with the package imported, which takes a process of `spawn` seconds: a server, which
    does nothing but import it, forks. Otherwise like subprocess.Popen.

    Args:
        function: at the top of a module; what it returns is the exit code, None for 0.
    """

    def __init__(self, function: Callable[..., int | None], *arguments: object) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("out", "err")]
        self._process = _server.Process(target=_call, args=(self._outputs, function, arguments))
        with _in_folder(_place()):  # the first one starts the server
            forkserver.ensure_running()
        self._process.start()
        self.pid: int = self._process.pid
        while not self._outputs[-1].exists() and self.returncode is None:
            time.sleep(0.001)  # until a signal meets what it would meet in any process

    @property
    def returncode(self) -> int | None:
        """Exit code; negative: the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; what the process wrote to standard output and standard error."""
        self.wait(timeout)
        out, err = (
            path.read_text(errors="replace") if path.exists() else "" for path in self._outputs
        )
        return out, err

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def run_together(function: Callable[..., None], count: int, *arguments: object) -> None:
    """Calls a function in so many processes, with the number of each, and waits for all."""
    processes = [Forked(function, rank, *arguments) for rank in range(count)]
    ends = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    assert all(code == 0 for _, code in ends), ends


def wait_for_growth(process: Forked | subprocess.Popen[str], file: Path, times: int = 1) -> None:
    """Returns when the process has written so often to a file, or has ended."""
    sizes = {file.stat().st_size if file.exists() else 0}
    while process.poll() is None and len(sizes) <= times:
        time.sleep(0.02)
        sizes.add(file.stat().st_size if file.exists() else 0)


def run_command(words: list[str]) -> int:
    """What `sparsekern WORDS` does, for `Forked`."""
    from sparsekern.cli.command import main

    return main(words)


def _call(outputs, function, arguments):
    try:
        for number, path in enumerate(outputs, start=1):
            file = os.open(path, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, number)
            os.close(file)
        torch.set_num_threads(1)
        sys.exit(function(*arguments))
    except KeyboardInterrupt:  # as the interpreter ends
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
