"""pytest-benchmark of sparsekern.benchmarks.cases.topk."""

from __future__ import annotations

from sparsekern.benchmarks.cases.topk import OPS, build

__all__ = ["OPS", "build"]


def test_topk(job, timed):
    """One workload on one backend."""
    timed(job, build)
