"""What torch knows of adam_step, and which kernels serve it."""

from __future__ import annotations

from typing import Any

import torch

from ...dispatch.operations import define
from . import native
from .checks import check_step
from .reference import adam_step_reference


def _triton() -> Any:
    from . import triton  # at the first call that it serves: it needs the package triton

    return triton


def _contiguous(kernel: Any) -> Any:
    """A kernel of contiguous float32, for all else the definition."""

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
        return kernel(*tensors, *numbers, unit_rows)

    return run


def _fake(*_: Any) -> None:
    return None


adam_step = define(
    "adam_step",
    "(Tensor(a!) parameter, Tensor grad, Tensor(b!) mean, Tensor(c!) square, float lr, float beta1,"
    " float beta2, float eps, float weight_decay, int step, bool unit_rows) -> ()",
    reference=adam_step_reference,
    implementations={
        "native": _contiguous(native.adam_step),
        "triton": _contiguous(lambda *args: _triton().adam_step(*args)),
    },
    fake=_fake,
    check=check_step,
)
