"""Calls of the native top-k kernels, for the CPU and for CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...dispatch.launch import codes, launch, matrix, module_for, new_output, pointer


def topk(
    x: torch.Tensor, k: int, sorted: bool, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values [..., k], indices int64 [..., k] and counts int64 [n], or [0] without count.

    x is [rows, n] of any strides, or [..., n] contiguous.
    """
    return _select(x, k, sorted, relu, abs, None, count)


def topk_mask(
    x: torch.Tensor, k: int, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return masked [..., n], and its codes and counts as `topk` does, by ascending index.

    x is [rows, n] of any strides, or [..., n] contiguous.
    """
    masked = new_output(x, *x.shape)
    return masked, *_select(x, k, False, relu, abs, masked, count)


def topk_updater(
    x: torch.Tensor, k: int
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """Return `topk_update` where the module of x's device has it for so many codes, else None."""
    return topk_update if k <= getattr(module_for(x), "MOST_CODES_UPDATED", 0) else None


def topk_update(
    x: torch.Tensor, first: int, values: torch.Tensor, indices: torch.Tensor, relu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest of each row's codes and of further elements, by ascending index.

    x: [rows, n], the further elements, whose indices first..first + n - 1 are larger than those of
    the codes, [rows, k] contiguous, by ascending index.
    """
    new_values, new_indices = torch.empty_like(values), torch.empty_like(indices)
    launch(
        "topk_update",
        x,
        x=matrix(x),
        first=first,
        codes=codes(values, indices),
        relu=relu,
        values=new_values.data_ptr(),
        indices=new_indices.data_ptr(),
    )
    return new_values, new_indices


def _select(
    x: torch.Tensor,
    k: int,
    sorted: bool,
    relu: bool,
    abs: bool,
    masked: torch.Tensor | None,
    count: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *batch, n = x.shape
    values = x.new_empty(*batch, k)
    indices = x.new_empty(*batch, k, dtype=torch.int64)
    counts = indices.new_zeros(n) if count else indices.new_empty(0)
    launch(
        "topk",
        x,
        x=matrix(x),
        k=k,
        sorted=sorted,
        relu=relu,
        abs=abs,
        values=values.data_ptr(),
        indices=indices.data_ptr(),
        masked=pointer(masked),
        counts=counts.data_ptr() if count else 0,
    )
    return values, indices, counts
