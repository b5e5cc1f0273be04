"""Runs of sparse autoencoders after and before training: what fits them, loading, extending."""

import importlib
import json
import math
import os
import shutil
import sys
import types
from dataclasses import asdict

import pytest
import torch
from one_thread import one_thread
from quick_pictures import quick_pictures

from sparsekern.cli.command import main
from sparsekern.data import write_activations
from sparsekern.studies import sae
from sparsekern.training import CheckpointError, RunError, checkpoints

sae_runs = importlib.import_module("sparsekern.studies.sae.run")  # the package has a function run

__all__ = ["one_thread", "quick_pictures"]  # fixtures
SMALL = {
    "latents": 24, "k": 2, "batch_size": 256, "auxk": 4, "dead_after": 5000, "eval_tokens": 500,
    "learning_rate": 3e-3, "progress": False,
}  # fmt: skip
TOKENS = 5000
ROWS = TOKENS + 500  # these are held out


def rows(seed=0, tokens=ROWS):
    torch.manual_seed(seed)
    return torch.randn(tokens, 12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tokens.h5"
    write_activations(path, [rows()])
    return path


def config(data, **changes):
    return sae.Config(activations=(str(data),), **{**SMALL, **changes})


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    sae.run(config(data, epochs=2), folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def change_config(folder, **changes):
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    stored["config"] |= changes
    path.write_text(json.dumps(stored))


# -- loading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"activation": "batchtopk"}, {"activation": "jumprelu"}], ids=str
)
def test_a_run_is_loaded_by_one_call_and_encodes_as_in_training(changes, data, tmp_path):
    changes = changes and {**changes, "sparsity_weight": 1e-3 * (len(changes["activation"]) == 8)}
    made = []
    original = sae.SAETask.evaluate
    sae.SAETask.evaluate = lambda self, epoch: made.append(self.model) or original(self, epoch)
    try:
        results = sae.run(config(data, **changes), tmp_path / "run").results
    finally:
        sae.SAETask.evaluate = original
    data_gone = rows(seed=3, tokens=50)
    trained = sae.load_run(tmp_path / "run")
    assert not trained.model.training
    assert trained.step == results["steps"] and trained.config.latents == 24
    assert trained.facts["tokens"] == TOKENS
    for one, other in zip(trained.model.encode(data_gone), made[-1].encode(data_gone), strict=True):
        assert torch.equal(one, other)
    shape = {"batchtopk": (), "jumprelu": (24,)}.get(changes.get("activation"))
    assert (None if trained.threshold is None else trained.threshold.shape) == shape


def test_loading_names_what_is_missing(tmp_path):
    with pytest.raises(RunError, match=r"no run in .*: config.json not found"):
        sae.load_run(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"study": "sae", "config": {**asdict(config("a.h5"))}})
    )
    with pytest.raises(RunError, match="no checkpoint in"):
        sae.load_run(tmp_path)


# -- what is not the checkpoint's ------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"k": 3}, {"groups": 2}, {"tied": True}, {"epochs": 3}, {"latents": 25}], ids=str
)
def test_a_config_edited_afterwards_is_refused(changes, copied):
    change_config(copied, **changes)
    name = next(iter(changes))
    for function in (sae.load_run, sae.evaluate_run):
        with pytest.raises(CheckpointError, match=f"of another config: {name} is"):
            function(copied)
    with pytest.raises(CheckpointError, match=f"of another config: {name} is"):
        sae.run(sae.saved_config(copied), copied, resume=True)


def test_tensors_of_another_run_are_refused(data, copied, tmp_path):
    sae.run(config(data, epochs=2, seed=1), tmp_path / "other")
    for path in (tmp_path / "other").glob("*.safetensors"):
        shutil.copy(path, copied)
    for function in (sae.load_run, sae.evaluate_run):
        with pytest.raises(CheckpointError, match="is of another checkpoint"):
            function(copied)
    with pytest.raises(CheckpointError, match="is of another checkpoint"):
        sae.run(sae.saved_config(copied), copied, resume=True)


@pytest.mark.parametrize("where", [0, TOKENS // 2, TOKENS - 1])
def test_activations_with_another_content_are_refused(where, copied, tmp_path):
    other = rows()
    other[where] += 1
    write_activations(tmp_path / "tokens.h5", [other])
    moved = config(tmp_path / "tokens.h5", epochs=2)
    with pytest.raises(CheckpointError, match="activations' digest is"):
        sae.run(moved, copied, resume=True)
    change_config(copied, activations=[str(tmp_path / "tokens.h5")])
    with pytest.raises(CheckpointError, match="activations' digest is"):
        sae.evaluate_run(copied)


def test_activations_may_move_and_change_their_format(data, copied, tmp_path, monkeypatch):
    import h5py
    import numpy as np

    with h5py.File(data) as file:
        np.save(tmp_path / "moved.npy", file["activations"][:])
    monkeypatch.chdir(tmp_path)
    before = sae.evaluate_run(copied)
    sae.run(config("moved.npy", epochs=2), copied, resume=True)
    assert sae.saved_config(copied).activations == (str(tmp_path / "moved.npy"),)
    monkeypatch.chdir("/")
    assert sae.evaluate_run(copied) == pytest.approx(before, rel=1e-5)


def test_large_stores_are_told_apart_by_some_of_their_rows(tmp_path, monkeypatch):
    from sparsekern.data import ActivationStore

    monkeypatch.setattr(sae_runs, "DIGEST_BYTES", 1)

    digests, x = set(), torch.randn(40_000, 2)
    for name, part in (("whole", [x]), ("pieces", list(x.split(777))), ("other", [x.roll(1, 0)])):
        write_activations(tmp_path / f"{name}.h5", part)
        with ActivationStore(tmp_path / f"{name}.h5") as store:
            digests.add(sae_runs.activation_digest(store))
    assert len(digests) == 2


def test_a_checkpoint_by_an_earlier_version_goes_on(copied):
    """Its identity names files, and says nothing of what is in them."""
    path = copied / "checkpoint.json"
    facts = json.loads(path.read_text())
    del facts["identity"]["activations' digest"], facts["written together"]
    facts["identity"]["activations"] = ["tokens.h5"]
    path.write_text(json.dumps(facts))
    assert sae.evaluate_run(copied)["epochs"] == 2
    assert sae.run(sae.saved_config(copied), copied, resume=True).outcome.signal is None
    longer = sae.Config(**{**asdict(sae.saved_config(copied)), "epochs": 3})
    assert sae.run(longer, copied, resume=True, extend=True).outcome.step == 60


# -- extending and beginning -----------------------------------------------------------------------


def test_a_finished_run_is_extended(data, copied, tmp_path, capsys):
    assert main(["train", "sae", "--resume", str(copied), "--epochs", "1"]) == 2
    assert "was started with --epochs 2, it cannot be resumed with 1" in capsys.readouterr().err
    assert main(["train", "sae", "--resume", str(copied), "--epochs", "4"]) == 0
    assert sae.saved_config(copied).epochs == 4
    trained = sae.load_run(copied)
    assert trained.step == 80 and trained.facts["epochs"] == 4
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in lines if r["kind"] == "epoch"] == [0, 1, 2, 3]
    assert main(["train", "sae", "--resume", str(copied)]) == 0
    with pytest.raises(CheckpointError, match="epochs is 4 there and 5 here"):
        sae.run(config(data, epochs=5), copied, resume=True)


def test_extending_that_was_killed_goes_on_with_the_same_command(copied, monkeypatch):
    monkeypatch.setattr(sae_runs.RunFolder, "rewrite_config", lambda *_: 1 / 0)
    longer = sae.Config(**{**asdict(sae.saved_config(copied)), "epochs": 3})
    with pytest.raises(ZeroDivisionError):
        sae.run(longer, copied, resume=True, extend=True)
    monkeypatch.undo()
    assert sae.run(longer, copied, resume=True, extend=True).outcome.step == 60


def test_a_run_begins_with_the_weights_of_another(data, finished, tmp_path, monkeypatch):
    begun = []
    train = sae_runs.train
    monkeypatch.setattr(
        sae_runs,
        "train",
        lambda task, *rest, **more: (
            begun.append({n: t.clone() for n, t in task.model.state_dict().items()})
            or train(task, *rest, **more)
        ),
    )
    monkeypatch.chdir(finished.parent)
    sae.run(config(data, init_from=finished.name, learning_rate=1e-4), tmp_path / "run")
    for name, tensor in sae.load_run(finished).model.state_dict().items():
        same = torch.equal(begun[0][name], tensor)
        assert same or name == "counter.rows_since_fired", name
    assert begun[0]["counter.rows_since_fired"].sum() == 0
    assert sae.saved_config(tmp_path / "run").init_from == str(finished)
    # Afterwards the weights are its own, and the other run is not needed.
    monkeypatch.setattr(sae_runs, "_start_from_run", None)
    sae.run(sae.saved_config(tmp_path / "run"), tmp_path / "run", resume=True)


@pytest.mark.parametrize("there", ["none", "token", "dataset"])
@pytest.mark.parametrize("here", ["none", "token", "dataset"])
def test_a_run_begins_with_weights_in_its_own_units(there, here, tmp_path):
    # Rows of one norm, so that the mean factor is that of each.
    x = 40 * torch.nn.functional.normalize(rows(3, 2500), dim=1)
    write_activations(tmp_path / "x.h5", [x])
    first = sae.run(config(tmp_path / "x.h5", normalize=there), tmp_path / "first").results
    same = {"learning_rate": 1e-12, "init_from": str(tmp_path / "first"), "revival": 0.0}
    results = sae.run(config(tmp_path / "x.h5", normalize=here, **same), tmp_path / "run").results
    assert results["fvu"] == pytest.approx(first["fvu"], rel=1e-3)


def test_a_run_cannot_begin_with_another_model(data, finished, tmp_path, capsys):
    flags = ["--activations", str(data), "--no-progress", "--auxk", "0", "--k", "2"]
    flags += ["--init-from", str(finished), "--out", str(tmp_path / "run")]
    assert main(["train", "sae", *flags, "--latents", "32"]) == 2
    assert "--init-from must name a run of such a model: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["train", "sae", "--resume", str(finished), "--init-from", str(finished)]) == 2
    assert "was started with --init-from None" in capsys.readouterr().err


# -- eval, numbers and processes -------------------------------------------------------------------


def test_eval_of_several_runs_prints_one_table(data, finished, tmp_path, capsys):
    sae.run(config(data, seed=1), tmp_path / "other")
    assert main(["eval", str(finished), str(tmp_path / "other")]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "step", "epochs"] and "FVU" in head
    assert [line.split()[:3] for line in lines] == [
        [str(finished), "40", "2.00"], [str(tmp_path / "other"), "20", "1.00"],
    ]  # fmt: skip


def test_eval_on_other_activations_counts_the_epochs_of_training(finished, tmp_path, capsys):
    write_activations(tmp_path / "few.h5", [rows(seed=9, tokens=300)])
    found = sae.evaluate_run(finished, (str(tmp_path / "few.h5"),))
    assert found["step"] == 40 and found["epochs"] == 2
    write_activations(tmp_path / "wide.h5", [torch.randn(300, 16)])
    assert main(["eval", str(finished), "--activations", str(tmp_path / "wide.h5")]) == 2
    assert "must have the 12 features" in capsys.readouterr().err


def test_every_logged_record_reaches_the_hook(data, tmp_path):
    records = []
    sae.run(config(data), tmp_path / "run", on_metrics=records.append)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert records == [json.loads(line) for line in lines]


@pytest.mark.parametrize("at", ["a step", "the end of an epoch"])
def test_an_error_of_the_hook_loses_no_work(at, data, finished, tmp_path):
    def fails(record):
        if record["kind"] == "epoch" if at != "a step" else record["step"] == 10:
            raise ConnectionError("the board cannot be reached")

    with pytest.raises(ConnectionError, match="cannot be reached"):
        sae.run(config(data, epochs=2), tmp_path / "run", on_metrics=fails)
    assert sae.load_run(tmp_path / "run").step == (10 if at == "a step" else 20)
    sae.run(sae.saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    whole, interrupted = (sae.load_run(f).model.state_dict() for f in (finished, tmp_path / "run"))
    assert all(torch.equal(whole[name], interrupted[name]) for name in whole)


class Writer:
    """Stands for tensorboard's."""

    made: list = []  # noqa: RUF012

    def __init__(self, folder):
        self.folder, self.scalars, self.closed = folder, [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


def test_numbers_go_to_tensorboard_or_wandb(data, tmp_path, monkeypatch, capsys):
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    Writer.made.clear()
    flags = ["--activations", str(data), "--no-progress", "--auxk", "0", "--k", "2"]
    flags += ["--out", str(tmp_path / "run"), "--log-to"]
    assert main(["train", "sae", *flags, "tensorboard"]) == 0
    [writer] = Writer.made
    assert writer.folder == str(tmp_path / "run" / "tensorboard") and writer.closed
    assert any(name == "step/loss" and step == 1 for name, _, step in writer.scalars)
    assert all(math.isfinite(value) for _, value, _ in writer.scalars)
    monkeypatch.setitem(sys.modules, "wandb", None)
    flags[flags.index(str(tmp_path / "run"))] = str(tmp_path / "second")
    assert main(["train", "sae", *flags, "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("study", ["vae-sae", "sparling"])
def test_several_processes_are_refused_in_a_sentence(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", study, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "a study runs in one process, not in 2 (WORLD_SIZE)" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_runs_of_the_same_second_get_folders_of_their_own(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "runs/sae-20260101-000000")
    flags = ["--activations", str(data), "--no-progress", "--auxk", "0", "--k", "2"]
    for _ in range(2):
        assert main(["train", "sae", *flags]) == 0
    assert main(["train", "sae", *flags, "--k", "2000"]) == 2
    assert sorted(os.listdir("runs")) == ["sae-20260101-000000", "sae-20260101-000000-2"]


def test_what_training_needs_of_a_checkpoint_is_checked_before_it_begins(copied):
    facts = checkpoints.read_checkpoint(copied).facts
    assert facts["identity"]["features"] == 12
    path = copied / "checkpoint.json"
    content = json.loads(path.read_text())
    del content["identity"]["features"]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="'features' is missing"):
        sae.load_run(copied)
