"""`train sae` in several processes, as torchrun starts them, beside one process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from one_thread import one_thread
from processes import Forked, run_together, spawn, wait_for_growth

from sparsekern.cli.command import main
from sparsekern.data import synthetic, write_activations
from sparsekern.models import SparseAutoencoder
from sparsekern.studies import processes, sae
from sparsekern.training import checkpoints

__all__ = ["one_thread"]  # a fixture
pytestmark = pytest.mark.slow
SMALL = {
    "latents": 48, "k": 2, "k_start": 6, "epochs": 2, "batch_size": 256, "learning_rate": 3e-3,
    "auxk": 8, "dead_after": 1500, "eval_tokens": 500, "checkpoint_tokens": 2048, "log_every": 1,
    "progress": False,
}  # fmt: skip
RUNS = {
    "topk": {},
    "batchtopk in parts": {"activation": "batchtopk", "micro_batch": 100},
    "jumprelu": {"activation": "jumprelu", "k_start": 0, "prefixes": (7, 20)},
}
MORE_RUNS = {
    "groups": {"groups": 2},
    "relu": {"activation": "relu", "sparsity_weight": 0.3, "k_start": 0},
    "tied, normalized": {"tied": True, "normalize": "token", "multi_k": 8},
    "scaled scores": {"scale_scores": True, "normalize": "dataset", "micro_batch": 60},
}
# Losses of 16 steps whose sums are rounded in another order.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
STOPPED = 9  # steps, after which one process gets a signal
LONG, KILLS = {"epochs": 30}, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tokens.h5"
    synthetic(path, features=16, latents=24, active=2, tokens=2500, seed=5)
    return path


def config(data, **changes):
    return sae.Config(activations=(str(data),), **{**SMALL, **changes})


def torchrun(count, *arguments, restarts=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return spawn(*launcher, "--max-restarts", str(restarts), *map(str, arguments))


def end_of(process, timeout=240):
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.terminate()  # torchrun ends its processes with it
    return process.returncode, out, errors


def run_in(count, data, folder, runs, mesh=None, resume=False):
    """Runs by name, in subfolders of a folder."""
    with job_of(count) as environment:
        run_together(_in_job, count, environment, data, folder, runs, mesh, None, resume)


def compare(one, other, **close):
    """Metrics, results and tensors of two run folders are equal up to rounding, or as given."""
    metrics = [(f / "metrics.jsonl").read_text().splitlines() for f in (one, other)]
    assert len(metrics[0]) > 10
    for lines in zip(*metrics, strict=True):
        numbers = [_numbers(json.loads(line)) for line in lines]
        torch.testing.assert_close(numbers[1], numbers[0], **(close or CLOSE))
    results = [json.loads((f / "results.json").read_text()) for f in (one, other)]
    torch.testing.assert_close(_numbers(results[1]), _numbers(results[0]), **(close or CLOSE))
    tensors = [checkpoints.read_checkpoint(f).tensors for f in (one, other)]
    assert list(tensors[0]) == list(tensors[1])
    for name, tensor in tensors[0].items():
        scale = float(tensor.double().abs().nan_to_num().max()) if tensor.numel() else 0
        torch.testing.assert_close(
            tensors[1][name], tensor, **(close or {"rtol": 1e-3, "atol": 1e-3 * scale}),
            equal_nan=True, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def _numbers(record):
    return {
        name: torch.tensor(float(value))
        for name, value in record.items()
        if isinstance(value, int | float) and not name.endswith("per_second")
    }


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Runs in one process, by name."""
    folder, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    for name, changes in {**RUNS, **MORE_RUNS}.items():
        sae.run(config(data, **changes), folder / name)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def together(data, tmp_path_factory):
    """The same runs in two processes, and one that a signal to the second of them ended."""
    folder = tmp_path_factory.mktemp("together")
    run_in(2, data, folder, {**RUNS, "stopped": {}})
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_as_one(alone, together, name):
    compare(alone / name, together / name)


@pytest.mark.parametrize("mesh", ["data=2,latents=1", "data=2,latents=2", "latents=3"])
def test_meshes_end_as_one_process(data, alone, tmp_path, mesh):
    runs = {**RUNS, **MORE_RUNS}
    count = math.prod(int(part.partition("=")[2]) for part in mesh.split(","))
    run_in(count, data, tmp_path, runs, mesh)
    for name in runs:
        compare(alone / name, tmp_path / name)


def test_a_run_of_two_processes_is_one_like_any_other(alone, together, tmp_path, capsys):
    folder = together / "topk"
    results = json.loads((folder / "results.json").read_text())
    measured = sae.evaluate_run(folder)
    assert measured["recovered"] == results["recovered"] and measured["l0"] == results["l0"]
    trained, expected = sae.load_run(folder), sae.load_run(alone / "topk")
    assert trained.step == expected.step
    assert trained.model.dictionary.shape == (48, 16)
    assert main(["eval", str(folder), str(alone / "topk")]) == 0
    assert main(["convert", str(folder), str(tmp_path / "written"), "--to", "saelens"]) == 0
    written = SparseAutoencoder.from_pretrained(tmp_path / "written")
    assert torch.equal(written.dictionary, trained.model.dictionary)
    flags = ["--to", "saelens", "--k", "2"]
    assert main(["convert", str(folder), str(tmp_path / "other"), *flags]) == 2
    assert "--k must be left out for a run" in capsys.readouterr().err


def test_a_signal_to_one_process_ends_both_at_the_same_step_and_one_goes_on(
    data, alone, together, one_thread
):
    folder = together / "stopped"
    assert checkpoints.read_checkpoint(folder).facts["step"] == STOPPED
    assert not (folder / "results.json").exists()
    assert main(["train", "sae", "--resume", str(folder)]) == 0
    compare(alone / "topk", folder)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--mesh rows=2", "--mesh must be like data=1,latents=2, got 'rows=2'"),
        ("--mesh data=2", "--mesh must multiply to the number of processes 1 (torchrun), got "),
    ],
)
def test_a_wrong_mesh_is_refused(data, tmp_path, capsys, flags, message):
    words = ["train", "sae", "--activations", data, "--out", tmp_path / "run", *flags.split()]
    assert main(list(map(str, words))) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--nonsense"], ["--k"], ["--k=-1"]], ids=str)
def test_wrong_flags_are_left_to_the_first_process(data, tmp_path, capsys, monkeypatch, words):
    """The others speak if they are still there after some seconds, in which it has not."""
    silences = []
    monkeypatch.setattr(processes.time, "sleep", lambda _: silences.append(capsys.readouterr().err))
    command = ["train", "sae", "--activations", str(data), "--out", str(tmp_path / "run"), *words]
    for rank, expected in (("0", []), ("1", [""])):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        try:
            code = main(command)
        except SystemExit as end:
            code = end.code
        assert code == 2 and silences == expected
        assert len(said(capsys.readouterr().err)) == 1


def test_several_processes_need_a_name_for_their_folder(data, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "sae", "--activations", str(data)]) == 2
    assert "--out must name a folder where torchrun starts several" in capsys.readouterr().err


def command(data, folder, **changes):
    settings = {**SMALL, **changes}
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in settings.items() if n != "progress"]
    return ["-m", "sparsekern", "train", "sae", "--no-progress", "--activations", data, "--out",
            folder, *flags]  # fmt: skip


def said(errors):
    return [line for line in errors.splitlines() if "sparsekern: error" in line]


def test_only_a_restart_of_torchrun_goes_on_with_the_same_command(data, tmp_path, monkeypatch):
    words = list(map(str, ["train", "sae", *command(data, tmp_path / "run", epochs=1)[4:]]))
    assert main(words) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(words) == 0
    assert main([*words, "--k=3"]) == 2, "another run"
    monkeypatch.undo()
    assert main(words) == 2


def errors_of_two(*arguments):
    """What the first of two processes says, both of which must fail."""
    with job_of(2) as environment:
        processes = [Forked(_in_job, rank, environment, *arguments) for rank in range(2)]
        errors = [process.communicate(timeout=60)[1] for process in processes]
    assert all(process.returncode == 1 for process in processes), errors
    return errors[0]


def test_an_error_is_said_once(data, tmp_path):
    """Of a wrong setting, of a file of one process, and of a disk of the first."""
    process = torchrun(2, *command(data, tmp_path / "a", latents=-1))
    code, _, errors = end_of(process)
    assert code and len(said(errors)) == 1 and "latents must be at least 0" in errors
    other = tmp_path / "other.h5"
    write_activations(other, [torch.randn(2500, 16)])
    errors = errors_of_two(data, tmp_path, {"other": {}}, None, other)
    assert "process 1: all processes must have the same activations' digest" in errors
    errors = errors_of_two(data, tmp_path, {"full": {}}, None)
    assert "No space left on device" in errors and "lost" not in errors


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of two processes that takes seconds."""
    folder = tmp_path_factory.mktemp("whole")
    run_in(2, data, folder, {"run": LONG})
    return folder / "run"


def test_kills_cost_nothing_but_time(data, whole, tmp_path):
    """Random processes are killed at random moments; torchrun's restarts go on, and end with the
    same bits as two processes that were left alone."""
    folder, chance, kills = tmp_path / "killed", random.Random(3), 0
    job = torchrun(2, *command(data, folder, **LONG), restarts=KILLS)
    while job.poll() is None and kills < KILLS:
        wait_for_growth(job, folder / "metrics.jsonl")
        time.sleep(chance.uniform(0, 0.3))
        workers = children(job.pid)
        if len(workers) == 2:
            os.kill(chance.choice(workers), signal.SIGKILL)
            kills += 1
            time.sleep(1)
    code, _, errors = end_of(job, timeout=90)
    assert code == 0, errors
    assert kills == KILLS
    compare(whole, folder, rtol=0, atol=0)


def test_without_restarts_a_lost_process_is_told_and_more_of_them_go_on(data, whole, tmp_path):
    folder = tmp_path / "lost"
    job = torchrun(2, *command(data, folder, **LONG))
    while job.poll() is None and _steps(folder) < 150:
        time.sleep(0.02)
    os.kill(children(job.pid)[1], signal.SIGKILL)
    code, _, errors = end_of(job)
    assert code and len(said(errors)) == 1, errors
    assert "process 1 of 2 was lost" in errors and "--resume goes on from it" in errors
    run_in(3, data, tmp_path, {"lost": LONG}, resume=True)
    results, wanted = (json.loads((f / "results.json").read_text()) for f in (folder, whole))
    assert results["fvu"] == pytest.approx(wanted["fvu"], rel=0.1)


def _steps(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@contextlib.contextmanager
def job_of(count):
    """What torchrun tells the processes that it starts; the store that they meet at is here."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
           "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip


def _in_job(rank, environment, data, folder, runs, mesh, other=None, resume=False):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
    for name, changes in runs.items():
        mine = other if other and rank == 1 else data
        if name == "stopped":
            _interrupt(rank)
        if name == "full" and rank == 0:
            _fill_disk()
        sae.run(config(mine, **changes), Path(folder) / name, mesh=mesh, resume=resume)


def _interrupt(rank):
    backward = sae.SAETask.backward

    def counted(task, batch):
        if task.step == STOPPED - 1 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return backward(task, batch)

    sae.SAETask.backward = counted


def _fill_disk():
    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoints.write_tensors = full
