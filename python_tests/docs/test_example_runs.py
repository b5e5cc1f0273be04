"""The examples of training run as they stand, and learn."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from one_thread import one_thread
from safetensors.torch import load_file

from sparsekern.data import synthetic

__all__ = ["one_thread"]  # a fixture
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "tokens.h5"
    synthetic(path, features=16, latents=32, active=2, tokens=20_000, seed=1)
    return str(path)


def run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_a_training_loop_of_ones_own(tokens, tmp_path, monkeypatch, capsys):
    run("training_loop.py", monkeypatch, tokens, tmp_path / "weights.safetensors")
    found = [float(line.split("FVU ")[1][:5]) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 2 and found[-1] < 0.4
    assert set(load_file(tmp_path / "weights.safetensors")) >= {"dictionary", "encoder"}


def test_logged_numbers_and_loading(tokens, tmp_path, monkeypatch, capsys):
    run("log_metrics.py", monkeypatch, tokens, tmp_path / "run")
    *lines, last = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines[:3]] == [1, 10, 20]
    assert float(lines[-1].split()[1]) < float(lines[0].split()[1])
    assert re.fullmatch(r"\d+ steps of 128 latents", last)
