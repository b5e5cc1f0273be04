"""Calls of the native kernel of gather_dot, for the CPU and for CUDA."""

from __future__ import annotations

import torch

from ...dispatch.launch import NO_MATRIX, codes_without_values, launch, matrix
from ..transpose_codes.checks import not_grouped
from ..transpose_codes.native import transpose_codes


def gather_dot(
    x: torch.Tensor,
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return products [rows, k] of x [rows, d] with rows of weight [n, d], indices [rows, k].

    offsets and positions are the indices' transposition, if it is known. weight may be
    column-major.
    """
    checked = offsets is not None and indices.is_cpu  # a GPU's module would have to wait to tell
    if offsets is None or positions is None:
        offsets, positions = transpose_codes(indices, weight.shape[0], "gather_dot")
    products, fits = _launch(x, weight, indices, offsets, positions, checked)
    if not fits:
        raise not_grouped("gather_dot")
    return products


def dots_of_listed(
    x: torch.Tensor,
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Return the products [rows, k] of those codes alone that `positions` lists; see `gather_dot`.

    offsets [n + 1] and positions (int32): the flat places in indices of the codes of each latent,
    as in a transposition, with some left out. What they leave out is not initialised.
    """
    products, _ = _launch(x, weight, indices, offsets, positions, False)
    return products


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    checked: bool,
) -> tuple[torch.Tensor, bool]:
    """Return the products, and False where the codes were checked and are not so grouped."""
    products = x.new_empty(indices.shape)
    fits = launch(
        "sparse_matmul_backward",
        x,
        grad=x.data_ptr(),
        codes=codes_without_values(indices, x.dtype, with_indices=checked),
        weight=matrix(weight),
        offsets=offsets.data_ptr(),
        positions=positions.data_ptr(),
        grad_values=products.data_ptr(),
        grad_weight=NO_MATRIX,
    )
    return products, fits
