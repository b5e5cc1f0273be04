"""Checks of the arguments of adam_step."""

from __future__ import annotations

import torch

from ..checks import FLOATING, check_same_device


def check_step(
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
    """Check the arguments of `adam_step`."""
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
