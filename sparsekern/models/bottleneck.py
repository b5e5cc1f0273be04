"""A sparse layer inside a network: few of many units carry what goes through it.

input [B, D] -> (standardized) -> linear -> scores [B, N] -> sparsify -> codes
codes -> dictionary [N, E] + bias -> output [B, E]
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import DeadNeuronCounter, TopK
from ..ops.checks import check_same_dtype
from ..ops.codes_to_dense import codes_to_dense
from ..ops.exported import exported
from ..ops.linear_topk import linear_topk
from ..ops.sparse_matmul import sparse_matmul
from ..sae.decoding import dense_product
from ..sae.normalisation import BatchNorm1d

SPARSIFIERS = ("topk", "magnitude", "l1")
# Above this share of active units a dense product costs less than picking rows of the dictionary.
DENSE_SHARE = 0.25
# From this width on, and up to this share of active units, scores are searched in slices and never
# stored, and their gradient is sparse.
WIDE, WIDE_SHARE = 2048, 0.1


@exported("sparsekern.models.bottleneck.BottleneckOutput")
class BottleneckOutput(NamedTuple):
    """What goes through a sparse layer, for a batch of B rows."""

    input: Tensor
    """What the scores are made of, after standardization, [B, D]."""
    scores: Tensor | None
    """Before the sparsifier, [B, N]; None where they are not stored."""
    values: Tensor
    """Activations of the selected units, [B, K]; of all units, [B, N], where indices is None."""
    indices: Tensor | None
    """Which units these are, int64 [B, K]; None for all, in order: under L1, and for
    top-k by value where k is N."""
    output: Tensor
    """[B, E]."""


class Standardize(BatchNorm1d):
    """Zero mean and unit variance of each feature, without weights to learn.

    In training of the batch, in evaluation (and for a batch of one row) of the running estimates.
    distributed: the batch is that of all processes, which must call the layer together.
    """

    def __init__(self, features: int, *, distributed: bool = False) -> None:
        super().__init__(features, affine=False)
        self.distributed = distributed

    def forward(self, x: Tensor) -> Tensor:
        """Standardize x [B, D] -> [B, D]."""
        if self.training and len(x) == 1 and not self.distributed:
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)
        return super().forward(x)


class SparseBottleneck(nn.Module):
    """Linear layer, sparsifier, linear layer.

    Args:
        inputs: D.
        units: N.
        outputs: E.
        k: active units of a row, 1..N; change it during training through :attr:`k`.
        sparsifier: "topk" keeps the k largest scores and then takes their ReLU, "magnitude" the k
            of largest magnitude with their signs; "l1" is a plain ReLU, which a penalty on the
            activations is to make sparse, and k says nothing.
        standardize: give the inputs zero mean and unit variance first.
        tied: start the dictionary as the transposed first layer, scaled so that the output of
            random weights has the size of the input; E must be D.
        distributed: standardize with, and count activity over, the rows of all processes.

    In training mode each forward pass tells :attr:`activity` which units fired.

    Example:
        >>> import torch
        >>> from sparsekern.models import SparseBottleneck
        >>> layer = SparseBottleneck(16, 64, 16, k=4)
        >>> layer(torch.randn(2, 16)).indices.shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        inputs: int,
        units: int,
        outputs: int,
        k: int,
        *,
        sparsifier: str = "topk",
        standardize: bool = False,
        tied: bool = False,
        distributed: bool = False,
    ) -> None:
        super().__init__()
        op = "SparseBottleneck"
        if sparsifier not in SPARSIFIERS:
            known = ", ".join(SPARSIFIERS)
            raise ValueError(f"{op}: sparsifier must be one of {known}, got {sparsifier!r}")
        if tied and inputs != outputs:
            raise ValueError(
                f"{op}: tied needs as many outputs as inputs, got {outputs} and {inputs}"
            )
        self.sparsifier = sparsifier
        self.tied = tied
        self.standardize: nn.Module = nn.Identity()
        if standardize:
            self.standardize = Standardize(inputs, distributed=distributed)
        self.to_units = nn.Linear(inputs, units)
        magnitude = sparsifier == "magnitude"
        self.sparsity = TopK(k, abs=magnitude)
        self.k = k  # set, so that it is in every state_dict
        self.activity = DeadNeuronCounter(units, distributed=distributed)
        self.dictionary = nn.Parameter(torch.empty(units, outputs))
        self.dictionary_bias = nn.Parameter(torch.zeros(outputs))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, *, gain: float = 1.0) -> None:
        """Draw weights that keep the size of the signal.

        ``gain`` is that of what follows: 2 for a ReLU, which halves the second moment.
        """
        units, inputs = self.to_units.weight.shape
        nn.init.normal_(self.to_units.weight, std=math.sqrt(2 / inputs))
        nn.init.zeros_(self.to_units.bias)
        if self.tied:
            self.dictionary.copy_(self.to_units.weight * (inputs / units))
        else:
            nn.init.normal_(self.dictionary, std=math.sqrt(gain / units))
        nn.init.zeros_(self.dictionary_bias)

    @property
    def units(self) -> int:
        """N."""
        return len(self.dictionary)

    @property
    def k(self) -> int:
        """Active units of a row."""
        return self.sparsity.k

    @k.setter
    def k(self, value: int) -> None:
        self.sparsity.k = value

    def forward(self, x: Tensor) -> BottleneckOutput:
        """Send x [B, D] through the layer; of the parameters' dtype, or any under autocast."""
        check_same_dtype("SparseBottleneck", x, self.to_units.weight)
        x = self.standardize(x)
        scores, indices = None, None
        everything = self.sparsifier == "topk" and self.k == self.units
        if self.sparsifier == "l1" or everything:
            scores = self.to_units(x)
            values = scores.relu()
        elif self.sparsifier == "topk" and self.units >= WIDE and self.k <= WIDE_SHARE * self.units:
            linear = self.to_units
            values, indices = linear_topk(x, linear.weight, linear.bias, self.k)
        else:
            scores = self.to_units(x)
            values, indices = self.sparsity.codes(scores)
        if self.training:
            if indices is None:
                self.activity.update(values.detach())
            else:
                self.activity.update(indices=indices, values=values.detach())
        return BottleneckOutput(x, scores, values, indices, self.decode(values, indices))

    def decode(self, values: Tensor, indices: Tensor | None) -> Tensor:
        """Decode codes to the output [B, E].

        Codes are values and indices [B, K], or values of all units [B, N].
        """
        if indices is not None and values.shape[-1] <= DENSE_SHARE * self.units:
            return sparse_matmul(values, indices, self.dictionary, self.dictionary_bias)
        if indices is not None:
            values = codes_to_dense(values, indices, self.units)
        return dense_product(values, self.dictionary.t(), self.dictionary_bias)

    def penalty(self, values: Tensor) -> Tensor:
        """Compute the L1 penalty of activations of all units [B, N], a mean over rows.

        Each activation counts by the norm of its unit's row of the dictionary.

        So activations cannot evade it by shrinking while the dictionary grows. Source: Anthropic's
        circuits updates of April 2024.
        """
        norms = self.dictionary.norm(dim=1)
        total: Tensor = (values.abs().sum(0) * norms).sum()
        return total / len(values)
