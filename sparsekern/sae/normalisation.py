"""torch's batch normalisation with safer running statistics.

Under gradient checkpointing they are updated once for a batch (torch's own layers do so twice). A
batch that is not finite does not change them: no later batch could make up for it.

Where `distributed` is set, the batch is that of all processes of torch.distributed's default group,
which must call the layer together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.recomputation import take
from ..nn.wrappers import has_other_processes


class BatchNorm1d(nn.BatchNorm1d):
    """torch's layer, except under gradient checkpointing and for batches that are not finite."""

    distributed = False

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, C] or [B, C, L] normalised."""
        self._check_input_dim(x)
        return _train(self, x) if self.training else super().forward(x)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's layer, except under gradient checkpointing and for batches that are not finite."""

    distributed = False

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, C, H, W] normalised."""
        self._check_input_dim(x)
        return _train(self, x) if self.training else super().forward(x)


def _train(layer: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return x normalised in training mode; update the running statistics."""
    mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or var is None or count is None or layer.momentum is None:
        raise ValueError(f"{type(layer).__name__}: running statistics and momentum must be kept")
    if layer.distributed and has_other_processes():
        y, new_mean, new_var = _normalize_over_all(layer, x)
        new_mean, new_var = mean.lerp(new_mean, layer.momentum), var.lerp(new_var, layer.momentum)
    else:
        new_mean, new_var = mean.clone(), var.clone()
        y = F.batch_norm(
            x, new_mean, new_var, layer.weight, layer.bias, True, layer.momentum, layer.eps
        )
    with torch.no_grad():
        take(mean, torch.where(new_mean.isfinite(), new_mean, mean))
        take(var, torch.where(new_var.isfinite(), new_var, var))
        take(count, count + 1)
    return y


def _normalize_over_all(
    layer: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x normalised with the mean and variance [C] of all processes, and these, unbiased."""
    dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = wide.new_full((1,), x.numel() // x.shape[1])
    sums: Tensor = _Sum.apply(torch.cat((wide.sum(dims), count)))  # type: ignore[no-untyped-call]
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = wide - mean.view(shape)
    squares: Tensor = _Sum.apply(centred.square().sum(dims))  # type: ignore[no-untyped-call]
    y = centred * (squares / count + layer.eps).rsqrt().view(shape)
    if layer.affine:
        y = y * layer.weight.view(shape) + layer.bias.view(shape)
    unbiased = squares.detach() / (count - 1).clamp_min(1)
    return y.to(x.dtype), mean.detach(), unbiased


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is that of its gradients."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total
