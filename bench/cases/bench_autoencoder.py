"""pytest-benchmark of sparsekern.benchmarks.cases.autoencoder."""

from __future__ import annotations

from sparsekern.benchmarks.cases.autoencoder import OPS, build

__all__ = ["OPS", "build"]


def test_autoencoder(job, timed):
    """One workload on one backend."""
    timed(job, build)
