"""`pytest bench`: every case of the speed table and a few more, each beside its peers.

pytest-benchmark's own table shows our time alone; the interleaved comparison is printed after it,
saved in `extra_info` with --benchmark-json, and appended to bench/results with --record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from measuring.checkout import RESULTS
from rows import append
from targets import EXTRAS, TARGETS, Target, Workload, by_workload, usable
from workloads import SERVED_BY, describe, measure_workload

from sparsekern.benchmarks.problem import Problem
from sparsekern.benchmarks.timing import Effort, automatic, forced

REPORT = pytest.StashKey[list[str]]()
SHOWN = ("median_ms", "peer", "peer_median_ms", "ratio", "requirement", "reached", "gbps")


@dataclass(frozen=True)
class Job:
    """A workload on one backend, with the lines of the table that it decides."""

    workload: Workload
    backend: str
    targets: tuple[Target, ...]

    def __str__(self) -> str:
        return f"{self.workload} {self.backend}"


def jobs(ops: tuple[str, ...]) -> list[Job]:
    """All jobs of some operations that this machine can run."""
    devices = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    found = []
    targets, _ = usable(target for target in TARGETS + EXTRAS if target.workload.op in ops)
    for workload, lines in by_workload(targets).items():
        if workload.device in devices:
            for backend in dict.fromkeys(line.backend for line in lines):
                chosen = tuple(line for line in lines if line.backend == backend)
                found.append(Job(workload, backend, chosen))
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparsekern")
    group.addoption("--record", action="store_true", help="append rows to bench/results")
    group.addoption("--seconds", type=float, default=1.0, help="time for each interleaved loop")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("ours beside its peers, interleaved")
    for line in config.stash[REPORT]:
        terminalreporter.write_line(line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "job" in metafunc.fixturenames:
        metafunc.parametrize("job", jobs(metafunc.module.OPS), ids=str)


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Job, Any], None]:
    """Measures a job beside its peers, then hands our call to pytest-benchmark."""

    def run(job: Job, build: Callable[[Workload], Problem]) -> None:
        seconds = request.config.getoption("--seconds")
        problem = build(job.workload)
        effort = Effort(seconds, least=5)
        rows = measure_workload(job.workload, job.targets, effort, problem=problem)
        request.config.stash[REPORT].extend(describe(row) for row in rows)
        if request.config.getoption("--record"):
            append(RESULTS, rows)
        assert not rows[0]["refused"], rows[0]["refused"]
        benchmark.group = f"{job.workload.op} {job.workload.mode}"
        benchmark.extra_info["lines"] = [{name: row[name] for name in SHOWN} for row in rows]
        op = SERVED_BY.get(job.workload.op, job.workload.op)
        chosen = job.backend == automatic(op, job.workload.device)

        def call() -> None:
            problem.ours()
            if job.workload.device == "cuda":
                torch.cuda.synchronize()

        with torch.set_grad_enabled(problem.grad), forced(None if chosen else job.backend):
            benchmark.pedantic(call, rounds=rows[0]["repeats"], warmup_rounds=1)

    return run
