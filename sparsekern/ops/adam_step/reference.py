"""The definition of adam_step in torch."""

from __future__ import annotations

import torch


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
        squared_norm = parameter.square().sum(1, keepdim=True)
        share = (grad * parameter).sum(1, keepdim=True) / squared_norm
        grad = grad - torch.where(squared_norm > 0, share, 0) * parameter
    grad = grad + weight_decay * parameter
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = square.sqrt() / (1 - beta2**step) ** 0.5 + eps
    parameter.addcdiv_(mean, root, value=-lr / (1 - beta1**step))
    if unit_rows:
        norm = parameter.norm(dim=1, keepdim=True)
        parameter.div_(torch.where(norm > 0, norm, 1))
