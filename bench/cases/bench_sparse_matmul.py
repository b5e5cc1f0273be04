"""pytest-benchmark of sparsekern.benchmarks.cases.sparse_matmul."""

from __future__ import annotations

from sparsekern.benchmarks.cases.sparse_matmul import OPS, build

__all__ = ["OPS", "build"]


def test_sparse_matmul(job, timed):
    """One workload on one backend."""
    timed(job, build)
