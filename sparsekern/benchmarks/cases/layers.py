"""The TopK layer, forward and backward, against the same layer written with torch.topk."""

from __future__ import annotations

import torch

import sparsekern

from ..problem import Problem, Tensors, check_exact
from ..workload import Workload
from .topk import make_rows

OPS = ("TopK",)


def build(workload: Workload) -> Problem:
    """Make the problem of one training step's share of a TopK layer."""
    x = make_rows(workload, workload.fill).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(x.shape, generator=generator).to(x.dtype).to(workload.device)
    layer = sparsekern.TopK(workload.k)

    def ours() -> Tensors:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, x, upstream)

    def by_torch() -> Tensors:
        values, indices = torch.topk(x, workload.k, sorted=False)
        y = torch.zeros_like(x).scatter(-1, indices, values.relu())
        return y.detach(), *torch.autograd.grad(y, x, upstream)

    return Problem(
        ours=ours,
        peers={"torch.topk, relu, scatter": by_torch},
        check=lambda backend: check_exact(str(workload), ours, backend),
        traffic=3 * x.numel() * x.element_size(),
        formula="x read once, y and the gradient of x written",
        roof="copy",
        grad=True,
    )
