"""pytest-benchmark of sparsekern.benchmarks.cases.layers."""

from __future__ import annotations

from sparsekern.benchmarks.cases.layers import OPS, build

__all__ = ["OPS", "build"]


def test_layers(job, timed):
    """One workload on one backend."""
    timed(job, build)
