"""The bottleneck of Sparling: thresholds per channel, the layer in training, the sparse 1x1
convolution after it; against plain PyTorch.

A workload has `rows` batch entries of `channels` at `positions`; the layout "column-major" is
channels first.
"""

from __future__ import annotations

import copy
import math

import torch
from measuring.checkout import sparsekern, testing

from sparsekern.benchmarks.problem import Problem, Tensors, check_exact
from sparsekern.benchmarks.timing import forced
from sparsekern.benchmarks.workload import Workload

OPS = ("channel_threshold", "SpatialSparsity", "pointwise_conv")
F = torch.nn.functional


def build(workload: Workload) -> Problem:
    """The problem of an operation or of the layer."""
    builders = {"channel_threshold": _threshold, "SpatialSparsity": _layer}
    return builders.get(workload.op, _convolution)(workload)


def _input(workload: Workload) -> tuple[torch.Tensor, int]:
    """Normal activations and the dimension of their channels."""
    generator = torch.Generator().manual_seed(1)
    first = workload.layout == "column-major"
    rows, channels, positions = workload.rows, workload.channels, workload.positions
    side = math.isqrt(positions)
    shape = (rows, channels, side, positions // side) if first else (rows * positions, channels)
    x = torch.randn(shape, generator=generator).to(getattr(torch, workload.dtype))
    return x.to(workload.device), 1 if first else -1


def _kth(x: torch.Tensor, density: float, dim: int) -> torch.Tensor:
    columns = x.movedim(dim, -1).reshape(-1, x.shape[dim])
    return columns.kthvalue(max(1, int(len(columns) * (1 - density))), dim=0).values


def _threshold(workload: Workload) -> Problem:
    x, dim = _input(workload)
    density = workload.density

    def ours() -> torch.Tensor:
        return sparsekern.channel_threshold(x, density, channel_dim=dim)

    return Problem(
        ours=ours,
        peers={"torch.kthvalue": lambda: _kth(x, density, dim)},
        check=lambda backend: check_exact(str(workload), lambda: (ours(),), backend),
        traffic=x.numel() * x.element_size(),
        formula="x read once",
        roof="read",
    )


class _Plain(torch.nn.Module):
    """The layer in torch's own operations."""

    def __init__(self, layer: sparsekern.SpatialSparsity, dim: int) -> None:
        super().__init__()
        self.layer, self.dim = layer, dim
        self.threshold = torch.zeros_like(layer.threshold)

    def excess(self, x: torch.Tensor) -> torch.Tensor:
        """What each normalised activation exceeds its threshold by."""
        layer = self.layer
        z = F.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, True, 0.1
        )
        with torch.no_grad():
            self.threshold.lerp_(_kth(z, layer.density, self.dim), layer.momentum)
        spread = self.threshold if self.dim == -1 else self.threshold.view(-1, 1, 1)
        return z - spread

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.excess(x).relu()


def _layer(workload: Workload) -> Problem:
    x, dim = _input(workload)
    x.requires_grad_()
    upstream = torch.randn_like(x)
    layer = sparsekern.SpatialSparsity(workload.channels, workload.density, channel_dim=dim)
    layer = layer.to(workload.device)
    plain = _Plain(layer, dim)

    def differentiated(
        module: torch.nn.Module, x: torch.Tensor, of_y: torch.Tensor = upstream
    ) -> Tensors:
        y = module(x)
        return y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), of_y.to(y.dtype))

    def check(backend: str) -> float:
        """Against plain PyTorch in float64, from the same thresholds."""
        layer.threshold.zero_()
        exact, near = (_Plain(module, dim) for module in (copy.deepcopy(layer).double(), layer))
        wide = x.detach().double().requires_grad_()
        # Close to the threshold rounding decides whether a gradient passes.
        clear = upstream * (exact.excess(wide).detach().abs() > 1e-5)
        exact.threshold.zero_()
        truth = differentiated(exact, wide, clear)
        with forced(backend):
            found = differentiated(layer, x, clear)
        # What is kept is a difference of two numbers of about 4.
        return max(
            testing.error_ratio(one, right, other, 4 + right.abs().max())
            for one, right, other in zip(found, truth, differentiated(near, x, clear), strict=True)
        )

    return Problem(
        ours=lambda: differentiated(layer, x),
        peers={"batch_norm, kthvalue, relu": lambda: differentiated(plain, x)},
        check=check,
        traffic=4 * x.numel() * x.element_size(),
        formula="x, y, the gradient of y and that of x moved once",
        roof="copy",
        grad=True,
    )


def _convolution(workload: Workload) -> Problem:
    x, _ = _input(workload)
    generator = torch.Generator().manual_seed(2)
    x = x.abs() * (torch.rand(x.shape, generator=generator) < workload.density).to(x.device)
    indices = x.flatten().nonzero().flatten()
    values = x.flatten()[indices].requires_grad_()
    weight = torch.randn(workload.outputs, workload.channels, 1, 1, generator=generator)
    weight = weight.to(x).requires_grad_()
    bias = torch.randn(workload.outputs, generator=generator).to(x).requires_grad_()
    x.requires_grad_()
    upstream = torch.randn(x.shape[0], workload.outputs, *x.shape[2:], generator=generator).to(x)

    def ours() -> Tensors:
        out = sparsekern.pointwise_conv(values, indices, x.shape, weight, bias)
        return out.detach(), *torch.autograd.grad(out, (values, weight, bias), upstream)

    def by_torch() -> Tensors:
        out = F.conv2d(x, weight, bias)
        return out.detach(), *torch.autograd.grad(out, (x, weight, bias), upstream)

    def check(backend: str) -> float:
        with forced("reference"):
            plain = ours()
        with forced(backend):
            found = ours()
        # A sum of 10^5 terms in float32, in another order.
        return max(
            float((one - other).abs().max() / other.abs().max()) / 1e-5
            for one, other in zip(found, plain, strict=True)
        )

    return Problem(
        ours=ours,
        peers={"F.conv2d": by_torch},
        check=check,
        traffic=2 * upstream.numel() * x.element_size(),
        formula="the output written, its gradient read",
        roof="copy",
        grad=True,
    )


def test_threshold(job, timed):
    """One case and backend."""
    timed(job, build)
