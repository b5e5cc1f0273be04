"""The torch operation linear_topk: shapes, gradient, batches, autocast, and what serves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from ...dispatch.dtensors import GROUPING, ROWS, Rows
from ...dispatch.fast_path import NOTHING, left_to_torch
from ...dispatch.operations import define, operations
from ..batching import one_by_one
from ..checks import check_count
from ..layout import matrix_of
from ..sparse_matmul.operation import sparse_matmul, sparse_matmul_backward
from ..topk import native as topk_native
from ..topk.operation import passed_by_relu
from ..transpose_codes.operation import transpose_codes
from . import native, screen, slices
from .checks import check_groups, check_latents, check_layer
from .reference import centred, linear_topk_reference, transposed
from .slices import (
    Layer,
    Selection,
    is_few,
    is_small,
    rows_at_once,
    select_at_once,
    select_rows,
)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    pre_bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    latents: torch.Tensor | None,
    groups: int,
    *_: Any,
) -> None:
    check_layer("linear_topk", x, weight, bias, pre_bias, scale, latents)
    width = weight.shape[0] if latents is None else latents.shape[0]
    k = check_count("linear_topk", "k", k, width, "the latents")
    check_groups("linear_topk", groups, k, width, latents)


def _triton_topk(*args: Any) -> Any:
    from ..topk import triton  # imported at the first call: the package may be missing

    return triton.topk(*args)


def _native_kernels() -> ModuleType:
    return native


def _triton_kernels() -> ModuleType:
    from . import triton  # as above

    return triton


def _slice_by_slice(
    select: Callable[..., Any],
    running: type[topk_native.RunningTopk] | None,
    screening_kernels: Callable[[], ModuleType],
    natively: bool,
) -> Callable[..., Any]:
    """Make the operation of a backend from its top-k of matrices, and of matrices in parts.

    screening_kernels: returns the backend's kernels of screen.py. natively: with the native kernel
    of few rows.
    """

    def run(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        k: int,
        pre_bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        latents: torch.Tensor | None,
        groups: int,
        relu: bool,
        sorted: bool,
        transpose: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        if x.numel() == 0:
            values, indices, offsets, positions = linear_topk_reference(
                x, weight, bias, k, pre_bias, scale, latents, groups, relu, sorted, transpose
            )
            return values.detach(), indices.detach(), offsets, positions
        check_latents(latents, weight.shape[0])
        rows = matrix_of(x).contiguous()
        if pre_bias is not None:  # `centred`, rounded on the way out
            rows = torch.sub(rows, pre_bias, out=torch.empty_like(rows))
        layer = Layer(weight, bias, scale, latents, rows.dtype)
        selection = Selection(k, groups, relu, sorted, select, running)
        few = None
        if natively and is_few(layer, rows, groups):
            few = native.few_rows_kernel(rows)
        if not is_small(layer, rows, groups):
            values, indices = _select_in_parts(layer, rows, selection, screening_kernels(), few)
        elif few is not None:
            values, indices = _select_few(few, layer, rows, selection)
        else:
            values, indices = select_at_once(layer, rows, selection)
        if latents is not None:
            indices = latents[indices]
        if x.dim() != 2:
            shape = (*x.shape[:-1], k)
            values, indices = values.view(shape).detach(), indices.view(shape).detach()
        return values, indices, *transposed(indices, weight.shape[0], transpose)

    return run


def _select_few(
    kernel: Callable[..., None], layer: Layer, rows: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of few rows [count, d], which their kernel serves."""
    bias, scale = (
        None if vector is None else vector.contiguous() for vector in (layer.bias, layer.scale)
    )
    k, _, relu, sorted, *_ = selection
    return native.few_rows(kernel, rows, layer.weight, bias, scale, k, sorted, relu)


def _select_in_parts(
    layer: Layer,
    rows: torch.Tensor,
    selection: Selection,
    kernels: ModuleType,
    few: Callable[..., None] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of rows [count, d], as many at a time as share a buffer.

    few: the kernel of few rows, where it serves.
    """
    values = rows.new_empty(len(rows), selection.k)
    indices = rows.new_empty(len(rows), selection.k, dtype=torch.int64)
    step = rows_at_once(rows.device, selection.k)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        codes = rows[part], selection, values[part], indices[part]
        if screen.select_rows(kernels, layer, *codes, few is not None):
            continue
        if few is not None:
            values[part], indices[part] = _select_few(few, layer, rows[part], selection)
        else:
            select_rows(layer, *codes)
    return values, indices


def _fake(
    x: Any,
    weight: Any,
    bias: Any,
    k: int,
    pre_bias: Any,
    scale: Any,
    latents: Any,
    groups: int,
    relu: bool,
    sorted: bool,
    transpose: bool,
) -> Any:
    values = x.new_empty(*x.shape[:-1], k)
    indices = values.new_empty(values.shape, dtype=torch.int64)
    offsets = indices.new_empty(weight.shape[0] + 1 if transpose else 0)
    positions = indices.new_empty(indices.numel() if transpose else 0, dtype=torch.int32)
    return values, indices, offsets, positions


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, _, pre_bias, scale, _, _, relu, _, ctx.transposed = inputs
    values, indices, *transposition = output
    ctx.mark_non_differentiable(indices, *transposition)
    passed = passed_by_relu(values) if relu else None
    if not ctx.needs_input_grad[5]:  # scale
        values = None
    ctx.save_for_backward(x, weight, bias, pre_bias, scale, values, passed, indices, *transposition)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
    *layer, values, passed, indices, offsets, positions = ctx.saved_tensors
    needed = [ctx.needs_input_grad[place] for place in (0, 1, 2, 4, 5)]
    transposition = (offsets, positions) if ctx.transposed else None
    d_x, d_weight, d_bias, d_pre_bias, d_scale = layer_gradients(
        grad, layer, values, passed, indices, transposition, needed
    )
    return d_x, d_weight, d_bias, None, d_pre_bias, d_scale, *[None] * 5


def layer_gradients(
    grad: torch.Tensor,
    layer: Sequence[Any],
    values: torch.Tensor | None,
    passed: torch.Tensor | None,
    indices: torch.Tensor,
    transposition: tuple[torch.Tensor, torch.Tensor] | None,
    needed: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Compute the gradients of a linear layer from those of its codes.

    Args:
        grad: [..., k], of the codes.
        layer: x, weight, bias, pre_bias, scale, the last three maybe None.
        values: the codes, for the gradient of scale.
        passed: bool [..., k], the codes that have a gradient; None stands for all of them.
        indices: [..., k].
        transposition: of the indices, where it is known.
        needed: for each tensor of the layer, whether it needs a gradient.
    """
    x, weight, bias, pre_bias, scale = layer
    need_x, need_weight, need_bias, need_pre_bias, need_scale = needed
    d_x = d_weight = d_bias = d_pre_bias = d_scale = None
    # Without d_x, whose rows would only be summed, and with so many codes, each row of weight is
    # read once, not once for each of its codes.
    by_latent = need_pre_bias and not need_x and indices.numel() >= weight.shape[0]
    if transposition is None and (need_weight or need_bias or need_scale or by_latent):
        transposition = transpose_codes(indices, weight.shape[0])
    grouping = (None, None) if transposition is None else transposition

    def sum_per_latent(
        terms: torch.Tensor, features: torch.Tensor, like: torch.Tensor
    ) -> torch.Tensor:
        _, sums = sparse_matmul_backward(features, terms, indices, like, False, True, *grouping)
        return sums

    def sum_scalars_per_latent(terms: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        ones = terms.new_ones(*terms.shape[:-1], 1)
        return sum_per_latent(terms, ones, like.unsqueeze(1)).squeeze(1)

    g = grad if passed is None else torch.where(passed, grad, 0)
    if need_scale:
        factors = scale[indices]
        if passed is not None:  # a score of scale zero is zero, and has no gradient
            factors = torch.where(passed, factors, 1)
        d_scale = sum_scalars_per_latent((g * (values / factors)).to(x.dtype), scale)
    if scale is not None:
        g = (g * scale[indices]).to(x.dtype)
    if need_weight:
        d_weight = sum_per_latent(g, centred(x, pre_bias), weight)
    if need_bias:
        d_bias = sum_scalars_per_latent(g, bias)
    if by_latent:
        sums = sum_scalars_per_latent(g, weight[:, 0]) if d_bias is None else d_bias
        d_pre_bias = -torch.mv(weight.t(), sums).to(pre_bias.dtype)
    elif need_x or need_pre_bias:
        d_x = sparse_matmul(g, indices, weight, None, *grouping)
        if need_pre_bias:
            d_pre_bias = -matrix_of(d_x).sum(0, dtype=pre_bias.dtype)
    return [d_x if need_x else None, d_weight, d_bias, d_pre_bias, d_scale]


def autocast_layer(args: Any, dtype: torch.dtype) -> Any:
    """Cast x, and a weight that is neither float32 nor of the dtype, with its vectors.

    args: x, weight, bias, k, pre_bias, scale and any more, which stay as they are.
    """
    x, weight, bias, k, pre_bias, scale, *rest = args
    if torch.float64 in (x.dtype, weight.dtype):  # as torch.matmul: autocast leaves float64 alone
        return args
    if weight.dtype not in (torch.float32, dtype):
        weight, bias, pre_bias, scale = (
            None if tensor is None else tensor.to(dtype)
            for tensor in (weight, bias, pre_bias, scale)
        )
    return x.to(dtype), weight, bias, k, pre_bias, scale, *rest


linear_topk = define(
    "linear_topk",
    "(Tensor x, Tensor weight, Tensor? bias, SymInt k, Tensor? pre_bias, Tensor? scale,"
    " Tensor? latents, SymInt groups, bool relu, bool sorted, bool transpose)"
    " -> (Tensor values, Tensor indices, Tensor offsets, Tensor positions)",
    reference=linear_topk_reference,
    implementations={
        "native": _slice_by_slice(topk_native.topk, topk_native.RunningTopk, _native_kernels, True),
        "triton": _slice_by_slice(_triton_topk, None, _triton_kernels, False),
    },
    fake=_fake,
    check=_check,
    setup_context=_setup,
    backward=_backward,
    vmap=one_by_one,
    autocast=autocast_layer,
    owned=True,
    rows=Rows((0,), (ROWS, ROWS, GROUPING, GROUPING)),
)
_operation = operations["linear_topk"]
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def quick_linear_topk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    relu: bool,
    sorted: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return values and indices where nothing but the kernel of few rows is needed; else None.

    The arguments need not be checked: what is not right is left to other ways. All of a small call
    takes some microseconds, of which each check here is a few hundredths.
    """
    if bias is None:
        if left_to_torch((x, weight)) != NOTHING:
            return None
    elif left_to_torch((x, weight, bias)) != NOTHING or type(bias) not in _PLAIN:
        return None
    if not (type(k) is int and type(x) in _PLAIN and type(weight) in _PLAIN):
        return None
    if not (x.is_cpu and weight.is_cpu and _operation.runs_natively(x)):
        return None
    shape = weight.shape
    if len(shape) != 2 or not (x.dtype == torch.float32 == weight.dtype):
        return None
    n, d = shape
    elements = x.numel()
    if not (0 < k <= n and x.dim() and x.shape[-1] == d and 0 < elements <= slices.FEW_ROWS * d):
        return None
    if not (elements * n < slices.SMALL_TERMS and x.is_contiguous() and weight.is_contiguous()):
        return None
    if bias is not None and not (
        bias.is_cpu and bias.dtype == torch.float32 and bias.shape == (n,) and bias.is_contiguous()
    ):
        return None
    kernel = native.few_rows_kernel(x)
    if kernel is None:
        return None
    return native.few_rows(kernel, x, weight, bias, None, k, sorted, relu)
