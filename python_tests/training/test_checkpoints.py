"""Run folders and checkpoints: what may not be mixed up, damaged or written halfway."""

import json
import os

import pytest
import torch
from one_thread import one_thread
from test_training import STEPS, Noisy, assert_same_run, complete, resume, start

from sparsekern import _system
from sparsekern.training import CheckpointError, RunError, RunFolder, checkpoints, runs

__all__ = ["complete", "one_thread"]  # fixtures


def test_a_second_process_is_turned_away(tmp_path):
    folder = tmp_path / "run"
    with RunFolder.create(folder, {}):
        # The lock belongs to the open file, so a second one in this process is like another's.
        with pytest.raises(RunError, match=f"another process is training in {folder}"):
            RunFolder.open(folder)
    RunFolder.open(folder).close()


def test_a_folder_with_a_run_is_not_used_again(complete):
    before = {path.name: path.read_bytes() for path in complete.iterdir()}
    with pytest.raises(RunError, match="folder already holds a run"):
        start(complete)
    assert {path.name: path.read_bytes() for path in complete.iterdir()} == before


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(RunError, match=f"no run in {tmp_path}: config.json not found"):
        resume(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="cannot read"):
        resume(tmp_path)


def test_an_unwritable_folder_leaves_nothing(tmp_path):
    # Root may write anywhere, so the obstacle is a file where a folder has to be.
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write to the run folder .*file is not a folder"):
        start(tmp_path / "file" / "deep" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_fails_on_writing_leaves_nothing(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runs, "_lock", refuse)
    with pytest.raises(RunError, match=r"cannot write to the run folder .*: Permission denied"):
        start(tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", range(5))
def test_a_full_disk_keeps_the_checkpoint_before(call, complete, tmp_path, monkeypatch):
    calls = []
    sync = os.fsync

    def fail(descriptor):
        calls.append(descriptor)
        if len(calls) > 1 + call:  # the first one is for config.json
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(_system, "sync", lambda path: None)
    monkeypatch.setattr(runs.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        start(tmp_path / "run")
    assert not (tmp_path / "run" / ".new").exists()
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", complete)


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", fail)
    with pytest.raises(RunError, match=r"cannot write to the run folder .*: No space left"):
        start(tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_identity(tmp_path):
    folder = tmp_path / "run"
    start(folder, identity={"lr": 1, "beta": 2.0})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for other, message in (
        ({"lr": 1, "beta": 3.0}, "beta is 2.0 there and 3.0 here"),
        ({"lr": 1, "beta": 2.0, "new": 1}, "new is 'absent' there and 1 here"),
        ({"lr": 1}, "beta is 2.0 there and 'absent' here"),
    ):
        with pytest.raises(CheckpointError, match=f"of another config: {message}"):
            resume(folder, identity=other)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_of_another_model(tmp_path):
    start(tmp_path / "run")
    task = Noisy(width=17)
    weight = task.model[0].weight.clone()
    with pytest.raises(CheckpointError, match=r"0.weight is \[16, 8\] there and \[17, 8\] here"):
        resume(tmp_path / "run", task)
    assert torch.equal(task.model[0].weight, weight)


@pytest.mark.parametrize(
    "name, content",
    [
        (f"checkpoint-{STEPS}.safetensors", b""),
        (f"checkpoint-{STEPS}.safetensors", None),
        ("checkpoint.json", b'{"format": 1'),
        ("checkpoint.json", b'{"format": 1}'),
    ],
)
def test_a_damaged_checkpoint(name, content, tmp_path):
    folder = tmp_path / "run"
    start(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"checkpoint in {folder} is damaged"):
        resume(folder)


FACTS = (
    "identity", "step", "epoch", "batch", "seconds", "seen", "metrics_bytes", "optimizer",
    "optimizer.numbers", "optimizer.groups", "optimizer.groups.0.params", "optimizer.groups.0.lr",
    "optimizer.groups.0.betas",
)  # fmt: skip


def change_fact(folder, name, change):
    """Applies ``change(holder, key)`` where a dotted name points in checkpoint.json."""
    path = folder / "checkpoint.json"
    facts = holder = json.loads(path.read_text())
    *outer, key = name.split(".")
    for part in outer:
        holder = holder[int(part) if isinstance(holder, list) else part]
    change(holder, key)
    path.write_text(json.dumps(facts))


def copied(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", ["format", "tensors", *FACTS])
def test_a_checkpoint_without_a_fact(name, complete, tmp_path):
    folder = copied(complete, tmp_path / "run")
    change_fact(folder, name, dict.pop)
    key = name.split(".")[-1]
    with pytest.raises(CheckpointError, match=f"checkpoint in {folder} is damaged: .*'{key}'"):
        resume(folder)


OF_ANOTHER_KIND = [
    (name, value)
    for name in FACTS
    for value in ("3", None, True, -1, 0.5, [], float("nan"))
    # These are of the right kind.
    if not (name in ("seconds", "optimizer.groups.0.lr") and value == 0.5)
    and not (name == "optimizer.groups.0.lr" and value == -1)
]


@pytest.mark.parametrize("name, value", OF_ANOTHER_KIND)
def test_a_checkpoint_with_a_fact_of_another_kind(name, value, complete, tmp_path):
    folder = copied(complete, tmp_path / "run")
    change_fact(folder, name, lambda holder, key: holder.update({key: value}))
    with pytest.raises(CheckpointError, match=f"checkpoint in {folder} is damaged: "):
        resume(folder)


def test_a_checkpoint_beyond_the_end_of_its_epoch(complete, tmp_path):
    folder = copied(complete, tmp_path / "run")
    change_fact(folder, "batch", lambda facts, key: facts.update({"epoch": 1, key: 4}))
    with pytest.raises(CheckpointError, match="is damaged: 'batch' is 4, an epoch has 4 batches"):
        resume(folder)


@pytest.mark.parametrize("state", [None, torch.zeros(3), torch.zeros(3, dtype=torch.uint8)])
def test_a_checkpoint_with_a_bad_random_state(state, complete, tmp_path):
    folder = copied(complete, tmp_path / "run")
    saved, facts = checkpoints.read_checkpoint(folder)
    tensors = dict(saved)
    del tensors["rng.cpu"]
    tensors |= {} if state is None else {"rng.cpu": state}
    checkpoints.write_checkpoint(folder, STEPS, tensors, facts)
    with pytest.raises(CheckpointError, match=f"checkpoint in {folder} is damaged: "):
        resume(folder)


def test_a_checkpoint_from_the_future(tmp_path):
    start(tmp_path / "run")
    facts = tmp_path / "run" / "checkpoint.json"
    facts.write_text(facts.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1"):
        resume(tmp_path / "run")


def test_metrics_shorter_than_the_checkpoint_says(tmp_path):
    start(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match=r"is shorter than the .* bytes its checkpoint counts on"):
        resume(tmp_path / "run")


def test_tied_and_strided_tensors_survive_a_checkpoint(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    tensors = {"a": weight, "b": weight, "c": weight.t(), "d": torch.tensor(2, dtype=torch.int64)}
    checkpoints.write_checkpoint(tmp_path, 3, tensors, {"x": [1, 2.5]})
    read, facts = checkpoints.read_checkpoint(tmp_path)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert facts["x"] == [1, 2.5]
