"""torch's batch normalisation, whose running statistics are not led astray.

A batch is taken into them once under gradient checkpointing, where torch's own layers take it in
twice; and one that is not finite not at all, since no later batch would make up for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.recomputation import take


class BatchNorm1d(nn.BatchNorm1d):
    """As torch's, but for gradient checkpointing and batches that are not finite."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C] or [B, C, L] -> the same."""
        self._check_input_dim(x)
        return _normalised(self, x) if self.training else super().forward(x)


class BatchNorm2d(nn.BatchNorm2d):
    """As torch's, but for gradient checkpointing and batches that are not finite."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the same."""
        self._check_input_dim(x)
        return _normalised(self, x) if self.training else super().forward(x)


def _normalised(layer: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    """What a layer with running statistics makes of x in training."""
    mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or var is None or count is None or layer.momentum is None:
        raise ValueError(f"{type(layer).__name__}: running statistics and momentum must be kept")
    new_mean, new_var = mean.clone(), var.clone()
    y = F.batch_norm(
        x, new_mean, new_var, layer.weight, layer.bias, True, layer.momentum, layer.eps
    )
    with torch.no_grad():
        take(mean, torch.where(new_mean.isfinite(), new_mean, mean))
        take(var, torch.where(new_var.isfinite(), new_var, var))
        take(count, count + 1)
    return y
