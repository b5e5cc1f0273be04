"""Calls of the native top-k kernels, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import (
    codes,
    keyword_kernel,
    launch,
    matrix,
    module_for,
    new_output,
    pointer,
)


def topk(
    x: torch.Tensor,
    k: int,
    sorted: bool,
    relu: bool,
    abs: bool,
    count: bool,
    smallest: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values [..., k], indices int64 [..., k] and counts int64 [n], or [0] without count.

    x is [rows, n] of any strides, or [..., n] contiguous.
    """
    return _select(x, k, sorted, relu, abs, None, count, smallest)


def topk_codes(
    x: torch.Tensor, k: int, sorted: bool, relu: bool, abs: bool, smallest: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and indices as `topk` does; on a CPU in half the time where there are few."""
    kernel = keyword_kernel("topk", x)
    if kernel is None:
        values, indices, _ = topk(x, k, sorted, relu, abs, False, smallest)
        return values, indices
    shape = x.shape
    # a tuple takes longer to read
    values = x.new_empty(shape[0], k) if len(shape) == 2 else x.new_empty(*shape[:-1], k)
    indices = torch.empty_like(values, dtype=torch.int64)
    kernel(
        torch.get_num_threads(),
        x=matrix(x),
        k=k,
        sorted=sorted,
        relu=relu,
        abs=abs,
        values=values.data_ptr(),
        indices=indices.data_ptr(),
        masked=0,
        counts=0,
        smallest=smallest,
    )
    return values, indices


def topk_mask(
    x: torch.Tensor, k: int, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return masked [..., n], and its codes and counts as `topk` does, by ascending index.

    x is [rows, n] of any strides, or [..., n] contiguous.
    """
    masked = new_output(x, *x.shape)
    return masked, *_select(x, k, False, relu, abs, masked, count)


class RunningTopk:
    """The k largest of rows that come in parts, each part with larger indices than those before.

    Begins with the codes [rows, k] of the first part, by ascending index.
    """

    # Of the indices: the kernel takes a bit of them.
    MOST_COLUMNS = 1 << 30

    @classmethod
    def serves(cls, x: torch.Tensor, k: int, n: int) -> bool:
        """Return whether the module of x's device has the kernel for rows of n and this k."""
        most = getattr(module_for(x), "MOST_UPDATED_CODES", 0)
        return bool(k <= most and n <= cls.MOST_COLUMNS)

    def __init__(self, values: torch.Tensor, indices: torch.Tensor) -> None:
        self._codes: tuple[torch.Tensor | None, torch.Tensor] = (values, indices)
        rows, k = values.shape
        self._state = indices.new_empty(rows, 1 + 2 * k)

    def update(self, x: torch.Tensor, first: int) -> None:
        """Take the next part, x [rows, n] of any strides; `first` is the index of its first."""
        self._launch(x, first, False, None, None)

    def finish(self, x: torch.Tensor, first: int, relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the last part and return values and indices [rows, k], by ascending index."""
        indices = torch.empty_like(self._codes[1])
        values = x.new_empty(indices.shape)
        self._launch(x, first, relu, values, indices)
        return values, indices

    def _launch(
        self,
        x: torch.Tensor,
        first: int,
        relu: bool,
        values: torch.Tensor | None,
        indices: torch.Tensor | None,
    ) -> None:
        launch(
            "topk_update",
            x,
            x=matrix(x),
            first=first,
            k=self._codes[1].shape[1],
            codes=codes(*self._codes),
            state=self._state.data_ptr(),
            relu=relu,
            values=pointer(values),
            indices=pointer(indices),
        )
        self._codes = (None, self._codes[1])  # from now on the state holds them


def _select(
    x: torch.Tensor,
    k: int,
    sorted: bool,
    relu: bool,
    abs: bool,
    masked: torch.Tensor | None,
    count: bool,
    smallest: bool = False,
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
        smallest=smallest,
    )
    return values, indices, counts
