"""Training sparse autoencoders on stored activations: the command, resuming, kills, bad input."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest
import torch
from processes import Forked, run_command, wait_for_growth

import sparsekern
from sparsekern.cli.command import main
from sparsekern.data import ActivationStore, synthetic, write_activations
from sparsekern.models import SparseAutoencoder
from sparsekern.sae.statistics import total_variance
from sparsekern.studies import sae
from sparsekern.training import checkpoints

pytestmark = pytest.mark.slow

KILLS = 20
LONG = {"epochs": 40}  # so that the run outlives its kills on a quick machine, too


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    """20000 tokens of 16 features, mixtures of 24 known directions."""
    path = tmp_path_factory.mktemp("activations") / "tokens.h5"
    synthetic(path, features=16, latents=24, active=2, tokens=20_000, seed=5)
    return str(path)


SMALL = {
    "latents": 48,
    "k": 2,
    "k_start": 6,
    "epochs": 3,
    "batch_size": 256,
    "learning_rate": 3e-3,
    "auxk": 8,
    "dead_after": 5000,
    "eval_tokens": 1000,
    "checkpoint_tokens": 2048,
    "log_every": 1,
    "progress": False,
}


def config(activations, **changes):
    return sae.SAEConfig(activations=(activations,), **{**SMALL, **changes})


def outcome(folder):
    """What must be equal for every way of getting there: metrics without speeds, and tensors."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("examples_per_second", None)
    tensors, facts = checkpoints.read_checkpoint(folder)
    results = json.loads((folder / "results.json").read_text())
    results.pop("tokens_per_second")
    return records, tensors, facts["step"], results


def assert_same_outcome(one, other):
    assert one[0] == other[0] and one[2:] == other[2:]
    assert one[1].keys() == other[1].keys()
    for name, tensor in one[1].items():
        assert torch.equal(tensor, other[1][name]), name


def test_a_run_learns_and_leaves_its_files(activations, tmp_path):
    report = sae.run(config(activations), tmp_path / "run")
    results = report.results
    assert results["fvu"] < 0.3 and results["recovered"] > 0.2 and results["k"] == 2
    assert results["l0"] <= 2 and 0 <= results["dead"] <= 1 and 0.8 < results["cosine"] <= 1
    for name in sae.FILES:
        assert (tmp_path / "run" / name).stat().st_size > 0
    text = sae.table(results, config(activations))
    assert "true directions recovered" in text and "linear_topk by" in text
    steps = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "step"
    ]
    assert steps[0]["k"] == 6 and steps[-1]["k"] == 2
    assert {"fvu", "l0", "dead", "cosine", "auxk", "loss"} <= steps[0].keys()
    measured = sae.evaluate_run(tmp_path / "run")
    for name in ("fvu", "l0", "cosine", "dead", "silent", "recovered"):
        assert measured[name] == results[name]


def test_kernels_and_reference_agree(activations, tmp_path):
    losses = []
    for backend in ("auto", "reference"):
        sae.run(config(activations, epochs=1, backend=backend), tmp_path / backend)
        lines = (tmp_path / backend / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines[:30]])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)


ACTIVATIONS = {
    "groups": {"activation": "topk", "groups": 2, "k": 2, "k_start": 6},
    "batchtopk": {"activation": "batchtopk"},
    # wide enough for sparse codes, and now and then for dense ones
    "wide batchtopk": {"activation": "batchtopk", "latents": 256, "k_start": 24},
    "jumprelu": {
        "activation": "jumprelu", "threshold": 0.1, "bandwidth": 0.1, "sparsity_weight": 0.02,
        "k_start": 0,
    },
    "relu": {"activation": "relu", "sparsity_weight": 0.3, "k_start": 0},
    "prefixes": {"prefixes": (12, 24)},
}  # fmt: skip


def end_after(monkeypatch, steps):
    """Interrupts a run, as Ctrl-C does, after so many steps."""
    backward = sae.SAETask.backward

    def counted(task, batch):
        if task.step == steps:
            signal.raise_signal(signal.SIGINT)
        return backward(task, batch)

    monkeypatch.setattr(sae.SAETask, "backward", counted)


@pytest.mark.slow
@pytest.mark.study
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_trains_and_resumes(activations, tmp_path, name, monkeypatch):
    changes = {**ACTIVATIONS[name], "auxk": 0}
    report = sae.run(config(activations, **changes), tmp_path / "whole")
    assert report.results["fvu"] < (0.7 if name.startswith("wide") else 0.4)
    assert report.results["l0"] < 12
    interrupted = tmp_path / "interrupted"
    settings = config(activations, **changes)
    end_after(monkeypatch, steps=100)
    assert sae.run(settings, interrupted).results is None
    monkeypatch.undo()
    sae.run(settings, interrupted, resume=True)
    assert_same_outcome(outcome(interrupted), outcome(tmp_path / "whole"))
    measured = sae.evaluate_run(interrupted)
    assert measured["l0"] == report.results["l0"]


def command(activations, folder, resume):
    flags = []
    for name, value in {**SMALL, **LONG}.items():
        if name != "progress":
            flags += ["--" + name.replace("_", "-"), str(value)]
    start = ["--resume", str(folder), "--no-progress"]
    if not resume:
        start = ["--activations", activations, "--out", str(folder), *flags, "--no-progress"]
    return ["train", "sae", *start]


@pytest.mark.slow
@pytest.mark.study
def test_kills_at_random_moments_cost_nothing_but_time(activations, tmp_path):
    """A chain of runs, each killed at a random moment and resumed, ends with the same bits as one
    that was left alone; in between, every file opens."""
    # in a process of its own, too: the sums that are logged depend on the thread count
    whole = Forked(run_command, command(activations, tmp_path / "whole", False))
    assert whole.wait() == 0, whole.communicate()
    folder, chance = tmp_path / "killed", random.Random(3)
    for kill in range(KILLS):
        words = command(activations, folder, (folder / "config.json").exists())
        process = Forked(run_command, words)
        if kill % 5 == 0:  # at any moment of its start, which is most of a short run
            time.sleep(chance.uniform(0, 0.5))
        else:
            wait_for_growth(process, folder / "metrics.jsonl", 2)
            time.sleep(chance.uniform(0, 0.1))
        assert process.poll() is None, f"the run ended before kill {kill}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (folder / "checkpoint.json").exists():
            tensors, facts = checkpoints.read_checkpoint(folder)
            assert facts["step"] > 0 and tensors
    done = Forked(run_command, command(activations, folder, (folder / "config.json").exists()))
    assert done.wait() == 0, done.communicate()
    assert_same_outcome(outcome(folder), outcome(tmp_path / "whole"))


def test_parts_of_a_batch_add_up(activations):
    """The gradient of a batch computed in parts is that of the whole batch."""
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    grads = []
    for size in (64, 24):
        torch.manual_seed(1)
        model = SparseAutoencoder(16, 48, 4, multi_k=8)
        for part in x.split(size):
            model.loss(part, variance=total_variance(x))[1].total.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_parts_of_a_batch_take_less_memory():
    x = torch.randn(4096, 64)
    variance, peaks = total_variance(x), []
    for size in (4096, 256):
        model = SparseAutoencoder(64, 256, 32)
        with torch.profiler.profile(profile_memory=True) as profile:
            for part in x.split(size):
                model.loss(part, variance=variance)[1].total.backward()
        peaks.append(max(event.cpu_memory_usage for event in profile.events()))
    assert peaks[1] < peaks[0] / 4


def test_micro_batches_train(activations, tmp_path):
    whole = sae.run(config(activations, auxk=0), tmp_path / "whole").results
    parts = sae.run(config(activations, auxk=0, micro_batch=100), tmp_path / "parts").results
    assert abs(parts["fvu"] - whole["fvu"]) < 0.05


def test_autocast_trains(activations, tmp_path):
    results = sae.run(config(activations, autocast=True), tmp_path / "run").results
    assert results["fvu"] < 0.35


def test_the_first_dictionary_is_not_the_answer(activations):
    with ActivationStore(activations) as store:
        model = sae.make_model(config(activations, seed=5, latents=24), store)
        assert sae.recovered(model.dictionary, store.directions) < 0.1


def test_the_command(activations, tmp_path, capsys):
    flags = ["--latents", "48", "--k", "2", "--batch-size", "500", "--auxk", "0"]
    flags += ["--eval-tokens", "500", "--no-progress", "--out", str(tmp_path / "run")]
    assert main(["train", "sae", "--activations", activations, *flags]) == 0
    assert "true directions recovered" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "FVU" in capsys.readouterr().out
    assert (
        main(["train", "sae", "--resume", str(tmp_path / "run")]) == 0
    )  # complete: measured again


def bad_file(tmp_path):
    (tmp_path / "bad.h5").write_bytes(b"no")
    return str(tmp_path / "bad.h5")


def nan_file(tmp_path):
    rows = torch.randn(3000, 16)
    rows[1234, 3] = torch.nan
    write_activations(tmp_path / "nan.h5", [rows])
    return str(tmp_path / "nan.h5")


BAD = {
    "no file": (lambda good, tmp: [], "--activations must name at least one file"),
    "missing": (lambda good, tmp: ["--activations", str(tmp / "none.h5")], "none.h5"),
    "not HDF5": (lambda good, tmp: ["--activations", bad_file(tmp)], "bad.h5"),
    "NaN": (lambda good, tmp: ["--activations", nan_file(tmp)], "row 1234"),
    "dataset": (lambda good, tmp: ["--activations", good, "--dataset", "x"], "activations"),
    "k": (lambda good, tmp: ["--activations", good, "--k", "200"], "--k must be at most 128"),
    "k of the schedule": (
        lambda good, tmp: ["--activations", good, "--k-start", "200", "--auxk", "0"],
        "--k-start must be at most 128",
    ),
    "learning rate": (
        lambda good, tmp: ["--activations", good, "--learning-rate", "inf"],
        "--learning-rate must be finite",
    ),
    "share": (
        lambda good, tmp: ["--activations", good, "--decay", "2"],
        "--decay must lie in 0..1",
    ),
    "seed": (lambda good, tmp: ["--activations", good, "--seed", "-1"], "--seed must lie in"),
    "weight of nothing": (
        lambda good, tmp: ["--activations", good, "--sparsity-weight", "0.1"],
        "--sparsity-weight must be 0 with --activation topk, got 0.1",
    ),
    "groups of relu": (
        lambda good, tmp: ["--activations", good, "--activation", "relu", "--groups", "2"],
        "--groups must be 1 with --activation relu, got 2",
    ),
    "k between groups": (
        lambda good, tmp: ["--activations", good, "--groups", "3"],
        "--k must be a multiple of groups = 3, got 32",
    ),
    "groups between latents": (
        lambda good, tmp: ["--activations", good, "--groups", "3", "--k", "33"],
        "--groups must divide the number of latents 128, got 3",
    ),
    "prefixes": (
        lambda good, tmp: ["--activations", good, "--prefixes", "64", "128"],
        "--prefixes must lie in 1..127",
    ),
    "device": (lambda good, tmp: ["--activations", good, "--device", "nope"], "--device 'nope'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(activations, tmp_path, capsys, name):
    flags, text = BAD[name]
    out = ["--auxk", "0", "--no-progress", "--out", str(tmp_path / "run")]
    assert main(["train", "sae", *flags(activations, tmp_path), *out]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


def test_runs_do_not_mix(activations, tmp_path, capsys):
    folder = tmp_path / "run"
    sae.run(config(activations, epochs=1), folder)
    other = tmp_path / "narrow.h5"
    synthetic(other, features=8, latents=24, active=2, tokens=3000, seed=5)
    assert main(["eval", str(folder), "--activations", str(other)]) == 2
    assert "16" in capsys.readouterr().err
    assert main(["train", "sae", "--resume", str(folder), "--k", "3"]) == 2
    assert "was started with --k 2" in capsys.readouterr().err
    assert main(["train", "vae-sae", "--resume", str(folder)]) == 2
    assert "holds a run of 'sae'" in capsys.readouterr().err
    assert main(["eval", str(tmp_path)]) == 2
    assert "no run" in capsys.readouterr().err


def test_a_forced_backend_that_is_missing_writes_nothing(activations, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(sparsekern.BackendUnavailableError):
        sae.run(config(activations, backend="triton"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
