"""JumpReLU and the step function, with straight-through gradients for their thresholds.

Definition, for a threshold theta per column and a bandwidth e:

    step(x, theta)     = 1 where x > theta, else 0
    jumprelu(x, theta) = x * step(x, theta)

Their derivatives with respect to theta are zero almost everywhere. In their place stand those of a
step smoothed by a rectangle of width e, with K(u) = 1 where |u| < 1/2, else 0:

    d jumprelu / d theta = -(theta / e) * K((x - theta) / e)
    d step     / d theta = -(1 / e)     * K((x - theta) / e)
    d jumprelu / d x     = step(x, theta)            d step / d x = 0

In a second derivative, step and K count as constant; the factor theta / e does not. A relative
bandwidth r means e = r * theta: then the gradients of log(theta) do not depend on the scale of x.

Source: Rajamanoharan et al. 2024, Jumping ahead (arXiv 2407.14435), section 3.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dispatch.dtensors import check_alike
from .checks import check_above_zero, check_floating, check_same_device


def jumprelu(
    x: torch.Tensor, theta: torch.Tensor, bandwidth: float, relative: bool = False
) -> torch.Tensor:
    """Return x where it is above its threshold, else zero.

    Equivalent PyTorch, but for the gradient of theta: ``x * (x > theta)``

    Args:
        x: [..., n] float32, bfloat16, float16 or float64.
        theta: [n] or 0-d thresholds, or one for each element, [..., n] like x; floating point of
            any dtype; the comparison takes place in the wider of the two.
        bandwidth: width of the band around theta whose elements give it a gradient, above 0.
        relative: bandwidth is a multiple of each theta, which must then be above 0.

    Returns:
        [..., n] of x's dtype, differentiable with respect to x and, straight-through, theta.

    Raises:
        TypeError: x or theta is not floating point, or bandwidth is not a number.
        ValueError: theta does not fit x, or bandwidth is not above 0.

    Note:
        NaN is passed on. The gradient of theta is summed in float32 (float64 for float64).

    Example:
        >>> import torch
        >>> from sparsekern.nn import jumprelu
        >>> theta = torch.tensor(1.0, requires_grad=True)
        >>> y = jumprelu(torch.tensor([0.5, 0.9, 1.2, 3.0]), theta, 0.5)
        >>> y.sum().backward()
        >>> y.tolist(), theta.grad.item()  # 0.9 and 1.2 lie in the band
        ([0.0, 0.0, 1.2000000476837158, 3.0], -4.0)
    """
    _check("jumprelu", x, theta, bandwidth)
    y: torch.Tensor = _JumpReLU.apply(x, theta, float(bandwidth), relative)  # type: ignore[no-untyped-call]
    return y


def step(
    x: torch.Tensor, theta: torch.Tensor, bandwidth: float, relative: bool = False
) -> torch.Tensor:
    """Return 1 where x is above its threshold, else 0; its sum counts active latents.

    Equivalent PyTorch, but for the gradient of theta: ``(x > theta).to(x.dtype)``

    Args:
        x: [..., n] float32, bfloat16, float16 or float64.
        theta: [n] or 0-d thresholds, or [..., n] like x; floating point of any dtype.
        bandwidth: width of the band around theta whose elements give it a gradient, above 0.
        relative: bandwidth is a multiple of each theta, which must then be above 0.

    Returns:
        [..., n] of x's dtype, differentiable, straight-through, with respect to theta alone.

    Raises:
        TypeError: x or theta is not floating point, or bandwidth is not a number.
        ValueError: theta does not fit x, or bandwidth is not above 0.

    Note:
        NaN counts as active, since `jumprelu` passes it on.

    Example:
        >>> import torch
        >>> from sparsekern.nn import step
        >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> active = step(torch.tensor([[1.1, 1.9], [5.0, 2.2]]), theta, 0.5)
        >>> active.sum().backward()
        >>> active.tolist(), theta.grad.tolist()
        ([[1.0, 0.0], [1.0, 1.0]], [-2.0, -4.0])
    """
    _check("step", x, theta, bandwidth)
    # Detached: compiled autograd fails to add up a gradient that is None.
    active: torch.Tensor = _Step.apply(x.detach(), theta, float(bandwidth), relative)  # type: ignore[no-untyped-call]
    return active


def _check(op: str, x: torch.Tensor, theta: torch.Tensor, bandwidth: float) -> None:
    check_floating(op, "x", x)
    if not isinstance(theta, torch.Tensor) or not theta.is_floating_point():
        raise TypeError(f"{op}: theta must be a floating point tensor, got {theta!r}")
    check_alike(op, x=x, theta=theta)
    # Not `in`, for which equal symbolic sizes are different.
    if theta.dim() > 0 and theta.shape != x.shape[-1:] and theta.shape != x.shape:
        raise ValueError(
            f"{op}: theta must be [{x.shape[-1]}] for x {list(x.shape)}, 0-d, or of x's shape, "
            f"got shape {list(theta.shape)}"
        )
    check_above_zero(op, "bandwidth", bandwidth)
    check_same_device(op, x=x, theta=theta)


def at_most(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Return x <= theta, without rounding a 0-d theta to x's dtype; False for NaN."""
    return x <= theta.reshape(1) if theta.dim() == 0 else x <= theta


def in_band(
    x: torch.Tensor, theta: torch.Tensor, bandwidth: float, relative: bool = False
) -> torch.Tensor:
    """Return K((x - theta) / bandwidth): True for the elements that give theta a gradient."""
    theta = theta.reshape(1) if theta.dim() == 0 else theta
    return (x - theta).abs() < (theta * (bandwidth / 2) if relative else bandwidth / 2)


def _sum_in_band(
    grad: torch.Tensor, x: torch.Tensor, theta: torch.Tensor, bandwidth: float, relative: bool
) -> torch.Tensor:
    """Sum the gradients of the elements in the band to the shape of theta."""
    dtype = torch.float64 if torch.float64 in (x.dtype, theta.dtype) else torch.float32
    band_grad = torch.where(in_band(x, theta, bandwidth, relative), grad, 0)
    if theta.dim() == 0:
        return band_grad.sum(dtype=dtype)
    if theta.shape == x.shape:
        return band_grad.to(dtype)
    return band_grad.reshape(-1, theta.shape[0]).sum(0, dtype=dtype)


class _JumpReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, theta: torch.Tensor, bandwidth: float, relative: bool
    ) -> torch.Tensor:
        return torch.where(at_most(x, theta), 0, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, theta, *ctx.band = inputs
        ctx.save_for_backward(x, theta)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, theta = ctx.saved_tensors
        d_x = d_theta = None
        if ctx.needs_input_grad[0]:
            d_x = torch.where(at_most(x, theta), 0, grad)
        if ctx.needs_input_grad[1]:
            bandwidth, relative = ctx.band
            total = _sum_in_band(grad, x, theta, bandwidth, relative)
            slope = -1 / bandwidth if relative else -theta / bandwidth
            d_theta = (slope * total).to(theta.dtype)
        return d_x, d_theta, None, None


class _Step(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, theta: torch.Tensor, bandwidth: float, relative: bool
    ) -> torch.Tensor:
        return (~at_most(x, theta)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, theta, *ctx.band = inputs
        ctx.save_for_backward(x, theta)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, theta = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None, None, None
        bandwidth, relative = ctx.band
        total = _sum_in_band(grad, x, theta, bandwidth, relative)
        width = bandwidth * theta if relative else bandwidth
        return None, (-total / width).to(theta.dtype), None, None
