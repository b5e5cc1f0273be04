"""`sparsekern bench`: what it measures, says, leaves out and leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from sparsekern.benchmarks import peers, session, suites
from sparsekern.benchmarks.measure import BUILDERS, Comparison, measure
from sparsekern.benchmarks.problem import Problem
from sparsekern.benchmarks.suites import Job
from sparsekern.benchmarks.timing import Effort
from sparsekern.benchmarks.workload import Workload
from sparsekern.cli import main

SMALL = Workload("topk", 4, 64, 3)
RATES = {"copy": 10.0, "read": 12.0, "product float32": 0.05}


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """Limits of a machine that need not be measured."""
    for module in (session, sys.modules["sparsekern.benchmarks.measure"]):
        monkeypatch.setattr(module, "roofline", lambda device: RATES)


def run(jobs, folder, **changes):
    lines = []
    settings = {"device": "cpu", "seconds": 0.001, "least": 2, "limit": 300.0, **changes}
    rows, notes = [], []
    session.run(jobs, folder, say=lines.append, rows=rows, notes=notes, **settings)
    return rows, notes, lines


@pytest.mark.slow
def test_rows_picture_and_table(tmp_path, capsys):
    assert main(["bench", "--quick", "--only", "topk forward", "--out", str(tmp_path)]) == 2
    assert "--only must be a part of some line" in capsys.readouterr().err
    code = main([
        "bench", "--quick", "--only", "topk B=512 n=16384 k=32 float32", "--seconds", "0.01",
        "--out", str(tmp_path),
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0, printed
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert (row["op"], row["peer"], row["error_ratio"]) == ("topk", "torch.topk", 0.0)
    assert f"{row['ratio']:.3g}x as fast" in printed
    report = (tmp_path / "report.md").read_text()
    assert f"| {row['ratio']:.3g}x |" in report and "ratios.svg" in report
    assert f"{row['ratio']:.3g}x</text>" in (tmp_path / "ratios.svg").read_text()
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert main(["bench", "--quick", "--only", "topk", "--out", str(tmp_path)]) == 2
    assert "--out must be a folder without earlier measurements" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_bytes() == before


@pytest.mark.slow
def test_an_interrupted_measurement_leaves_its_report(tmp_path, capsys, monkeypatch):
    complete = session.run

    def interrupted(jobs, *arguments, **settings):
        complete([Job(SMALL, ("torch.topk",))], *arguments, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run", interrupted)
    arguments = ["bench", "--quick", "--only", "topk", "--seconds", "0.01"]
    assert main([*arguments, "--out", str(tmp_path)]) == 130
    assert "report of what was measured" in capsys.readouterr().out
    assert "all else: interrupted" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="processes of POSIX")
def test_a_worker_ends_with_the_process_that_asked():
    worker = subprocess.Popen(
        [sys.executable, "-m", "sparsekern.benchmarks.worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    job = {"workload": asdict(Workload("topk", 64, 4096, 8)), "others": ["torch.topk"]}
    request = {"jobs": [job], "threads": 1, "seconds": 600.0, "least": 5, "limit": 600.0}
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    assert "begun" in worker.stdout.readline()
    worker.stdin.close()
    assert worker.wait(20) == 1


@pytest.mark.slow
def test_a_process_that_dies_costs_its_job_alone(tmp_path):
    """An operation that does not exist ends the worker; what waited behind it is measured."""
    bad = Job(Workload("no such operation", 4, 64, 3), ("torch.topk",))
    rows, notes, lines = run([bad, Job(SMALL, ("torch.topk",))], tmp_path)
    assert [row["op"] for row in rows] == ["topk"] and len(lines) == 1
    (note,) = notes
    assert note.startswith("no such operation B=4") and "the process ended with 1" in note


def test_packages_that_are_missing_are_named(tmp_path):
    job = Job(Workload("SparseAutoencoder", 4, 64, 3, 8), ("sae-lens",), "sae-lens")
    if peers.trouble("sae-lens") is None:
        pytest.skip("sae-lens is installed: run the test where it is not")
    rows, notes, _ = run([job], tmp_path)
    assert rows == [] and notes == ["sae-lens: not installed (pip install '.[peers]')"]


def test_what_does_not_fit_is_left_out(tmp_path, monkeypatch):
    large = Job(Workload("topk", 8192, 1 << 20, 3), ("torch.topk",))
    slow = Job(Workload("linear_topk", 8192, 1 << 20, 64, 4096), ("F.linear",))
    monkeypatch.setattr(session, "_free_bytes", lambda device: 1 << 30)
    _, notes, _ = run([large], tmp_path)
    assert "needs about" in notes[0] and "1024 are free" in notes[0]
    monkeypatch.setattr(session, "_free_bytes", lambda device: 1 << 50)
    _, notes, _ = run([slow], tmp_path)
    assert "a round would take about" in notes[0]
    _, notes, _ = run([Job(SMALL, ("torch.topk",))], tmp_path, limit=-1.0)
    assert notes == [f"{SMALL}: no time was left"]


def test_a_wrong_result_gets_no_time():
    def wrong(backend):
        raise AssertionError("other values")

    call = [1, 2].copy
    problem = Problem(call, {"torch.topk": call}, wrong, 1, "nothing", None)
    comparison = Comparison("native", "torch.topk")
    (row,) = measure(problem, SMALL, [comparison], Effort(0.001, 2), memory=False)
    assert row["refused"] == "AssertionError: other values"
    assert row["median_ms"] is None and "it failed its check" in session.line_of(row)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", [suites.quick, suites.sweep])
def test_every_job_can_be_built(suite, device):
    jobs = suite(device)
    assert {job.workload.device for job in jobs} == {device}
    assert {job.workload.op for job in jobs} <= set(BUILDERS)
    assert len({(job.workload, job.others) for job in jobs}) == len(jobs)
    for job in jobs:
        assert Workload(**json.loads(json.dumps(asdict(job.workload)))) == job.workload
        assert session.needed_bytes(job.workload) > 0


@pytest.mark.parametrize("flag", ["--seconds", "--limit", "--threads"])
def test_numbers_must_be_positive(flag, capsys):
    assert main(["bench", "--quick", flag, "0"]) == 2
    assert f"{flag} must be positive, got 0" in capsys.readouterr().err
