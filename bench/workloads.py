"""Measure workloads: checked and timed beside their peers, a row for each line of the table."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from cases import (
    bench_activity,
    bench_autoencoder,
    bench_layers,
    bench_sparse_matmul,
    bench_threshold,
    bench_topk,
    bench_training,
    bench_vae_sae,
)
from cases.peers import release
from cases.problem import Problem
from measuring.machine import facts
from measuring.memory import Peak, peak
from measuring.roofline import roofline
from measuring.timing import Effort, Subject, Timing, automatic, forced, interleave
from rows import Row, rounded
from targets import MIB, Target, Workload, peak_of

STEMS = (
    bench_topk,
    bench_sparse_matmul,
    bench_activity,
    bench_layers,
    bench_autoencoder,
    bench_training,
    bench_vae_sae,
    bench_threshold,
)
BUILDERS = {op: stem.build for stem in STEMS for op in stem.OPS}
# The operation whose automatic choice serves a layer.
SERVED_BY = {
    "TopK": "topk_mask",
    "SparseAutoencoder": "linear_topk",
    "training step": "linear_topk",
    "accelerate": "linear_topk",
    "SparseBottleneck": "topk",
    "VAE-SAE step": "topk",
    "SpatialSparsity": "channel_threshold",
}


@dataclass(frozen=True)
class Outcome:
    """Ours on one backend: its timing, or why it was refused one."""

    timing: Timing | None
    error_ratio: float | None
    refused: str | None


def measure_workload(
    workload: Workload,
    targets: Sequence[Target],
    effort: Effort,
    memory: bool = True,
    problem: Problem | None = None,
) -> list[Row]:
    """Check and time one workload on the backends and against the peers of its targets.

    Returns a row per target. A backend that fails its check gets a row without a time. A problem
    that was built before saves building it.
    """
    problem = problem or BUILDERS[workload.op](workload)
    with torch.set_grad_enabled(problem.grad):
        return _measure(problem, workload, targets, effort, memory)


def _measure(
    problem: Problem,
    workload: Workload,
    targets: Sequence[Target],
    effort: Effort,
    memory: bool,
) -> list[Row]:
    op = SERVED_BY.get(workload.op, workload.op)
    chosen = automatic(op, workload.device)
    backends = list(dict.fromkeys(target.backend for target in targets))
    checks = {backend: _checked(problem, backend) for backend in backends}
    subjects = [
        Subject(backend, problem.ours, None if backend == chosen else backend)
        for backend in backends
        if checks[backend].refused is None
    ]
    names = list(dict.fromkeys(target.peer for target in targets))
    peers = [Subject(name, problem.peers[name]) for name in names] if subjects else []
    timings = interleave([*subjects, *peers], workload.device, effort) if subjects else {}
    peaks: dict[str, Peak] = {}
    if memory:
        for subject in [*subjects, *peers]:
            with forced(subject.backend):
                subject.call()
                peaks[subject.name] = peak(subject.call, workload.device)
    return [row_of(problem, target, checks[target.backend], timings, peaks) for target in targets]


def _checked(problem: Problem, backend: str) -> Outcome:
    try:
        ratio = problem.check(backend)
        if ratio > 1:
            return Outcome(None, ratio, f"error is {ratio:.3g} times what the error rule allows")
        return Outcome(None, ratio, None)
    except Exception as error:  # a kernel that cannot be compiled or launched is refused as well
        return Outcome(None, None, f"{type(error).__name__}: {error}"[:500])


def row_of(
    problem: Problem,
    target: Target,
    outcome: Outcome,
    timings: dict[str, Timing],
    peaks: dict[str, Peak],
) -> Row:
    """The row of one line; timings and peaks are those of its backend and its peer, by name."""
    workload = target.workload
    ours, peer = timings.get(target.backend), timings.get(target.peer)
    figures: dict[str, Any] = dict.fromkeys(("ratio", "gbps", "tflops", "roofline_fraction"))
    memory = {
        **_peak_fields("", peaks.get(target.backend)),
        **_peak_fields("peer_", peaks.get(target.peer)),
    }
    rates = roofline(workload.device) if problem.roof else {}
    reached = None
    if outcome.refused is None and ours and peer:
        gbps = problem.traffic / ours.median_ms / 1e6
        fraction = gbps / rates[problem.roof] if problem.roof else None
        ratio = peer.median_ms / ours.median_ms
        figures = {
            "ratio": rounded(ratio),
            "gbps": rounded(gbps),
            "tflops": rounded(problem.flops / ours.median_ms / 1e9) if problem.flops else None,
            "roofline_fraction": rounded(fraction),
        }
        reached = target.reached(ratio, fraction, peak_of(memory)) if target.required else None
    return {
        **asdict(workload),
        "case": workload.case,
        "backend": target.backend,
        **_timing_fields("", ours if outcome.refused is None else None),
        "peer": target.peer,
        "peer_version": release(target.peer),
        **_timing_fields("peer_", peer),
        **figures,
        "bar": target.bar,
        "requirement": target.requirement(),
        "reached": reached,
        "formula": problem.formula,
        "traffic_bytes": problem.traffic,
        "roof": problem.roof,
        "roofline": rates,
        **memory,
        "error_ratio": rounded(outcome.error_ratio),
        "refused": outcome.refused,
        **facts(workload.device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _timing_fields(prefix: str, timing: Timing | None) -> Row:
    names = ("median_ms", "p20_ms", "p80_ms")
    fields = {f"{prefix}{n}": rounded(getattr(timing, n)) if timing else None for n in names}
    return {**fields, f"{prefix}repeats": timing.repeats if timing else 0}


def _peak_fields(prefix: str, found: Peak | None) -> Row:
    return {
        f"{prefix}peak_allocated_bytes": found.allocated if found else None,
        f"{prefix}peak_resident_bytes": found.resident if found else None,
    }


def describe(row: Row) -> str:
    """One line for a report while measuring."""
    who = f"{row['op']} {row['case']} {row['dtype']} {row['mode']} {row['fill']} {row['layout']}"
    who += f" {row['autocast']} autocast" * bool(row["autocast"])
    if row["refused"]:
        return f"{who} [{row['backend']}] no time, failed its check: {row['refused']}"
    against = (
        f"{1 / row['ratio']:.2f}x its time"
        if row["requirement"].startswith("at most")
        else f"{row['ratio']:.2f}x as fast"
    )
    peak_bytes, fraction = peak_of(row), row["roofline_fraction"]
    rest = "" if fraction is None else f"; {fraction:.0%} of {row['roof']}"
    rest += "" if peak_bytes is None else f"; peak {peak_bytes / MIB:.1f} MiB"
    verdict = {True: ": reached", False: ": MISSED", None: ""}[row["reached"]]
    return (
        f"{who} [{row['backend']}] {row['median_ms']:.4g} ms; {row['peer']} "
        f"{row['peer_median_ms']:.4g} ms: {against} ({row['requirement']}{verdict}){rest}"
    )
