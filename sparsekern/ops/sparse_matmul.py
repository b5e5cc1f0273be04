"""Sparse codes times a dense dictionary, and its gradients.

Definition, with S the codes written as a dense [B, N] matrix (duplicate indices add up):

    out = S @ weight + bias            out[b] = bias + sum_j values[b, j] * weight[indices[b, j]]

Gradients, with g = d loss / d out:

    d values[b, j] = g[b] . weight[indices[b, j]]
    d weight[i]    = sum over codes (b, j) with index i of values[b, j] * g[b]
    d bias         = sum_b g[b]

Both are bilinear in (values, weight, g), so their own gradients are the same two operations again.

All of them need the codes grouped by latent: their transposition. It is built when it is needed, or
once by `transpose_codes` for every gradient of a training step that shares these indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..dispatch import library
from .checks import (
    check_codes,
    check_floating,
    check_like,
    check_range,
    check_same_device,
    check_weight_dtype,
)
from .transposition import Transposition, check_grouped, check_grouping, check_transposition


def sparse_matmul(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transposition: Transposition | None = None,
) -> torch.Tensor:
    """Return (codes as a dense [..., N] matrix) @ weight + bias, touching only the active rows of
    weight.

    Equivalent PyTorch::

        out = (values.unsqueeze(-1) * weight[indices]).sum(-2) + bias

    Args:
        values: [..., K] float32, bfloat16, float16 or float64.
        indices: [..., K] int64 or int32, in 0..N-1; duplicates in a row add up.
        weight: [N, D], of values' dtype, or float32 with bfloat16 or float16 values. The transposed
            view of an ``nn.Linear(N, D).weight`` is read in place, and its gradient comes back in
            the same layout.
        bias: [D] of weight's dtype, or None.
        transposition: of these very indices, from `transpose_codes`; spares the backward pass its
            own. None builds it there.

    Returns:
        [..., D] of values' dtype, differentiable (twice and more) with respect to values, weight
        and bias.

    Raises:
        TypeError: a dtype that does not fit.
        ValueError: shapes or devices that do not fit.
        IndexError: an index outside 0..N-1 (on the CPU; on other devices only with
            SPARSEKERN_DEBUG=1, where such codes contribute nothing otherwise).

    Note:
        Sums run in float32 (float64 for float64). The weight gradient and the value gradient come
        from one latent-major pass over a counting-sort transposition of the codes, without float
        atomics: the same bits for every thread count and run. Memory: O(B K) integers, never [B, K,
            D] or [B, N]. Under autocast the values
        are cast and the weight is read as it is.

    Example:
        >>> import torch, sparsekern
        >>> values, indices = torch.tensor([[2.0, 1.0]]), torch.tensor([[0, 2]])
        >>> sparsekern.sparse_matmul(values, indices, torch.eye(3)).tolist()
        [[2.0, 0.0, 1.0]]
    """
    check_codes("sparse_matmul", values, indices)
    _check_dictionary(values, weight, bias)
    check_transposition("sparse_matmul", transposition, indices, weight.shape[0])
    return _sparse_matmul(values, indices, weight, bias, *(transposition or (None, None)))


def _check_dictionary(
    values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    op = "sparse_matmul"
    check_floating(op, "values", values)
    check_floating(op, "weight", weight)
    if bias is not None:
        check_floating(op, "bias", bias)
    if weight.dim() != 2:
        raise ValueError(
            f"{op}: weight must be [latents, features], got shape {list(weight.shape)}"
        )
    check_same_device(op, values=values, weight=weight, bias=bias)
    check_weight_dtype(op, values, weight, "values", "values'", "16-bit values")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"{op}: bias must be [{weight.shape[1]}], got {list(bias.shape)}")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"{op}: bias must have weight's dtype {weight.dtype}, got {bias.dtype}")


# -- reference -------------------------------------------------------------------------------------


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which operations on this one accumulate."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sparse_matmul_reference(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *_transposition: Any,
) -> torch.Tensor:
    check_range("sparse_matmul", indices, weight.shape[0])
    wide = sum_dtype(values.dtype)
    out = torch.einsum("...k,...kd->...d", values.to(wide), weight[indices.long()].to(wide))
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(values.dtype).contiguous()


def sparse_matmul_backward_reference(
    grad: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    need_values: bool,
    need_weight: bool,
    *_transposition: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    n, d = weight.shape
    check_range("sparse_matmul", indices, n)
    wide = sum_dtype(values.dtype)
    grad_values, grad_weight = values.new_empty(0), weight.new_empty(0)
    if need_values:
        gathered = weight[indices.long()].to(wide)
        grad_values = torch.einsum("...d,...kd->...k", grad.to(wide), gathered)
        grad_values = grad_values.to(values.dtype).contiguous()
    if need_weight:
        terms = torch.einsum("...k,...d->...kd", values.to(wide), grad.to(wide))
        terms = matrix_of(terms)
        grad_weight = empty_like_dictionary(weight)
        grad_weight.copy_(terms.new_zeros(n, d).index_add(0, indices.reshape(-1).long(), terms))
    return grad_values, grad_weight


def matrix_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor [..., d] as [rows, d]; d may be 0, of which reshape(-1, d) makes nothing."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def empty_like_dictionary(
    weight: torch.Tensor, new: Callable[..., torch.Tensor] = torch.Tensor.new_empty
) -> torch.Tensor:
    """An empty tensor in weight's layout: column-major for a transposed view, else row-major; made
    by new(weight, *shape)."""
    n, d = weight.shape
    if column_major(weight):
        return new(weight, d, n).t()
    return new(weight, n, d)


def column_major(weight: torch.Tensor) -> bool:
    """True for the transposed view of a row-major [D, N] matrix, as of an nn.Linear(N,
    D).weight."""
    return weight.stride(0) == 1 and weight.stride(1) >= weight.shape[0] and weight.shape[1] > 1


# -- shapes without data ---------------------------------------------------------------------------


def _fake(values: Any, indices: Any, weight: Any, bias: Any, *_transposition: Any) -> torch.Tensor:
    return values.new_empty(*values.shape[:-1], weight.shape[1])


def _backward_fake(
    grad: Any,
    values: Any,
    indices: Any,
    weight: Any,
    need_values: bool,
    need_weight: bool,
    *_transposition: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_values = values.new_empty(values.shape if need_values else 0)
    return grad_values, empty_like_dictionary(weight) if need_weight else weight.new_empty(0)


# -- what torch.ops hands over ---------------------------------------------------------------------


def _check(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> None:
    check_codes("sparse_matmul", values, indices)
    _check_dictionary(values, weight, bias)
    if offsets is not None and positions is not None:
        check_grouping("sparse_matmul", offsets, positions, indices, weight.shape[0])


def _check_backward(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor, *_: Any
) -> None:
    _check(values, indices, weight, None)
    check_like("sparse_matmul", "grad", grad, values, (*values.shape[:-1], weight.shape[1]))


# -- kernels take matrices -------------------------------------------------------------------------


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous matrix of a tensor's rows; the tensor itself where it is one."""
    if tensor.dim() != 2:
        tensor = matrix_of(tensor)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _addressable(weight: torch.Tensor) -> torch.Tensor:
    """weight itself when one of its strides is 1, else a contiguous copy."""
    return weight if weight.stride(1) == 1 or column_major(weight) else weight.contiguous()


def _matrices(backend: str) -> Any:
    def run(
        values: Any, indices: Any, weight: torch.Tensor, bias: Any, *_transposition: Any
    ) -> torch.Tensor:
        if backend != "native" or values.device.type != "cpu":
            check_range("sparse_matmul", indices, weight.shape[0])
        if values.numel() == 0 or weight.numel() == 0:
            return sparse_matmul_reference(values, indices, weight, bias)
        kernel = library.kernels(backend, "sparse_matmul").sparse_matmul
        bias = None if bias is None else bias.contiguous()
        out = kernel(_rows(values), _rows(indices), _addressable(weight), bias)
        return out if values.dim() == 2 else out.view(*values.shape[:-1], weight.shape[1]).detach()

    return run


def _backward_matrices(backend: str) -> Any:
    def run(
        grad: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        weight: torch.Tensor,
        need_values: bool,
        need_weight: bool,
        *transposition: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if values.numel() == 0 or weight.numel() == 0:
            return sparse_matmul_backward_reference(
                grad, values, indices, weight, need_values, need_weight
            )
        if backend != "native" or values.device.type != "cpu":  # else the kernel looks
            check_range("sparse_matmul", indices, weight.shape[0])
        if transposition and transposition[0] is not None:
            offsets, positions = transposition
            check_grouping("sparse_matmul", offsets, positions, indices, weight.shape[0])
            if backend != "native" or values.device.type != "cpu":
                check_grouped("sparse_matmul", offsets, positions, indices, weight.shape[0])
            if not values.is_cpu:  # not looked at, but never followed to other memory
                codes = indices.numel()
                offsets, positions = offsets.clamp(0, codes), positions.clamp(0, codes - 1)
            transposition = (offsets.contiguous(), positions.contiguous())
        grad_values, grad_weight = library.kernels(backend, "sparse_matmul").sparse_matmul_backward(
            _rows(grad),
            _rows(values),
            _rows(indices),
            _addressable(weight),
            need_values,
            need_weight,
            *transposition,
        )
        return grad_values.view(values.shape) if need_values else grad_values, grad_weight

    return run


# -- gradients, shared by every backend ------------------------------------------------------------


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    values, indices, weight, bias, offsets, positions = inputs
    ctx.save_for_backward(values, indices, weight, offsets, positions)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    values, indices, weight, *transposition = ctx.saved_tensors
    need_values, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    grad_values = grad_weight = grad_bias = None
    if need_values or need_weight:
        both = _sparse_matmul_backward(
            grad, values, indices, weight, need_values, need_weight, *transposition
        )
        grad_values = both[0] if need_values else None
        grad_weight = both[1] if need_weight else None
    if need_bias:
        grad_bias = matrix_of(grad).sum(0, dtype=sum_dtype(grad.dtype))
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_values, None, grad_weight, grad_bias, None, None


def _setup_backward(ctx: Any, inputs: Any, output: Any) -> None:
    grad, values, indices, weight, ctx.need_values, ctx.need_weight, *transposition = inputs
    ctx.save_for_backward(grad, values, indices, weight, *transposition)


def _double_backward(ctx: Any, grad_gv: torch.Tensor, grad_gw: torch.Tensor) -> Any:
    """With a, C the gradients of (d values, d weight): both are bilinear in (grad, values,
    weight)."""
    grad, values, indices, weight, *grouped = ctx.saved_tensors
    need_grad, need_values, _, need_weight, *_ = ctx.needs_input_grad
    to_grad = to_values = to_weight = None
    if ctx.need_values:  # d values = grad . weight[i], seen with upstream a
        if need_grad:
            to_grad = _sparse_matmul(grad_gv, indices, weight, None, *grouped)
        if need_weight:
            to_weight = _sparse_matmul_backward(
                grad, grad_gv, indices, weight, False, True, *grouped
            )[1]
    if ctx.need_weight:  # d weight = sum values * grad, seen with upstream C
        upstream = grad_gw.to(weight.dtype)
        if need_grad:
            term = _sparse_matmul(values, indices, upstream, None, *grouped)
            to_grad = term if to_grad is None else to_grad + term
        if need_values:
            to_values = _sparse_matmul_backward(
                grad, values, indices, upstream, True, False, *grouped
            )[0]
    return to_grad, to_values, None, to_weight, None, None, None, None


# -- vmap ------------------------------------------------------------------------------------------


def _stacked(info: Any, in_dims: Any, args: Any, weight_at: int) -> tuple[list[Any], bool]:
    """Batch dimensions moved to the front; a batch of dictionaries becomes one tall one, indices
    shifted by b*N."""
    moved: list[Any] = [
        arg
        if arg is None or not isinstance(arg, torch.Tensor)
        else arg.movedim(dim, 0)
        if dim is not None
        else arg.expand(info.batch_size, *arg.shape)
        if at != weight_at
        else arg
        for at, (arg, dim) in enumerate(zip(args, in_dims, strict=True))
    ]
    tall = in_dims[weight_at] is not None
    if tall:
        indices, weight = moved[weight_at - 1], moved[weight_at]
        n = weight.shape[1]
        steps = torch.arange(info.batch_size, device=indices.device) * n
        moved[weight_at - 1] = indices + steps.view(-1, *[1] * (indices.dim() - 1))
        moved[weight_at] = weight.flatten(0, 1)
    return moved, tall


def _vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    (values, indices, weight, bias), _ = _stacked(info, in_dims[:4], args[:4], 2)
    out = _sparse_matmul(values, indices, weight, None)
    if bias is not None:
        out = out + bias.view(bias.shape[0], *[1] * (out.dim() - 2), -1).to(out.dtype)
    return out, 0


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    (grad, values, indices, weight, need_values, need_weight), tall = _stacked(
        info, in_dims[:6], args[:6], 3
    )
    if need_weight and not tall:  # one gradient per batch entry: a dictionary each
        n = weight.shape[0]
        steps = torch.arange(info.batch_size, device=indices.device) * n
        indices = indices + steps.view(-1, *[1] * (indices.dim() - 1))
        weight = weight.repeat(info.batch_size, 1)
    grad_values, grad_weight = _sparse_matmul_backward(
        grad, values, indices, weight, need_values, need_weight
    )
    batch = info.batch_size
    if need_weight:
        grad_weight = grad_weight.reshape(batch, -1, weight.shape[1])
    else:
        grad_weight = grad_weight.expand(batch, 0)
    return (grad_values if need_values else grad_values.expand(batch, 0), grad_weight), (0, 0)


def _autocast(args: Any, dtype: torch.dtype) -> Any:
    values, indices, weight, bias, *transposition = args
    if torch.float64 in (values.dtype, weight.dtype):  # as torch.matmul: left alone
        return args
    if weight.dtype not in (torch.float32, dtype):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return values.to(dtype), indices, weight, bias, *transposition


_sparse_matmul = library.define(
    "sparse_matmul",
    "(Tensor values, Tensor indices, Tensor weight, Tensor? bias, Tensor? offsets=None,"
    " Tensor? positions=None) -> Tensor",
    reference=sparse_matmul_reference,
    implementations={"native": _matrices("native"), "triton": _matrices("triton")},
    fake=_fake,
    check=_check,
    setup_context=_setup,
    backward=_backward,
    vmap=_vmap,
    autocast=_autocast,
    owned=True,
)
_sparse_matmul_backward = library.define(
    "sparse_matmul_backward",
    "(Tensor grad, Tensor values, Tensor indices, Tensor weight, bool need_values,"
    " bool need_weight, Tensor? offsets=None, Tensor? positions=None)"
    " -> (Tensor grad_values, Tensor grad_weight)",
    reference=sparse_matmul_backward_reference,
    implementations={
        "native": _backward_matrices("native"),
        "triton": _backward_matrices("triton"),
    },
    fake=_backward_fake,
    check=_check_backward,
    setup_context=_setup_backward,
    backward=_double_backward,
    vmap=_backward_vmap,
)
