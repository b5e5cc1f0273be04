"""The examples run as they stand, and do what they say."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
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


def printed(name, monkeypatch, capsys, *arguments):
    """What an example prints, with the examples' folder to import from."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    run(name, monkeypatch, *arguments)
    return capsys.readouterr().out


def test_topk_in_the_place_of_torchs(monkeypatch, capsys):
    first, second = printed("drop_in_topk.py", monkeypatch, capsys).splitlines()
    assert float(re.search(r"by (\S+) of the largest", first)[1]) < 1e-5
    assert "with torch.topk" in second


def test_a_sparse_layer_of_ones_own(monkeypatch, capsys):
    first, *steps = printed("sparse_layer.py", monkeypatch, capsys).splitlines()
    assert float(first.split()[-1]) < 1e-5
    losses = [float(re.search(r"loss ([\d.]+)", line)[1]) for line in steps]
    assert len(losses) == 4 and losses[-1] < 0.75 * losses[0]


def test_an_autoencoder_of_a_modules_activations(tmp_path, monkeypatch, capsys):
    arguments = ("--steps", 20, "--out", tmp_path / "weights.pt")
    lines = printed("train_sae.py", monkeypatch, capsys, *arguments).splitlines()
    errors = [float(line.split("FVU ")[1][:5]) for line in lines if "FVU" in line]
    assert len(errors) > 2 and errors[-1] < 0.2
    assert set(torch.load(tmp_path / "weights.pt")) >= {"dictionary", "encoder"}


def test_an_autoencoder_of_activations_in_a_file(tokens, monkeypatch, capsys):
    text = printed("train_sae.py", monkeypatch, capsys, "--activations", tokens)
    assert "language model" not in text
    assert text.splitlines()[0].startswith("autoencoder, step 25: FVU")


@pytest.mark.slow
def test_a_language_model_is_steered(monkeypatch, capsys):
    text = printed("steer.py", monkeypatch, capsys, "--steps", 60)
    fires = [float(share) for share in re.findall(r"([\d.]+)% of", text)]
    assert fires[0] > 5 * fires[1]  # on digits, on others
    shares = dict(re.findall(r"^-- (.*): (\d+)% digits$", text, re.MULTILINE))
    assert int(shares["steered"]) >= int(shares["as it is"]) + 3


@pytest.mark.compiles
def test_a_step_is_compiled_and_recorded(monkeypatch, capsys):
    first, second = printed("compile_and_cuda_graph.py", monkeypatch, capsys).splitlines()
    assert first.endswith("gradients are the same: True")
    on_gpu = "recorded as a CUDA graph; gradients are the same: True"
    on_cpu = "no GPU: the CUDA graph is left out"
    assert second == (on_gpu if torch.cuda.is_available() else on_cpu)
