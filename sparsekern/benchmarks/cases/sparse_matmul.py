"""sparse_matmul and its gradients against embedding_bag, and against dense products on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import sparsekern

from ... import testing
from ..problem import Problem, Tensors, worst_ratio
from ..timing import forced
from ..workload import Workload

OPS = ("sparse_matmul",)
INDEX_BYTES = 8
# Products of float64 kept at once while checking: 256 MiB.
CHECKED_AT_ONCE = 2**25

# (values [rows, k], indices [rows, k], weight [n, d]) -> [rows, d]
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Operands:
    """Codes, a dictionary and an upstream gradient.

    values, indices [rows, k]; parameter [n, d], or [d, n] when the layout is column-major, as of an
    nn.Linear; grad [rows, d].
    """

    values: torch.Tensor
    indices: torch.Tensor
    parameter: torch.Tensor
    grad: torch.Tensor
    layout: str

    def weight(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the dictionary [n, d] as a view of the parameter."""
        return parameter.t() if self.layout == "column-major" else parameter

    def wide(self, columns: slice) -> Operands:
        """Return some columns of the same in float64, row-major."""
        weight = self.weight(self.parameter)[:, columns].double().contiguous()
        grad = self.grad[:, columns].double()
        return Operands(self.values.double(), self.indices, weight, grad, "row-major")

    def magnitudes(self) -> Operands:
        """Return the same with absolute values."""
        floats = (self.values.abs(), self.parameter.abs(), self.grad.abs())
        return Operands(floats[0], self.indices, floats[1], floats[2], self.layout)


def make_operands(workload: Workload) -> Operands:
    """Random codes, dictionary and upstream gradient."""
    case = testing.ProductCase(
        str(workload), workload.rows, workload.k, workload.n, workload.d, workload.layout
    )
    dtype = getattr(torch, workload.dtype)
    values, indices, weight, _ = case.make(dtype, device=workload.device)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(workload.rows, workload.d, generator=generator).to(dtype)
    parameter = weight.t() if workload.layout == "column-major" else weight
    return Operands(values, indices, parameter, grad.to(workload.device), workload.layout)


def caller(operands: Operands, product: Product, mode: str) -> Callable[[], Tensors]:
    """Make a call that runs a product forward, its gradients, or both; gradients are fresh."""
    if mode == "forward":
        weight = operands.weight(operands.parameter)
        return lambda: (product(operands.values, operands.indices, weight),)
    values = operands.values.detach().requires_grad_()
    parameter = operands.parameter.detach().requires_grad_()

    def forward() -> torch.Tensor:
        return product(values, operands.indices, operands.weight(parameter))

    if mode == "backward":
        out = forward()
        return lambda: torch.autograd.grad(
            out, (values, parameter), operands.grad, retain_graph=True
        )

    def both() -> Tensors:
        out = forward()
        return out.detach(), *torch.autograd.grad(out, (values, parameter), operands.grad)

    return both


def _embedding_bag(
    values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    return F.embedding_bag(indices, weight, mode="sum", per_sample_weights=values)


def _embedding_bag_of_copy(
    values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    return _embedding_bag(values, indices, weight.contiguous())


def check(workload: Workload, operands: Operands, backend: str) -> float:
    """Return the worst error ratio over the output and the gradients of a backend.

    The float64 truth and the magnitudes are made for some columns at a time, which bounds the
    memory: columns are independent, but for the gradient of the values, which sums over them.
    """
    mode = workload.mode
    names = {"forward": ("out",), "backward": ("values", "weight")}.get(
        mode, ("out", "values", "weight")
    )
    results = []
    for one in (backend, "reference"):
        with forced(one):
            outputs = caller(operands, sparsekern.sparse_matmul, mode)()
        found = dict(zip(names, outputs, strict=True))
        if "weight" in found:
            found["weight"] = operands.weight(found["weight"])
        results.append(found)
    actual, reference = results
    worst, sums = 0.0, [torch.zeros((), device=operands.values.device)] * 2
    width = max(1, CHECKED_AT_ONCE // operands.values.numel())
    for start in range(0, workload.d, width):
        columns = slice(start, start + width)
        part = operands.wide(columns)
        with forced("reference"):
            pair = [
                dict(zip(names, caller(which, sparsekern.sparse_matmul, mode)(), strict=True))
                for which in (part, part.magnitudes())
            ]
        for name in {"out", "weight"} & set(names):
            got, plain = actual[name][:, columns], reference[name][:, columns]
            worst = max(worst, worst_ratio(got, pair[0][name], plain, pair[1][name]))
        if "values" in names:
            sums = [total + found["values"] for total, found in zip(sums, pair, strict=True)]
    if "values" in names:
        ratio = worst_ratio(actual["values"], sums[0], reference["values"], sums[1])
        worst = max(worst, ratio)
    return worst


def build(workload: Workload) -> Problem:
    """Make the problem of a sparse product."""
    operands = make_operands(workload)
    mode = workload.mode
    traffic, formula = _traffic(workload, operands.values.element_size())
    products = {"forward": 2, "backward": 4, "forward+backward": 6}[mode]
    return Problem(
        ours=caller(operands, sparsekern.sparse_matmul, mode),
        peers=_dense_peers(operands) if workload.device == "cuda" else _bag_peers(operands, mode),
        check=lambda backend: check(workload, operands, backend),
        traffic=traffic,
        formula=formula,
        roof="copy",
        flops=products * workload.rows * workload.k * workload.d,
        grad=mode != "forward",
    )


def _bag_peers(operands: Operands, mode: str) -> dict[str, Callable[[], object]]:
    if operands.layout == "column-major":
        copied = caller(operands, _embedding_bag_of_copy, mode)
        return {"embedding_bag of a row-major copy": copied}
    return {"embedding_bag": caller(operands, _embedding_bag, mode)}


def _dense_peers(operands: Operands) -> dict[str, Callable[[], object]]:
    """Products of codes that are dense already: writing them out is not counted against torch."""
    weight = operands.weight(operands.parameter)
    codes = operands.values.new_zeros(len(operands.values), len(weight))
    codes.scatter_add_(-1, operands.indices, operands.values)

    def two_products() -> Tensors:
        return operands.grad @ weight.t(), codes.t() @ operands.grad

    return {"dense product": lambda: codes @ weight, "two dense products": two_products}


def _traffic(workload: Workload, size: int) -> tuple[int, str]:
    """Bytes that move, and the formula, for elements of `size` bytes."""
    rows, k, n, d = workload.rows, workload.k, workload.n, workload.d
    codes = rows * k * (size + INDEX_BYTES)
    forward = codes + rows * k * d * size + rows * d * size
    used = min(n, rows * k)
    backward = codes + rows * k * d * size + (used + n) * d * size + rows * k * size
    forward_text = "codes, a weight row per code, the output"
    backward_text = (
        "codes, an upstream row per code, each used weight row once, both gradients written"
    )
    return {
        "forward": (forward, forward_text),
        "backward": (backward, backward_text),
        "forward+backward": (forward + backward, f"{forward_text}; {backward_text}"),
    }[workload.mode]
