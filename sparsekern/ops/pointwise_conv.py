"""The 1x1 convolution of a tensor of which few elements are not zero, given as codes.

Definition, with the tensor as [outer, C, inner] (see ops/channels.py), codes (v_m, i_m) that stand
at outer o_m, channel c_m, inner s_m, and weight [E, C]:

    out[o, e, s] = bias[e] + sum over m with o_m = o, s_m = s of v_m * weight[e, c_m]

Gradient, with g that of out:

    dv_m = sum_e g[o_m, e, s_m] * weight[e, c_m]
    dweight[e, c] = sum over m with c_m = c of v_m * g[o_m, e, s_m]
    dbias[e] = sum over o, s of g[o, e, s]

Source: the definition of a convolution. Sums run over ascending m; accumulated in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..dispatch import library
from .batching import one_by_one
from .channels import channels_of, check_channel_dim
from .checks import (
    check_codes,
    check_floating,
    check_like,
    check_range,
    check_same_device,
    check_size,
    check_weight_dtype,
)
from .sparse_matmul import sum_dtype


def pointwise_conv(
    values: torch.Tensor,
    indices: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    channel_dim: int = 1,
) -> torch.Tensor:
    """Return the 1x1 convolution of a tensor that is zero but for a few elements.

    Equivalent PyTorch for shape [B, C, H, W]::

        x = torch.zeros(shape).flatten().index_add(0, indices, values).view(shape)
        out = torch.nn.functional.conv2d(x, weight.view(-1, C, 1, 1), bias)

    Args:
        values, indices: [M], the elements that are not zero and their flat index (int64 or int32)
            into the contiguous tensor, such as those of :func:`threshold_codes`. An index may occur
            more than once: its values add up.
        shape: of the tensor.
        weight: [E, C] or [E, C, 1, ...], in values' dtype or float32; any strides.
        bias: [E].
        channel_dim: which dimension of the tensor holds the channels.

    Returns:
        The tensor's shape with E channels instead of C, of values' dtype; differentiable with
        respect to values, weight and bias.

    Raises:
        TypeError: a dtype is none of these.
        ValueError: shapes or devices do not fit.
        IndexError: an index is outside the tensor (on the CPU; elsewhere only with
            SPARSEKERN_DEBUG=1).

    Note:
        Costs one write of the output, and E multiplications per code. On the CPU, from one code per
        16 elements of the tensor on, a dense convolution takes over. (Measured, forward and
        backward: it is faster from one in 30 on with small tensors, from one in 4 with large ones.)

    Example:
        >>> import torch, sparsekern
        >>> values, indices = torch.tensor([2.0]), torch.tensor([1])
        >>> sparsekern.pointwise_conv(values, indices, (1, 1, 3), torch.ones(1, 1)).tolist()
        [[[0.0, 2.0, 0.0]]]
    """
    op = "pointwise_conv"
    check_codes(op, values, indices)
    if values.dim() != 1:
        raise ValueError(f"{op}: values must have shape [M], got {list(values.shape)}")
    shape = tuple(shape)
    dim = check_channel_dim(op, "shape", len(shape), channel_dim)
    weight = _checked_weight(op, values, weight, bias, shape[dim])
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    run = dense_pointwise_conv if _dense_wins(values, math.prod(shape)) else _pointwise_conv
    out = run(values, indices, weight, bias, outer, inner)
    out = out.view(*shape[:dim], weight.shape[0], *shape[dim + 1 :])
    # A view that is made while nothing is recorded must not be changed in place later.
    return out if torch.is_grad_enabled() else out.detach()


def _checked_weight(
    op: str, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, channels: int
) -> torch.Tensor:
    """The weight as [E, C]."""
    check_floating(op, "weight", weight)
    if weight.dim() < 2 or weight.shape[1] != channels or math.prod(weight.shape[2:]) != 1:
        raise ValueError(
            f"{op}: weight must have shape [E, {channels}] or [E, {channels}, 1, ...] ({channels} "
            f"channels), got {list(weight.shape)}"
        )
    check_weight_dtype(op, values, weight, "values", "values'", "16-bit values")
    if bias is not None:
        check_floating(op, "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: bias must have shape [{weight.shape[0]}] (the rows of weight), got "
                f"{list(bias.shape)}"
            )
    check_same_device(op, values=values, weight=weight, bias=bias)
    return weight.flatten(1)


# -- the dense product, where few elements are zero -----------------------------------------------

ELEMENTS_PER_CODE = 16  # with fewer of them the dense product is mostly faster (see above)


def _dense_wins(values: torch.Tensor, elements: int) -> bool:
    """False for GPUs, where that was not measured, for a forced backend, under autocast, and in
    compiled code, which would be specialised to the number of codes."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if ELEMENTS_PER_CODE * len(values) <= elements:
        return False
    return library.forced_backend() is None and not torch.is_autocast_enabled("cpu")


def dense_pointwise_conv(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outer: int,
    inner: int,
) -> torch.Tensor:
    """What the operation returns, by way of the dense tensor."""
    outputs, channels = weight.shape
    elements = outer * channels * inner
    check_range("pointwise_conv", indices, elements)
    kind = sum_dtype(values.dtype)
    x = values.new_zeros(elements, dtype=kind).index_add(0, indices.long(), values.to(kind))
    x = x.view(outer, channels, inner)
    bias = None if bias is None else bias.to(kind)
    if inner == 1:
        out = torch.nn.functional.linear(x.squeeze(2), weight.to(kind), bias)
    else:
        out = torch.nn.functional.conv1d(x, weight.to(kind).unsqueeze(2), bias)
    return out.view(outer, outputs, inner).to(values.dtype)


# -- references ------------------------------------------------------------------------------------


def _places(indices: torch.Tensor, channels: int, inner: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Channel, and row of the output seen as [outer * inner, E], of each index."""
    indices = indices.long()
    return channels_of(indices, channels, inner), (
        indices // (channels * inner) * inner + indices % inner
    )


def pointwise_conv_reference(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outer: int,
    inner: int,
) -> torch.Tensor:
    outputs, channels = weight.shape
    check_range("pointwise_conv", indices, outer * channels * inner)
    kind = sum_dtype(values.dtype)
    found, rows = _places(indices, channels, inner)
    terms = values.to(kind).unsqueeze(1) * weight.to(kind).t()[found]
    out = terms.new_zeros(outer * inner, outputs).index_add(0, rows, terms)
    if bias is not None:
        out = out + bias.to(kind)
    out = out.view(outer, inner, outputs).transpose(1, 2)
    return out.to(values.dtype).contiguous()


def pointwise_conv_backward_reference(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outer, _, inner = grad.shape
    outputs, channels = weight.shape
    check_range("pointwise_conv", indices, outer * channels * inner)
    kind = sum_dtype(values.dtype)
    found, rows = _places(indices, channels, inner)
    wide = grad.to(kind)
    at = wide.transpose(1, 2).flatten(0, 1)[rows]
    of_values = (at * weight.to(kind).t()[found]).sum(1).to(values.dtype)
    terms = at * values.to(kind).unsqueeze(1)
    of_weight = terms.new_zeros(channels, outputs).index_add(0, found, terms).t()
    return of_values, of_weight.to(weight.dtype).contiguous(), wide.sum((0, 2)).to(weight.dtype)


# -- what torch.ops hands over ---------------------------------------------------------------------


def _check(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outer: int,
    inner: int,
) -> None:
    op = "pointwise_conv"
    check_codes(op, values, indices)
    if values.dim() != 1 or weight.dim() != 2:
        raise ValueError(
            f"{op}: values must be [M] and weight [E, C], got {list(values.shape)} and "
            f"{list(weight.shape)}"
        )
    _checked_weight(op, values, weight, bias, weight.shape[1])
    check_size(op, "outer", outer)
    check_size(op, "inner", inner)


def _check_backward(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> None:
    if grad.dim() != 3:
        raise ValueError(f"pointwise_conv: grad must be [outer, E, inner], got {list(grad.shape)}")
    outer, _, inner = grad.shape
    _check(values, indices, weight, None, outer, inner)
    check_like("pointwise_conv", "grad", grad, values, (outer, weight.shape[0], inner))


# -- implementations -------------------------------------------------------------------------------


def _native(backend: str) -> Any:
    def run(
        values: torch.Tensor,
        indices: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        outer: int,
        inner: int,
    ) -> torch.Tensor:
        check_range("pointwise_conv", indices, outer * weight.shape[1] * inner)
        return library.kernels(backend, "pointwise_conv").pointwise_conv(
            values.contiguous(),
            indices.contiguous(),
            weight,
            None if bias is None else bias.to(weight.dtype).contiguous(),
            outer,
            inner,
        )

    return run


def _native_backward(backend: str) -> Any:
    def run(
        grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outer, _, inner = grad.shape
        # Again: they may have changed since the forward pass.
        check_range("pointwise_conv", indices, outer * weight.shape[1] * inner)
        return library.kernels(backend, "pointwise_conv").pointwise_conv_backward(
            grad.contiguous(), values.contiguous(), indices.contiguous(), weight
        )

    return run


# -- gradients, shared by every backend ------------------------------------------------------------


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    values, indices, weight, bias, _, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(values, indices, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    values, indices, weight = ctx.saved_tensors
    # The reference's backward pass consists of differentiable operations.
    twice = library.differentiating()
    run = pointwise_conv_backward_reference if twice else _pointwise_conv_backward
    of_values, of_weight, of_bias = run(grad, values, indices, weight)
    of_bias = None if ctx.bias_dtype is None else of_bias.to(ctx.bias_dtype)
    return of_values, None, of_weight, of_bias, None, None


def _fake(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outer: int,
    inner: int,
) -> torch.Tensor:
    return values.new_empty(outer, weight.shape[0], inner)


def _fake_backward(
    grad: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_weight = weight.new_empty(weight.shape)
    return torch.empty_like(values), of_weight, weight.new_empty(weight.shape[0])


def _autocast(args: Any, dtype: torch.dtype) -> Any:
    values, indices, weight, bias, *sizes = args
    if torch.float64 in (values.dtype, weight.dtype):  # as torch's convolutions: left alone
        return args
    if weight.dtype not in (torch.float32, dtype):
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return values.to(dtype), indices, weight, bias, *sizes


_pointwise_conv: Callable[..., Any] = library.define(
    "pointwise_conv",
    "(Tensor values, Tensor indices, Tensor weight, Tensor? bias, SymInt outer, SymInt inner)"
    " -> Tensor",
    reference=pointwise_conv_reference,
    implementations={"native": _native("native")},
    fake=_fake,
    check=_check,
    setup_context=_setup,
    backward=_backward,
    vmap=one_by_one(lambda: _pointwise_conv),
    autocast=_autocast,
)
_pointwise_conv_backward: Callable[..., Any] = library.define(
    "pointwise_conv_backward",
    "(Tensor grad, Tensor values, Tensor indices, Tensor weight)"
    " -> (Tensor grad_values, Tensor grad_weight, Tensor grad_bias)",
    reference=pointwise_conv_backward_reference,
    implementations={"native": _native_backward("native")},
    fake=_fake_backward,
    check=_check_backward,
    vmap=one_by_one(lambda: _pointwise_conv_backward),
)
