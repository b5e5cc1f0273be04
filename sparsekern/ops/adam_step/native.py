"""Calls of the native Adam step, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import launch


def adam_step(
    parameter: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    step_size: float,
    new_mean: float,
    beta2: float,
    new_square: float,
    root_scale: float,
    eps: float,
    weight_decay: float,
    unit_rows: bool,
) -> None:
    """Update contiguous float32 tensors of one shape ([rows, d] with unit_rows), all but grad."""
    d = parameter.shape[-1] if parameter.dim() else 1
    launch(
        "adam_step",
        parameter,
        parameter=parameter.data_ptr(),
        grad=grad.data_ptr(),
        mean=mean.data_ptr(),
        square=square.data_ptr(),
        rows=parameter.numel() // d,
        d=d,
        step_size=step_size,
        new_mean=new_mean,
        beta2=beta2,
        new_square=new_square,
        root_scale=root_scale,
        eps=eps,
        weight_decay=weight_decay,
        unit_rows=unit_rows,
    )
