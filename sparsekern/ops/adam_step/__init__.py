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

import torch

from . import operation
from .checks import check_step

__all__ = ["adam_step"]


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
        mean: like parameter, the first moment, zero at first; changed in place.
        square: like parameter, the second moment, zero at first; changed in place.
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
    check_step(parameter, grad, mean, square, lr, *betas, eps, weight_decay, step, unit_rows)
    operation.adam_step(
        parameter, grad, mean, square, lr, *betas, eps, weight_decay, step, unit_rows
    )  # fmt: skip
