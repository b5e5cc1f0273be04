"""Measure workloads: checked and timed beside their peers, a row for each line of the table."""

from __future__ import annotations

from collections.abc import Sequence

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
from measuring.sources import commit, sources_digest
from targets import MIB, Target

from sparsekern.benchmarks import measure
from sparsekern.benchmarks.measure import Comparison, Row, peak_of
from sparsekern.benchmarks.problem import Problem
from sparsekern.benchmarks.timing import Effort
from sparsekern.benchmarks.workload import Workload

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
    **measure.SERVED_BY,
    "training step": "linear_topk",
    "accelerate": "linear_topk",
    "SparseBottleneck": "topk",
    "VAE-SAE step": "topk",
    "SpatialSparsity": "channel_threshold",
}


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
    comparisons = [Comparison(target.backend, target.peer) for target in targets]
    rows = measure.measure(
        problem, workload, comparisons, effort, memory=memory, served_by=SERVED_BY
    )
    return [judged(row, target) for row, target in zip(rows, targets, strict=True)]


def judged(row: Row, target: Target) -> Row:
    """The row with its target's bar, whether it was reached, and the sources it was measured of."""
    reached = None
    if row["ratio"] is not None and target.required:
        reached = target.reached(row["ratio"], row["roofline_fraction"], peak_of(row))
    bar = {"bar": target.bar, "requirement": target.requirement(), "reached": reached}
    return {**row, **bar, "commit": commit(), "sources": sources_digest()}


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
