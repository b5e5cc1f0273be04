"""The torch operation transpose_codes: shapes, batches, and the kernels that serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...dispatch.operations import define
from ..batching import one_by_one
from ..checks import check_codes, check_range, check_size
from . import native
from .reference import transpose_codes_reference


def _check(indices: torch.Tensor, n: int) -> None:
    check_codes("transpose_codes", None, indices)
    check_size("transpose_codes", "n", n)


def _triton_module() -> Any:
    from . import triton  # imported at the first call that it serves: the package may be missing

    return triton


def _adapt(
    kernel: Callable[..., tuple[torch.Tensor, torch.Tensor]], backend: str
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Adapt a kernel of contiguous vectors to indices of any shape."""

    def run(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        if backend != "native" or indices.device.type != "cpu":
            check_range("transpose_codes", indices, n)
        return kernel(indices.reshape(-1).contiguous(), n)

    return run


def _fake(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = indices.new_empty(n + 1, dtype=torch.int64)
    return offsets, indices.new_empty(indices.numel(), dtype=torch.int32)


transpose_codes = define(
    "transpose_codes",
    "(Tensor indices, SymInt n) -> (Tensor offsets, Tensor positions)",
    reference=transpose_codes_reference,
    implementations={
        "native": _adapt(native.transpose_codes, "native"),
        "triton": _adapt(lambda *args: _triton_module().transpose_codes(*args), "triton"),
    },
    fake=_fake,
    check=_check,
    vmap=one_by_one,
)
