"""topk and topk_mask against torch.topk, with a scatter where a dense row is wanted."""

from __future__ import annotations

from collections.abc import Callable

import torch

import sparsekern

from ... import testing
from ..problem import Problem, check_exact
from ..workload import Workload

OPS = ("topk", "topk_mask")
INDEX_BYTES = 8
ITSELF = "itself, normal data"


def make_rows(workload: Workload, fill: str) -> torch.Tensor:
    """X [rows, n] of the workload's dtype, filled as named."""
    dtype = getattr(torch, workload.dtype)
    if fill == "normal" and workload.device == "cuda":  # drawn there: faster than copying
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(workload.rows, workload.n, generator=generator, device="cuda")
        return x.to(dtype)
    return testing.fill_rows(fill, workload.rows, workload.n).to(dtype).to(workload.device)


def build(workload: Workload) -> Problem:
    """Make the problem of a top-k workload."""
    x = make_rows(workload, workload.fill)
    size, k = x.element_size(), workload.k
    codes = workload.rows * k * (size + INDEX_BYTES)
    if workload.op == "topk":
        return Problem(
            ours=lambda: sparsekern.topk(x, k),
            peers=_peers(workload, x),
            check=lambda backend: check_exact(
                str(workload), lambda: sparsekern.topk(x, k), backend
            ),
            traffic=x.numel() * size + codes,
            formula="x read once, values and indices written",
            roof="copy" if workload.device == "cuda" else "read",
        )
    return Problem(
        ours=lambda: sparsekern.topk_mask(x, k),
        peers={"torch.topk, scatter": lambda: _masked(x, k), "x.clone": x.clone},
        check=lambda backend: check_exact(
            str(workload), lambda: (sparsekern.topk_mask(x, k),), backend
        ),
        traffic=2 * x.numel() * size + codes,
        formula="x read once, the masked rows and their codes written",
        roof="copy",
    )


def _peers(workload: Workload, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    peers: dict[str, Callable[[], object]] = {
        "torch.topk": lambda: torch.topk(x, workload.k),
        "x.amax": lambda: x.amax(-1),
    }
    if workload.fill != "normal":
        plain = make_rows(workload, "normal")
        peers[ITSELF] = lambda: sparsekern.topk(plain, workload.k)
    return peers


def _masked(x: torch.Tensor, k: int) -> torch.Tensor:
    values, indices = torch.topk(x, k, sorted=False)
    return torch.zeros_like(x).scatter_(-1, indices, values)
