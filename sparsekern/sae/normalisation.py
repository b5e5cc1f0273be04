"""torch's batch normalisation with safer running statistics.

Under gradient checkpointing they are updated once for a batch (torch's own layers do so twice). A
batch that is not finite does not change them: no later batch could make up for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.recomputation import take


class BatchNorm1d(nn.BatchNorm1d):
    """torch's layer, except under gradient checkpointing and for batches that are not finite."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, C] or [B, C, L] normalised."""
        self._check_input_dim(x)
        return _train(self, x) if self.training else super().forward(x)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's layer, except under gradient checkpointing and for batches that are not finite."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, C, H, W] normalised."""
        self._check_input_dim(x)
        return _train(self, x) if self.training else super().forward(x)


def _train(layer: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return x normalised in training mode; update the running statistics."""
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
