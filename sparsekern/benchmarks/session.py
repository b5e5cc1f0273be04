"""A session of measurements: processes, limits of time and memory, rows, a table and a picture."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import sparsekern

from .._system import replaced
from .figures import ratio_bars
from .machine import cpu_model
from .measure import Row, peak_of
from .roofline import roofline
from .suites import Job, needed_bytes, seconds_of_a_round
from .worker import MARK

MEMORY_INFO = Path("/proc/meminfo")
# A round of a job that would take longer is left out.
LONGEST_ROUND = 30.0
# Of the free memory; the rest is for what an estimate leaves out.
USABLE_SHARE = 0.7
MIB = 2**20
ROWS = "rows.jsonl"
GRACE = 20.0  # seconds that a process may go on after its limit

Say = Callable[[str], None]


def describe_machine(device: str) -> list[str]:
    """Return lines that say where the figures come from, and what this machine can do at most."""
    facts = sparsekern.describe()
    module = facts["modules"]["_cuda" if device == "cuda" else "_native"]
    built = ", ".join(f"{name}: {value}" for name, value in module.items())
    where = (
        facts["gpu"] if device == "cuda" else f"{cpu_model()}, {torch.get_num_threads()} threads"
    )
    rates = ", ".join(
        f"{name} {rate:.4g} {'TFLOP/s' if name.startswith('product') else 'GB/s'}"
        for name, rate in roofline(device).items()
    )
    return [
        f"{where}; torch {torch.__version__}, sparsekern {sparsekern.__version__}",
        f"kernels: {built}",
        f"limits, measured: {rates}",
    ]


def run(
    jobs: Sequence[Job],
    folder: Path,
    *,
    device: str,
    seconds: float,
    least: int,
    limit: float,
    say: Say,
    rows: list[Row],
    notes: list[str],
) -> None:
    """Measure jobs, each group of them in a process of its own.

    Args:
        jobs: what to measure.
        folder: where rows.jsonl grows with each row.
        device: "cpu" or "cuda".
        seconds: for about how long each loop runs.
        least: the least rounds of each loop.
        limit: seconds after which no further job begins.
        say: takes a line for each row.
        rows: gets the rows, as they come.
        notes: gets a sentence for each job that was left out.
    """
    began = time.monotonic()
    fitting, left_out = _fitting(jobs, device)
    notes += left_out
    for group in dict.fromkeys(job.group for job in fitting):
        waiting = [job for job in fitting if job.group == group]
        while waiting:
            left = limit - (time.monotonic() - began)
            if left <= 0:
                notes += [f"{job.workload}: no time was left" for job in waiting]
                break
            request = {
                "jobs": [{"workload": asdict(j.workload), "others": j.others} for j in waiting],
                "threads": torch.get_num_threads(),
                "seconds": seconds,
                "least": least,
                "limit": left,
            }
            done, failure = 0, None
            for message in _messages(request, left):
                if "begun" in message:
                    done += 1
                elif "left_out" in message:
                    notes.append(message["left_out"])
                elif "failure" in message:
                    failure = message["failure"]
                else:
                    rows.append(message)
                    _write_rows(folder / ROWS, rows)
                    say(line_of(message))
            if failure is None:
                break
            failed = waiting[max(done, 1) - 1]
            notes.append(f"{failed.workload} against {', '.join(failed.others)}: {failure}")
            waiting = waiting[max(done, 1) :]


def _fitting(jobs: Sequence[Job], device: str) -> tuple[list[Job], list[str]]:
    """Return the jobs that this machine can do, and a sentence for each of the others."""
    free = _free_bytes(device)
    rates = roofline(device)
    kept, notes = [], []
    for job in jobs:
        bytes_, rate = needed_bytes(job.workload), rates["product float32"]
        seconds = seconds_of_a_round(job.workload, rate * 1e12)
        if bytes_ > USABLE_SHARE * free:
            notes.append(
                f"{job.workload}: needs about {bytes_ / MIB:.0f} MiB, {free / MIB:.0f} are free"
            )
        elif seconds > LONGEST_ROUND:
            notes.append(f"{job.workload}: a round would take about {seconds:.0f} s")
        else:
            kept.append(job)
    return kept, list(dict.fromkeys(notes))


def _free_bytes(device: str) -> int:
    """Return how much memory is free; very much where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if MEMORY_INFO.exists():
        for line in MEMORY_INFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62


def _messages(request: Row, left: float) -> Iterator[Row]:
    """Yield what a worker tells, and at last why it failed, if it did."""
    command = [sys.executable, "-m", "sparsekern.benchmarks.worker"]
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(request) + "\n")
            worker.stdin.flush()  # it stays open while this process lives
            for line in worker.stdout:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
            code = worker.wait(left + GRACE)
        finally:
            worker.kill()
            worker.wait()
            with contextlib.suppress(BrokenPipeError):  # what a dead worker has not read
                worker.stdin.close()
        if code != 0:
            errors.seek(0)
            said = errors.read().strip().splitlines()
            yield {"failure": f"the process ended with {code}: {said[-1] if said else 'silently'}"}


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, in the place of those before."""
    with replaced(path) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def line_of(row: Row) -> str:
    """Return one line about a row."""
    name = f"{row['op']} {row['mode']} {row['dtype']} {row['case']}"
    name += f" {row['autocast']} autocast" if row["autocast"] else ""
    if row["refused"]:
        return f"{name}: no time, it failed its check: {row['refused']}"
    limit = f", {limit_of(row)}" if limit_of(row) else ""
    return (
        f"{name}: {row['median_ms']:.4g} ms, {row['peer']} {row['peer_median_ms']:.4g} ms: "
        f"{row['ratio']:.3g}x as fast{limit}{_memory(row)}"
    )


def limit_of(row: Row) -> str:
    """Say how near the machine's limits a row is: of moving bytes or of products."""
    product = f"product {row['autocast'] or row['dtype']}"
    fractions = {}
    if row["roofline_fraction"] is not None:
        fractions[row["roof"]] = row["roofline_fraction"]
    if row["tflops"] is not None and row["roofline"].get(product):
        fractions[product] = row["tflops"] / row["roofline"][product]
    if not fractions:
        return ""
    nearest = max(fractions, key=fractions.__getitem__)
    return f"{fractions[nearest]:.0%} of {nearest}"


def _memory(row: Row) -> str:
    """Return the two peaks of memory as a part of a line."""
    ours, theirs = peak_of(row), peak_of(row, "peer_")
    if ours is None or theirs is None:
        return ""
    return f", peak {ours / MIB:.4g} MiB against {theirs / MIB:.4g}"


def write_report(
    folder: Path, machine: Sequence[str], rows: Sequence[Row], notes: Sequence[str]
) -> None:
    """Write report.md and ratios.svg."""
    head = ("operation", "sizes", "ours", "against", "its time", "ratio", "of the limit", "memory")
    table = [head, ("---",) * len(head)]
    for row in rows:
        ours, theirs = peak_of(row), peak_of(row, "peer_")
        known = not row["refused"]
        table.append((
            f"{row['op']} {row['mode']} {row['dtype']} {row['autocast']}".strip(),
            row["case"],
            f"{row['median_ms']:.4g} ms" if known else "refused",
            f"{row['peer']} {row['peer_version'] or ''}".strip(),
            f"{row['peer_median_ms']:.4g} ms" if known else "",
            f"{row['ratio']:.3g}x" if known else row["refused"],
            limit_of(row) if known else "",
            f"{ours / MIB:.4g} / {theirs / MIB:.4g} MiB" if ours and theirs else "",
        ))  # fmt: skip
    text = [
        "# sparsekern on this machine",
        "",
        *(f"{line}\n" for line in machine),
        "![How many times as fast](ratios.svg)",
        "",
        *("| " + " | ".join(cells) + " |" for cells in table),
        "",
        *(f"- Left out: {note}" for note in notes),
    ]
    with replaced(folder / "report.md") as file:
        file.write(("\n".join(text).rstrip() + "\n").encode())
    below = "times as fast as what is named; above 1 is faster"
    with replaced(folder / "ratios.svg") as file:
        file.write(ratio_bars("sparsekern on this machine", below, rows).encode())
