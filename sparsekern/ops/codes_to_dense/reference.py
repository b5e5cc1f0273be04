"""The definition of codes_to_dense in torch."""

from __future__ import annotations

import torch

from ..checks import check_range


def codes_to_dense_reference(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    check_range("codes_to_dense", indices, n)
    return values.new_zeros(*values.shape[:-1], n).scatter(-1, indices.long(), values)
