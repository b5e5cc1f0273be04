"""A dictionary and the norms of its rows, with one gradient of both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class NormedDictionary(NamedTuple):
    """A dictionary [N, D] and its rows' norms [N]."""

    dictionary: Tensor
    norms: Tensor


class _Normed(torch.autograd.Function):
    """W and |W[i]|, whose gradients come back together.

    d W = d dictionary + d norms / norms * W, where torch would make and add three matrices.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        norms = matrix.norm(dim=-1)
        ctx.save_for_backward(matrix, norms)
        ctx.set_materialize_grads(False)
        return matrix.view_as(matrix), norms

    @staticmethod
    def backward(ctx: Any, of_dictionary: Tensor | None, of_norms: Tensor | None) -> Tensor | None:
        matrix, norms = ctx.saved_tensors
        if of_norms is None:
            return of_dictionary
        factors = torch.where(norms > 0, of_norms / norms, 0).unsqueeze(-1)  # zeros: no gradient
        if of_dictionary is None:
            return matrix * factors
        if torch.is_grad_enabled():  # a derivative of the gradient is asked for
            return of_dictionary + matrix * factors
        # This dictionary is in one product only, which hands its gradient on to nobody else.
        return of_dictionary.addcmul_(matrix, factors)


def normed(matrix: Tensor) -> NormedDictionary:
    """Return a dictionary and its norms; the dictionary is for one product only."""
    dictionary, norms = _Normed.apply(matrix)  # type: ignore[no-untyped-call]
    return NormedDictionary(dictionary, norms)
