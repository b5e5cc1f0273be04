"""The Triton kernel of gather_dot: that of the gradients of sparse_matmul, without the weight."""

from __future__ import annotations

import torch

from ..sparse_matmul.triton import sparse_matmul_backward


def gather_dot(
    x: torch.Tensor,
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return products [rows, k] of x [rows, d] with rows of weight [n, d], indices [rows, k].

    offsets and positions are the indices' transposition, if it is known.
    """
    values = x.new_zeros(()).expand(indices.shape)  # codes of that shape, whose values count not
    return sparse_matmul_backward(x, values, indices, weight, True, False, offsets, positions)[0]
