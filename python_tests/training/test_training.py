"""The training loop: resuming gives the same bits, whatever interrupted it, and folders stay sane.

Run as a script, this file trains the task of its tests in the folder named on the command line.
"""

import dataclasses
import json
import os
import signal
import threading
import time

import pytest
import torch
from processes import Forked
from torch import nn

from sparsekern.training import (
    LoopConfig,
    RunFolder,
    TrainingError,
    checkpoints,
    permuted_rows,
    runs,
    train,
)

CONFIG = LoopConfig(epochs=3, batch_size=8, seed=5, log_every=2, checkpoint_every=2, progress=False)
EXAMPLES = 30  # four steps an epoch, the last one smaller
STEPS = 12


class Noisy:
    """A small regression with dropout, so that the random state matters."""

    unit = "row"

    def __init__(self, width=16, pause=0.0, before_step=None, seed=CONFIG.seed):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(EXAMPLES, 8, generator=generator)
        self.targets = self.inputs.square().sum(1, keepdim=True)
        self.examples, self.pause, self.before_step = EXAMPLES, pause, before_step
        self.seed = seed
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            self.model = nn.Sequential(nn.Linear(8, width), nn.Dropout(0.3), nn.Linear(width, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.steps = 0

    def begin_epoch(self, epoch):
        self.k = 10 - epoch
        return {"k": self.k}

    def batches(self, epoch, first):
        return permuted_rows(EXAMPLES, CONFIG.batch_size, self.seed, epoch, first)

    def backward(self, rows):
        time.sleep(self.pause)
        if self.before_step is not None:
            self.before_step(self.steps)
        self.steps += 1
        error = (self.model(self.inputs[rows]) - self.targets[rows]).square().mean()
        error.backward()
        return {"loss": error.detach(), "error": error.detach().sqrt()}

    def evaluate(self, epoch):
        with torch.no_grad():
            return {"eval": float((self.model(self.inputs) - self.targets).square().mean())}


def start(folder, task=None, config=CONFIG, identity=None):
    with RunFolder.create(folder, {"note": "test"}) as run:
        return train(task or Noisy(), config, run, identity=identity)


def resume(folder, task=None, config=CONFIG, identity=None):
    with RunFolder.open(folder) as run:
        return train(task or Noisy(), config, run, identity=identity)


def metrics(folder):
    """Every logged line, without the speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k != "examples_per_second"} for r in records]


def final_tensors(folder):
    return checkpoints.read_checkpoint(folder).tensors


def assert_same_run(folder, complete):
    assert metrics(folder) == metrics(complete)
    ours, theirs = final_tensors(folder), final_tensors(complete)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "complete"
    outcome = start(folder)
    assert outcome.step == STEPS and outcome.signal is None and outcome.examples_per_second > 0
    return folder


def test_a_run_logs_steps_and_epochs(complete):
    records = metrics(complete)
    steps = [r["step"] for r in records if r["kind"] == "step"]
    assert steps == [1, 2, 4, 6, 8, 10, 12]
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [r["k"] for r in epochs] == [10, 9, 8]
    assert epochs[-1]["loss"] < epochs[0]["loss"] and epochs[-1]["eval"] < epochs[0]["eval"]
    tensors = f"checkpoint-{STEPS}.safetensors"
    files = {tensors, "checkpoint.json", "config.json", "lock", "metrics.jsonl"}
    assert {path.name for path in complete.iterdir()} == files


def test_epoch_means_weigh_examples_equally(tmp_path):
    task = Noisy()
    losses = []
    plain = task.backward
    task.backward = lambda rows: losses.append((plain(rows), len(rows))) or losses[-1][0]
    start(tmp_path / "run", task)
    for epoch, record in enumerate(r for r in metrics(tmp_path / "run") if r["kind"] == "epoch"):
        part = losses[4 * epoch : 4 * epoch + 4]
        mean = sum(float(scalars["loss"].double()) * n for scalars, n in part) / EXAMPLES
        assert record["loss"] == pytest.approx(mean, rel=1e-12)


def test_every_example_once_an_epoch_in_an_order_from_seed_and_epoch(tmp_path):
    seen = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        task = Noisy(seed=seed)
        rows, plain = [], task.backward
        task.backward = lambda part, rows=rows, plain=plain: rows.append(part) or plain(part)
        config = LoopConfig(epochs=2, batch_size=8, seed=seed, progress=False)
        start(tmp_path / name, task, config)
        seen.append(torch.cat(rows))
    first, second = seen[0].split(EXAMPLES)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(EXAMPLES))
    assert not torch.equal(first, second)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


class Stream(Noisy):
    """The same task with batches that are no tensors, from a generator that holds something."""

    def __init__(self, **options):
        super().__init__(**options)
        self.asked, self.open = [], 0

    def batches(self, epoch, first):
        self.asked.append((epoch, first))
        self.open += 1
        try:
            for rows in super().batches(epoch, first):
                yield rows.tolist()
            yield "a batch that the loop has no use for"
        finally:
            self.open -= 1

    def backward(self, batch):
        assert self.open == 1
        return super().backward(torch.tensor(batch))

    def evaluate(self, epoch):
        assert self.open == 0
        return super().evaluate(epoch)


def test_streamed_batches_give_the_same_run_and_are_closed(complete, tmp_path):
    def interrupt(step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    def crash(step):
        if step == 2:
            raise CrashError

    folder = tmp_path / "run"
    task = Stream(before_step=interrupt)
    assert start(folder, task).step == 6
    assert task.asked == [(0, 0), (1, 0)] and task.open == 0
    task = Stream(before_step=crash)
    with pytest.raises(CrashError):
        resume(folder, task)
    assert task.asked == [(1, 2), (2, 0)] and task.open == 0
    task = Stream()
    resume(folder, task)
    assert task.asked == [(2, 0)] and task.open == 0
    assert_same_run(folder, complete)


def test_a_step_applies_the_gradients_of_its_batch_alone(tmp_path):
    # So that a task may add them up in parts.
    task, left, applied = Noisy(), [], []
    backward, step = task.backward, task.optimizer.step

    def gradients():
        return [None if p.grad is None else p.grad.clone() for p in task.model.parameters()]

    def recorded_backward(rows):
        assert gradients() == [None] * 4
        scalars = backward(rows)
        left.extend(gradients())
        return scalars

    task.backward = recorded_backward
    task.optimizer.step = lambda: applied.extend(gradients()) or step()
    start(tmp_path / "run", task)
    assert len(left) == 4 * STEPS
    assert all(torch.equal(one, other) for one, other in zip(left, applied, strict=True))


@pytest.mark.parametrize(
    "cut, message",
    [
        (lambda rows: rows[:2], "the batches of epoch 0 end after 2 of 4"),
        (lambda rows: [rows[0][:7], *rows[1:]], "batch 0 of epoch 0 has 7 rows instead of 8"),
        (lambda rows: [*rows[:3], rows[0]], "batch 3 of epoch 0 has 8 rows instead of 6"),
    ],
)
def test_batches_that_are_not_as_declared_stop_training(cut, message, tmp_path):
    task = Noisy()
    plain = task.batches
    task.batches = lambda epoch, first: iter(cut(list(plain(epoch, first))))
    with pytest.raises(TrainingError, match=message):
        start(tmp_path / "run", task)


def test_the_progress_bar_counts_examples(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, progress=True)

    def interrupt(step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    start(tmp_path / "run", Noisy(before_step=interrupt), config)
    bar = capsys.readouterr().err
    assert "46.0/90.0 " in bar and "rows/s" in bar
    resume(tmp_path / "run", config=config)
    first, *_, last = (line for line in capsys.readouterr().err.split("\r") if line)
    assert "46.0/90.0 " in first and "90.0/90.0 " in last and "rows/s" in last


def test_training_leaves_the_callers_random_state_and_signal_handlers(tmp_path):
    state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)
    start(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", range(STEPS))
def test_interrupted_by_a_signal_in_any_step(number, at, complete, tmp_path):
    def interrupt(step):
        if step == at:
            signal.raise_signal(number)

    folder = tmp_path / "run"
    outcome = start(folder, Noisy(before_step=interrupt))
    assert outcome.step == at + 1, "the current step is finished"
    # A signal in the very last step finds nothing left to interrupt.
    assert outcome.signal == (number if at + 1 < STEPS else None)
    assert resume(folder).step == STEPS
    assert_same_run(folder, complete)


class CrashError(Exception):
    """Stands for a process that is gone: nothing after it runs."""


@pytest.mark.parametrize("at", range(STEPS))
def test_crashed_in_any_step(at, complete, tmp_path):
    def crash(step):
        if step == at:
            raise CrashError

    with pytest.raises(CrashError):
        start(tmp_path / "run", Noisy(before_step=crash))
    assert resume(tmp_path / "run").step == STEPS
    assert_same_run(tmp_path / "run", complete)


# Five checkpoints of two files each follow config.json.
@pytest.mark.parametrize("at", range(1, 12))
@pytest.mark.parametrize("when", ["before", "after"])
def test_crashed_around_any_rename(at, when, complete, tmp_path, monkeypatch):
    calls = []
    replace = os.replace

    def crash(source, target):
        calls.append(target)
        if len(calls) - 1 == at and when == "before":
            raise CrashError
        replace(source, target)
        if len(calls) - 1 == at:
            raise CrashError

    monkeypatch.setattr(runs.os, "replace", crash)
    with pytest.raises(CrashError):
        start(tmp_path / "run")
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", complete)


def test_crashed_before_there_was_a_config(complete, tmp_path, monkeypatch):
    def crash(source, target):
        raise CrashError

    monkeypatch.setattr(runs.os, "replace", crash)
    with pytest.raises(CrashError):
        start(tmp_path / "run")
    monkeypatch.undo()
    start(tmp_path / "run")
    assert_same_run(tmp_path / "run", complete)


def test_resuming_a_complete_run_changes_nothing(complete):
    before = {path.name: path.read_bytes() for path in complete.iterdir()}
    outcome = resume(complete)
    assert outcome.step == STEPS and outcome.examples_per_second > 0
    assert {path.name: path.read_bytes() for path in complete.iterdir()} == before


def test_resuming_a_complete_run_leaves_the_task_as_the_last_epoch_did(complete):
    task = Noisy()
    resume(complete, task)
    assert task.k == 8 and not task.model.training


def launch(folder):
    return Forked(_start_or_resume, folder)


def wait_for_step(process, folder, step):
    """Waits until the process's folder holds a checkpoint of at least this step."""
    facts = folder / "checkpoint.json"
    for _ in range(18000):
        if facts.exists() and json.loads(facts.read_text())["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step} within three minutes")


@pytest.mark.slow
def test_a_process_killed_twice_and_interrupted_once(complete, tmp_path):
    folder = tmp_path / "run"
    for step, number in ((2, signal.SIGKILL), (6, signal.SIGINT), (8, signal.SIGKILL)):
        process = launch(folder)
        wait_for_step(process, folder, step)
        process.send_signal(number)
        out, err = process.communicate(timeout=180)
        if number == signal.SIGINT:
            assert process.returncode == 0, err
            assert int(out) >= step
        else:
            assert process.returncode == -signal.SIGKILL
    assert resume(folder).step == STEPS
    assert_same_run(folder, complete)


def test_training_works_in_a_thread(complete, tmp_path):
    thread = threading.Thread(target=start, args=(tmp_path / "run",))
    thread.start()
    thread.join()
    assert_same_run(tmp_path / "run", complete)


def _start_or_resume(folder):
    function = resume if (folder / "config.json").exists() else start
    print(function(folder, Noisy(pause=0.05)).step, flush=True)
