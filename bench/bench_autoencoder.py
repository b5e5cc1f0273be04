"""The encoder, a training step and the optimizer of a sparse autoencoder.

linear_topk against the dense layer alone and with torch.topk; a step (forward and backward) of the
autoencoder against the dense layer's forward pass alone; the Adam step on encoder and dictionary
against torch's fused Adam with the projection and the normalization as separate passes.
"""

from __future__ import annotations

import torch
from checkout import sparsekern, testing
from measure import forced
from problem import Problem, Tensors, worst_ratio
from targets import Workload

from sparsekern.models import SparseAutoencoder
from sparsekern.ops.adam import adam_step, adam_step_reference

OPS = ("linear_topk", "SparseAutoencoder", "adam_step")
F = torch.nn.functional


def build(workload: Workload) -> Problem:
    """The problem of one of the three."""
    builders = {"linear_topk": _encoder, "SparseAutoencoder": _step, "adam_step": _adam}
    return builders[workload.op](workload)


def _layer(workload: Workload) -> Tensors:
    """x [B, d], weight [n, d], bias [n]."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        made = torch.randn(*shape, generator=generator)
        return made.to(getattr(torch, workload.dtype)).to(workload.device)

    d = workload.d
    return normal(workload.rows, d), normal(workload.n, d) / d**0.5, normal(workload.n) / 10


def _encoder(workload: Workload) -> Problem:
    x, weight, bias = _layer(workload)
    k = workload.k

    def check(backend: str) -> float:
        """The values, sorted, against a float64 truth: products differ in their last bits."""
        with forced(backend):
            values = sparsekern.linear_topk(x, weight, bias, k, sorted=True, relu=False).values
        rows = slice(0, 64)
        truth = F.linear(x[rows].double(), weight.double(), bias.double()).topk(k).values
        plain = F.linear(x[rows], weight, bias).topk(k).values
        scale = F.linear(x[rows].abs(), weight.abs(), bias.abs()).amax(1, keepdim=True)
        return testing.error_ratio(values[rows], truth, plain, scale)

    return Problem(
        ours=lambda: sparsekern.linear_topk(x, weight, bias, k),
        peers={
            "F.linear": lambda: F.linear(x, weight, bias),
            "F.linear, torch.topk": lambda: F.linear(x, weight, bias).topk(k),
        },
        check=check,
        traffic=(x.numel() + weight.numel()) * x.element_size(),
        formula="x and weight read",
        roof="read",
        flops=2 * workload.rows * workload.n * workload.d,
    )


def _step(workload: Workload) -> Problem:
    x, weight, bias = _layer(workload)
    torch.manual_seed(0)
    model = SparseAutoencoder(workload.d, workload.n, workload.k).to(x.device)
    leaves = [model.encoder, model.encoder_bias, model.dictionary, model.decoder_bias]

    def ours() -> Tensors:
        return torch.autograd.grad(model.loss(x)[1].total, leaves)

    def check(backend: str) -> float:
        with forced(backend):
            actual = ours()
        with forced("reference"):
            plain = ours()
        twin = SparseAutoencoder(workload.d, workload.n, workload.k).double().to(x.device)
        twin.load_state_dict(model.state_dict())
        named = [twin.encoder, twin.encoder_bias, twin.dictionary, twin.decoder_bias]
        with forced("reference"):
            truth = torch.autograd.grad(twin.loss(x.double())[1].total, named)
        ratios = []
        for ours_, right, rough in zip(actual, truth, plain, strict=True):
            width = ours_.shape[-1]
            parts = [t.reshape(-1, width) for t in (ours_, right.view_as(ours_), rough)]
            ratios.append(worst_ratio(*parts, right.abs().amax().expand_as(parts[1])))
        return max(ratios)

    gradients = 2 * weight.numel() * weight.element_size()
    return Problem(
        ours=ours,
        peers={"F.linear forward": lambda: F.linear(x, weight, bias).detach()},
        check=check,
        traffic=2 * gradients,
        formula="both matrices read, both gradients written",
        roof="copy",
        flops=2 * workload.rows * workload.n * workload.d,
        grad=True,
    )


def _adam(workload: Workload) -> Problem:
    shape = (workload.n, workload.d)
    generator = torch.Generator().manual_seed(1)
    start = F.normalize(torch.randn(*shape, generator=generator), dim=1)
    grads = [torch.randn(*shape, generator=generator).to(workload.device) for _ in range(2)]
    mine = [[start.clone().to(workload.device), *torch.zeros(2, *shape)] for _ in range(2)]
    theirs = [torch.nn.Parameter(start.clone().to(workload.device)) for _ in range(2)]
    torchs = torch.optim.Adam(theirs, lr=1e-3, fused=True)

    def ours() -> None:
        for unit_rows, (parameter, mean, square), grad in zip(
            (False, True), mine, grads, strict=True
        ):
            adam_step(parameter, grad, mean, square, lr=1e-3, step=10, unit_rows=unit_rows)

    def separate() -> None:
        with torch.no_grad():
            for parameter, grad in zip(theirs, grads, strict=True):
                parameter.grad = grad
            dictionary = theirs[1]
            share = (grads[1] * dictionary).sum(1, keepdim=True)
            dictionary.grad = grads[1] - share * dictionary
            torchs.step()
            dictionary.div_(dictionary.norm(dim=1, keepdim=True))

    def check(backend: str) -> float:
        made = [start[:64].clone(), grads[1][:64].cpu(), *torch.zeros(2, 64, workload.d)]
        options = (1e-3, 0.9, 0.999, 1e-8, 0.0, 1, True)
        truth = [tensor.double() for tensor in made]
        plain = [tensor.clone() for tensor in made]
        actual = [tensor.clone().to(workload.device) for tensor in made]
        with forced(backend):
            adam_step(*actual, lr=1e-3, step=1, unit_rows=True)
        adam_step_reference(*truth, *options)
        adam_step_reference(*plain, *options)
        return testing.error_ratio(actual[0], truth[0], plain[0], truth[0].abs() + 1)

    elements = 2 * start.numel()
    return Problem(
        ours=ours,
        peers={"fused Adam, projection, normalization": separate},
        check=check,
        traffic=28 * elements,
        formula="four matrices read, three written, for encoder and dictionary",
        roof="copy",
    )


def test_autoencoder(job, timed):
    """One case and backend."""
    timed(job, build)
