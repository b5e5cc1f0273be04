"""count_active against torch.bincount."""

from __future__ import annotations

import torch
from measuring.checkout import sparsekern

from sparsekern.benchmarks.problem import Problem, check_exact
from sparsekern.benchmarks.workload import Workload

OPS = ("count_active",)
COUNT_BYTES = 8


def build(workload: Workload) -> Problem:
    """The problem of counting how often each latent fired."""
    generator = torch.Generator().manual_seed(1)
    shape = (workload.rows, workload.k)
    indices = torch.randint(0, workload.n, shape, generator=generator).to(workload.device)
    flat = indices.view(-1)
    n = workload.n
    return Problem(
        ours=lambda: sparsekern.count_active(indices, n),
        peers={"torch.bincount": lambda: torch.bincount(flat, minlength=n)},
        check=lambda backend: check_exact(
            str(workload), lambda: (sparsekern.count_active(indices, n),), backend
        ),
        traffic=(indices.numel() + n) * COUNT_BYTES,
        formula="indices read, counts written",
        roof="read",
    )


def test_activity(job, timed):
    """One case and backend."""
    timed(job, build)
