"""Measure a workload: checked, then timed beside its peers, a row for each comparison."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .cases import autoencoder, layers, sparse_matmul, topk
from .machine import facts
from .memory import Peak, peak
from .peers import release
from .problem import Problem
from .roofline import roofline
from .timing import Effort, Subject, Timing, automatic, forced, interleave
from .workload import Workload

Row = dict[str, Any]

BUILDERS = {
    op: case.build for case in (topk, sparse_matmul, layers, autoencoder) for op in case.OPS
}
# The operation whose automatic choice serves a layer.
SERVED_BY = {"TopK": "topk_mask", "SparseAutoencoder": "linear_topk"}


@dataclass(frozen=True)
class Outcome:
    """Ours on one backend: its timing, or why it was refused one."""

    timing: Timing | None
    error_ratio: float | None
    refused: str | None


@dataclass(frozen=True)
class Comparison:
    """A backend of ours, and what it is compared with."""

    backend: str
    peer: str


def measure(
    problem: Problem,
    workload: Workload,
    comparisons: Sequence[Comparison],
    effort: Effort,
    *,
    memory: bool = True,
    served_by: Mapping[str, str] = SERVED_BY,
) -> list[Row]:
    """Check and time one workload on some backends and against some peers.

    Args:
        problem: the workload with its tensors made.
        workload: what it was made of.
        comparisons: a row is returned for each.
        effort: how long to measure.
        memory: whether to take the peak memory of each call, too.
        served_by: the operation that serves a workload, where it is not the one of that name.

    Returns:
        Rows. A backend that fails its check gets a row without a time, which says why.
    """
    with torch.set_grad_enabled(problem.grad):
        names = list(dict.fromkeys(comparison.peer for comparison in comparisons))
        problem.prepare(names)
        chosen = automatic(served_by.get(workload.op, workload.op), workload.device)
        backends = list(dict.fromkeys(comparison.backend for comparison in comparisons))
        checks = {backend: _checked(problem, backend) for backend in backends}
        subjects = [
            Subject(backend, problem.ours, None if backend == chosen else backend)
            for backend in backends
            if checks[backend].refused is None
        ]
        peers = [Subject(name, problem.peers[name]) for name in names] if subjects else []
        timings = interleave([*subjects, *peers], workload.device, effort) if subjects else {}
        peaks: dict[str, Peak] = {}
        if memory:
            for subject in [*subjects, *peers]:
                with forced(subject.backend):
                    subject.call()
                    peaks[subject.name] = peak(subject.call, workload.device)
    return [
        row_of(problem, workload, comparison, checks[comparison.backend], timings, peaks)
        for comparison in comparisons
    ]


def _checked(problem: Problem, backend: str) -> Outcome:
    """Check ours on one backend."""
    try:
        ratio = problem.check(backend)
        if ratio > 1:
            return Outcome(None, ratio, f"error is {ratio:.3g} times what the error rule allows")
        return Outcome(None, ratio, None)
    except Exception as error:  # a kernel that cannot be compiled or launched is refused as well
        return Outcome(None, None, f"{type(error).__name__}: {error}"[:500])


def row_of(
    problem: Problem,
    workload: Workload,
    comparison: Comparison,
    outcome: Outcome,
    timings: Mapping[str, Timing],
    peaks: Mapping[str, Peak],
) -> Row:
    """Make the row of one comparison; timings and peaks are those of backends and peers."""
    ours, peer = timings.get(comparison.backend), timings.get(comparison.peer)
    figures: Row = dict.fromkeys(("ratio", "gbps", "tflops", "roofline_fraction"))
    rates = roofline(workload.device) if problem.roof else {}
    if outcome.refused is None and ours and peer:
        gbps = problem.traffic / ours.median_ms / 1e6
        fraction = gbps / rates[problem.roof] if problem.roof else None
        figures = {
            "ratio": rounded(peer.median_ms / ours.median_ms),
            "gbps": rounded(gbps),
            "tflops": rounded(problem.flops / ours.median_ms / 1e9) if problem.flops else None,
            "roofline_fraction": rounded(fraction),
        }
    return {
        **asdict(workload),
        "case": workload.case,
        "backend": comparison.backend,
        **_timing_fields("", ours if outcome.refused is None else None),
        "peer": comparison.peer,
        "peer_version": release(comparison.peer),
        **_timing_fields("peer_", peer),
        **figures,
        "formula": problem.formula,
        "traffic_bytes": problem.traffic,
        "roof": problem.roof,
        "roofline": rates,
        **_peak_fields("", peaks.get(comparison.backend)),
        **_peak_fields("peer_", peaks.get(comparison.peer)),
        "error_ratio": rounded(outcome.error_ratio),
        "refused": outcome.refused,
        **facts(workload.device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def peak_of(row: Row, prefix: str = "") -> int | None:
    """Return the extra memory at the peak of ours, or with the prefix "peer_" of the peer.

    It is the larger of torch's allocations and the rise of the resident set, since either may miss
    something.
    """
    figures = (row[f"{prefix}peak_allocated_bytes"], row[f"{prefix}peak_resident_bytes"])
    return max((figure for figure in figures if figure is not None), default=None)


def rounded(number: float | None, digits: int = 5) -> float | None:
    """Round a number to so many significant digits; None stays None."""
    return None if number is None else float(f"{number:.{digits}g}")


def _timing_fields(prefix: str, timing: Timing | None) -> Row:
    """Make the fields of a row that a timing fills."""
    names = ("median_ms", "p20_ms", "p80_ms")
    fields = {f"{prefix}{n}": rounded(getattr(timing, n)) if timing else None for n in names}
    return {**fields, f"{prefix}repeats": timing.repeats if timing else 0}


def _peak_fields(prefix: str, found: Peak | None) -> Row:
    """Make the fields of a row that the peak memory fills."""
    return {
        f"{prefix}peak_allocated_bytes": found.allocated if found else None,
        f"{prefix}peak_resident_bytes": found.resident if found else None,
    }
