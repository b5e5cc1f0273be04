"""The torch operation batch_topk: shapes, gradient, batches, and what serves it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.operations import define
from ..batching import one_by_one
from ..checks import check_row
from ..codes_to_dense import native as codes_to_dense_native
from ..topk import native as topk_native
from ..topk.operation import passed_by_relu
from .candidates import largest
from .reference import batch_topk_reference


def _native_kernels() -> tuple[Any, Any]:
    return topk_native.topk, codes_to_dense_native.codes_to_dense


def _triton_kernels() -> tuple[Any, Any]:
    # Imported at the first call that it serves: the package may be missing.
    from ..codes_to_dense import triton as codes_to_dense_triton
    from ..topk import triton as topk_triton

    return topk_triton.topk, codes_to_dense_triton.codes_to_dense


def _from_candidates(kernels: Callable[[], tuple[Any, Any]]) -> Callable[..., Any]:
    """Make the operation of a backend from its top-k and codes_to_dense of matrices."""

    def run(x: torch.Tensor, total: int, relu: bool) -> Any:
        if x.numel() == 0:
            return batch_topk_reference(x, total, relu)
        if not 0 < total <= x.numel():
            raise ValueError(
                f"batch_topk: total must lie in 1..{x.numel()} (the size of x), got {total}"
            )
        check_row("batch_topk", x, x.shape[-1])
        select, to_dense = kernels()
        rows = x.reshape(-1, x.shape[-1])
        values, positions = largest(rows, total, select)
        if relu:
            values = torch.where(values <= 0, 0, values)
        # Zeros by way of a code of value 0 per row: the kernel takes a fifth of torch.zeros' time.
        zero_codes = torch.zeros(len(rows), 1, dtype=torch.int64, device=x.device)
        masked = to_dense(zero_codes.to(x.dtype), zero_codes, x.shape[-1])
        masked.view(-1)[positions] = values
        return masked.view(x.shape), values, positions

    return run


def _fake(x: torch.Tensor, total: int, relu: bool) -> Any:
    values = x.new_empty(total)
    return x.new_empty(x.shape), values, torch.empty_like(values, dtype=torch.int64)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, relu = inputs
    _, values, positions = output
    ctx.shape = x.shape
    ctx.mark_non_differentiable(positions)
    ctx.save_for_backward(positions, passed_by_relu(values) if relu else None)


def _backward(ctx: Any, grad_masked: torch.Tensor, grad_values: torch.Tensor, *_: Any) -> Any:
    positions, passed = ctx.saved_tensors
    grad = grad_masked.reshape(-1)[positions] + grad_values
    if passed is not None:  # ReLU: values that ended at zero have no gradient
        grad = torch.where(passed, grad, 0)
    dense = grad.new_zeros(math.prod(ctx.shape)).scatter(0, positions, grad)
    return dense.view(ctx.shape), None, None


batch_topk = define(
    "batch_topk",
    "(Tensor x, SymInt total, bool relu) -> (Tensor masked, Tensor values, Tensor positions)",
    reference=batch_topk_reference,
    implementations={
        "native": _from_candidates(_native_kernels),
        "triton": _from_candidates(_triton_kernels),
    },
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=one_by_one,
)
