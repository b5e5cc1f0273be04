"""One step of Adam, for dictionaries with the norms of their rows kept at 1 in the same pass.

Definition (Kingma and Ba 2015, algorithm 1), for step t = 1, 2, ...:

    g      = grad + weight_decay * parameter
    mean   = beta1 * mean + (1 - beta1) * g
    square = beta2 * square + (1 - beta2) * g^2
    parameter -= lr / (1 - beta1^t) * mean / (sqrt(square / (1 - beta2^t)) + eps)

With unit_rows, the gradient first loses the part that would only change the norm of its row,
grad[i] -= (grad[i] . parameter[i]) / |parameter[i]|^2 * parameter[i], and each row is divided by
its norm at the end (a row of zeros stays).
"""

from __future__ import annotations

from typing import Any

import torch

from ..dispatch import library
from .checks import FLOATING, check_same_device


def adam_step(
    parameter: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    unit_rows: bool = False,
) -> None:
    """Update a parameter and its moments in place.

    Equivalent PyTorch::

        if unit_rows:
            share = (grad * parameter).sum(1, True) / parameter.square().sum(1, True)
            grad = grad - share * parameter
        torch.optim.Adam's step
        if unit_rows:
            parameter /= parameter.norm(dim=1, keepdim=True)

    Args:
        parameter: [...] floating point ([N, D] with unit_rows), changed in place.
        grad: like parameter; it is left as it is.
        mean, square: like parameter, the moments, zero at first; changed in place.
        lr: learning rate.
        betas: decay of the two moments, in 0..1.
        eps: added to the root of the second moment.
        weight_decay: share of the parameter that is added to its gradient (L2).
        step: number of this step, from 1.
        unit_rows: keep the norms of the rows at 1.

    Raises:
        TypeError: parameter is not floating point.
        ValueError: shapes, dtypes or devices differ; unit_rows with other than two dimensions; step
            below 1.

    Note:
        The kernels take contiguous float32; anything else goes through the definition in torch.
        Every row's sums have a fixed order: the same bits for every thread count.

    Example:
        >>> import torch
        >>> parameter, grad = torch.zeros(2), torch.tensor([3.0, -5.0])
        >>> adam_step(parameter, grad, torch.zeros(2), torch.zeros(2), lr=0.5, step=1)
        >>> parameter.round(decimals=4).tolist()  # the first step has the size of lr
        [-0.5, 0.5]
    """
    _check(parameter, grad, mean, square, lr, *betas, eps, weight_decay, step, unit_rows)
    _adam_step(
        parameter, grad, mean, square, lr, *betas, eps, weight_decay, step, unit_rows
    )  # fmt: skip


def _check(
    parameter: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    unit_rows: bool,
) -> None:
    op = "adam_step"
    if parameter.dtype not in FLOATING:
        raise TypeError(f"{op}: parameter must be floating point, got {parameter.dtype}")
    for name, tensor in (("grad", grad), ("mean", mean), ("square", square)):
        if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
            raise ValueError(
                f"{op}: {name} must be like parameter, {list(parameter.shape)} of "
                f"{parameter.dtype}, got {list(tensor.shape)} of {tensor.dtype}"
            )
    check_same_device(op, parameter=parameter, grad=grad, mean=mean, square=square)
    if unit_rows and parameter.dim() != 2:
        raise ValueError(
            f"{op}: unit_rows needs a parameter [rows, features], got {list(parameter.shape)}"
        )
    if step < 1:
        raise ValueError(f"{op}: step must be at least 1, got {step}")


def adam_step_reference(
    parameter: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    unit_rows: bool,
) -> None:
    if unit_rows:
        length = parameter.square().sum(1, keepdim=True)
        share = (grad * parameter).sum(1, keepdim=True) / length
        grad = grad - torch.where(length > 0, share, 0) * parameter
    grad = grad + weight_decay * parameter
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = square.sqrt() / (1 - beta2**step) ** 0.5 + eps
    parameter.addcdiv_(mean, root, value=-lr / (1 - beta1**step))
    if unit_rows:
        norm = parameter.norm(dim=1, keepdim=True)
        parameter.div_(torch.where(norm > 0, norm, 1))


def _fake(*_: Any) -> None:
    return None


def _kernel(backend: str) -> Any:
    def run(
        parameter: torch.Tensor,
        grad: torch.Tensor,
        mean: torch.Tensor,
        square: torch.Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,
        unit_rows: bool,
    ) -> None:
        tensors = (parameter, grad, mean, square)
        plain = all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        if not plain or parameter.numel() == 0:
            return adam_step_reference(
                *tensors, lr, beta1, beta2, eps, weight_decay, step, unit_rows
            )
        step_size = lr / (1 - beta1**step)
        root_scale = (1 - beta2**step) ** -0.5
        numbers = (step_size, 1 - beta1, beta2, 1 - beta2, root_scale, eps, weight_decay)
        return library.kernels(backend, "adam").adam_step(*tensors, *numbers, unit_rows)

    return run


_adam_step = library.define(
    "adam_step",
    "(Tensor(a!) parameter, Tensor grad, Tensor(b!) mean, Tensor(c!) square, float lr, float beta1,"
    " float beta2, float eps, float weight_decay, int step, bool unit_rows) -> ()",
    reference=adam_step_reference,
    implementations={"native": _kernel("native"), "triton": _kernel("triton")},
    fake=_fake,
    check=_check,
)
