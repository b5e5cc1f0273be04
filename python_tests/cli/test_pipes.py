"""Commands whose output nobody reads to its end, and a machine without torch."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_thread import one_thread

import sparsekern
from sparsekern.cli.command import main
from sparsekern.data import write_activations

__all__ = ["one_thread"]  # a fixture
BROKEN_PIPE = 128 + 13


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A file of activations, and a run on it."""
    folder = tmp_path_factory.mktemp("pipes")
    write_activations(folder / "a.h5", [torch.randn(600, 8)])
    assert main(training(folder, "run")) == 0
    return folder


def training(folder, name):
    flags = ["--latents", "16", "--k", "2", "--auxk", "0", "--batch-size", "100", "--no-progress"]
    flags += ["--activations", str(folder / "a.h5"), "--out", str(folder / name)]
    return ["train", "sae", *flags]


COMMANDS = {
    "help": lambda folder: ["--help"],
    "help of a command": lambda folder: ["train", "vae-sae", "--help"],
    "version": lambda folder: ["--version"],
    "info": lambda folder: ["info"],
    "eval": lambda folder: ["eval", str(folder / "run")],
    "eval of several": lambda folder: ["eval", str(folder / "run"), str(folder / "again")],
    "train": lambda folder: training(folder, "new"),
    "data": lambda folder: [
        "data", "activations", "synthetic", "--out", str(folder / "s.h5"), "--tokens", "600",
        "--features", "8", "--latents", "16", "--active", "2",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_output_that_nobody_reads_ends_quietly(name, place, monkeypatch, capfd):
    if name == "eval of several":
        assert main(training(place, "again")) == 0
    reading, writing = os.pipe()
    os.close(reading)
    capfd.readouterr()
    with os.fdopen(writing, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        try:
            code = main(COMMANDS[name](place))
        except SystemExit as stop:
            code = stop.code
    assert code == BROKEN_PIPE
    assert capfd.readouterr().err == ""
    if name == "train":
        assert (place / "new" / "results.json").exists()


@pytest.mark.slow
def test_a_process_says_nothing_of_it_either(place):
    command = [sys.executable, "-m", "sparsekern", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == BROKEN_PIPE
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_standard_stream_that_is_closed_is_no_error(closed, place, tmp_path):
    words = [sys.executable, "-m", "sparsekern", *training(place, tmp_path / "run")]
    words.remove("--no-progress")
    done = subprocess.run(["sh", "-c", f"{shlex.join(words)} {closed}"], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("how", ["command", "module", "import"])
def test_without_torch_one_line_says_so(how, tmp_path):
    package = Path(sparsekern.__file__).parent
    blocked = tmp_path / "torch.py"
    blocked.write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    script = tmp_path / "sparsekern"
    script.write_text("from sparsekern.cli import main\nmain()\n")
    words = {
        "command": [str(script), "--help"],
        "module": ["-m", "sparsekern", "--help"],
        "import": ["-c", "import sparsekern"],
    }[how]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{package.parent}"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stdout == "" and "sparsekern needs torch, which is not installed" in done.stderr
    if how == "import":
        assert done.returncode == 1 and done.stderr.rstrip().splitlines()[-1].startswith("Module")
    else:
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
