"""The torch operation adam_step, and the kernels that serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.operations import define
from . import native
from .checks import check_step
from .reference import adam_step_reference


def _triton_module() -> Any:
    from . import triton  # imported at the first call that it serves: the package may be missing

    return triton


def _adapt(kernel: Callable[..., None]) -> Callable[..., None]:
    """Adapt a kernel of contiguous float32 tensors: others are served by the reference."""

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
        served = all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
        if not served or parameter.numel() == 0:
            adam_step_reference(*tensors, lr, beta1, beta2, eps, weight_decay, step, unit_rows)
            return
        step_size = lr / (1 - beta1**step)
        root_scale = (1 - beta2**step) ** -0.5
        factors = (step_size, 1 - beta1, beta2, 1 - beta2, root_scale, eps, weight_decay)
        kernel(*tensors, *factors, unit_rows)

    return run


def _fake(*_: Any) -> None:
    return None


adam_step = define(
    "adam_step",
    "(Tensor(a!) parameter, Tensor grad, Tensor(b!) mean, Tensor(c!) square, float lr, float beta1,"
    " float beta2, float eps, float weight_decay, int step, bool unit_rows) -> ()",
    reference=adam_step_reference,
    implementations={
        "native": _adapt(native.adam_step),
        "triton": _adapt(lambda *args: _triton_module().adam_step(*args)),
    },
    fake=_fake,
    check=check_step,
)
