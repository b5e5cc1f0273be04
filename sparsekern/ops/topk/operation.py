"""The torch operations of top-k: shapes, gradients, batches, and the kernels that serve them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.autograd import CAN_RECORD, recording_call
from ...dispatch.dtensors import ROWS, SUM, Rows
from ...dispatch.fast_path import MORE, NOTHING, left_to_torch_of
from ...dispatch.operations import define, operations
from ..batching import counted_rows
from ..checks import LONGEST_ROW, check_count, check_row
from ..codes_to_dense.operation import codes_to_dense
from . import native
from .reference import topk_mask_reference, topk_reference

# -- kernels take matrices -------------------------------------------------------------------------


def _triton_module() -> Any:
    from . import triton  # imported at the first call that it serves: the package may be missing

    return triton


def _adapt(
    kernel: Callable[..., Any], reference: Callable[..., Any], name: str, *, any_dimensions: bool
) -> Callable[..., Any]:
    """Adapt a kernel of non-empty matrices to any leading dimensions.

    any_dimensions: the kernel takes leading dimensions itself where x is contiguous.
    """

    def run(x: torch.Tensor, k: int, *options: Any) -> Any:
        if x.numel() == 0 or k == 0:
            return reference(x, k, *options)
        check_count(name, "k", k, x.shape[-1], "the size of the last dimension")
        check_row(name, x, x.shape[-1])
        if x.dim() == 2 or (any_dimensions and x.is_contiguous()):
            return kernel(x, k, *options)
        *matrices, counts = kernel(x.reshape(-1, x.shape[-1]), k, *options)
        return *(t.view(*x.shape[:-1], t.shape[-1]).detach() for t in matrices), counts

    return run


# -- shapes without data ---------------------------------------------------------------------------


def _topk_fake(
    x: torch.Tensor,
    k: int,
    sorted: bool,
    relu: bool,
    abs: bool,
    count: bool,
    smallest: bool = False,
) -> Any:
    values = x.new_empty(*x.shape[:-1], k)
    counts = x.new_empty(x.shape[-1] if count else 0, dtype=torch.int64)
    return values, torch.empty_like(values, dtype=torch.int64), counts


def _topk_mask_fake(x: torch.Tensor, k: int, relu: bool, abs: bool, count: bool) -> Any:
    return x.new_empty(x.shape), *_topk_fake(x, k, False, relu, abs, count)


# -- gradients, shared by every backend ------------------------------------------------------------


def _setup_topk(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, _, relu, *_ = inputs
    values, indices, *_ = output
    ctx.n = x.shape[-1]
    ctx.set_materialize_grads(False)  # of indices and counts there are none
    ctx.save_for_backward(indices, passed_by_relu(values) if relu else None)


def _topk_backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> Any:
    if grad is None:
        return None, None, None, None, None, None, None
    indices, passed = ctx.saved_tensors
    return _grad_to_dense(grad, indices, passed, ctx.n), None, None, None, None, None, None


def _setup_topk_mask(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, relu, _, _ = inputs
    _, values, indices, _ = output
    ctx.n = x.shape[-1]
    ctx.save_for_backward(indices, passed_by_relu(values) if relu else None)


def _topk_mask_backward(
    ctx: Any, grad_masked: torch.Tensor, grad_values: torch.Tensor, *_: Any
) -> Any:
    indices, passed = ctx.saved_tensors
    grad = grad_masked.gather(-1, indices) + grad_values
    return _grad_to_dense(grad, indices, passed, ctx.n), None, None, None, None


def passed_by_relu(values: torch.Tensor) -> torch.Tensor:
    """Return True for the values after ReLU that have a gradient: those above zero, and NaN.

    Backward passes save this instead of the values, which the caller may change in place.
    """
    return values != 0


def _grad_to_dense(
    grad: torch.Tensor, indices: torch.Tensor, passed: torch.Tensor | None, n: int
) -> torch.Tensor:
    if passed is not None:  # ReLU: values that ended at zero have no gradient
        grad = torch.where(passed, grad, 0)
    return codes_to_dense(grad, indices, n)


def _topk_vmap(
    operation: Callable[..., Any],
    info: Any,
    in_dims: Any,
    x: torch.Tensor,
    k: int,
    sorted: bool,
    relu: bool,
    abs: bool,
    count: bool,
    smallest: bool = False,
) -> Any:
    def select(*args: Any) -> Any:
        return operation(*args, smallest)

    return counted_rows(select, info, in_dims, x, k, sorted, relu, abs, count)


topk = define(
    "topk",
    # smallest came later: programs exported before have none
    "(Tensor x, SymInt k, bool sorted, bool relu, bool abs, bool count, bool smallest=False)"
    " -> (Tensor values, Tensor indices, Tensor counts)",
    reference=topk_reference,
    implementations={
        "native": _adapt(native.topk, topk_reference, "topk", any_dimensions=True),
        "triton": _adapt(
            lambda *args: _triton_module().topk(*args), topk_reference, "topk", any_dimensions=False
        ),
    },
    fake=_topk_fake,
    setup_context=_setup_topk,
    backward=_topk_backward,
    vmap=_topk_vmap,
    owned=True,
    rows=Rows((0,), (ROWS, ROWS, SUM)),
)
_operation = operations["topk"]
_recorded_codes = None
if CAN_RECORD:
    _recorded_codes = recording_call("topk", native.topk_codes, _topk_backward, _setup_topk)


def quick_topk(
    x: torch.Tensor, k: int, sorted: bool, relu: bool, abs: bool, smallest: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return values and indices where nothing but the native kernel is needed; else None.

    The arguments need not be checked: what is not right is left to other ways.
    """
    if type(k) is not int or not isinstance(x, torch.Tensor):
        return None
    left = left_to_torch_of(x)
    if left == MORE or not _operation.runs_natively(x):
        return None
    shape = x.shape
    if not (shape and 0 < k <= shape[-1] <= LONGEST_ROW and x.numel()):
        return None
    if len(shape) != 2 and not x.is_contiguous():
        return None
    if left == NOTHING:
        return native.topk_codes(x, k, sorted, relu, abs, smallest)
    if _recorded_codes is None:
        return None
    values, indices = _recorded_codes(x, k, sorted, relu, abs, smallest)
    return values, indices


topk_mask = define(
    "topk_mask",
    "(Tensor x, SymInt k, bool relu, bool abs, bool count)"
    " -> (Tensor masked, Tensor values, Tensor indices, Tensor counts)",
    reference=topk_mask_reference,
    implementations={
        "native": _adapt(native.topk_mask, topk_mask_reference, "topk_mask", any_dimensions=True),
        "triton": _adapt(
            lambda *args: _triton_module().topk_mask(*args),
            topk_mask_reference,
            "topk_mask",
            any_dimensions=False,
        ),
    },
    fake=_topk_mask_fake,
    setup_context=_setup_topk_mask,
    backward=_topk_mask_backward,
    vmap=counted_rows,
    owned=True,
    rows=Rows((0,), (ROWS, ROWS, ROWS, SUM)),
)
