"""Ways to bring dead units of a sparse layer back while it trains.

All look at the units that have not fired for a number of training images, and at the residual: the
direction in which the layer's output would have to move to lower the loss, which is minus the
loss's gradient there. (In a plain sparse autoencoder that is the reconstruction error itself.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.bottleneck import BottleneckOutput, SparseBottleneck
from ...ops.sparse_matmul import sparse_matmul
from ...ops.topk import topk

AUX_K = 64
# The auxiliary codes are to say this share of the output's spread.
AUX_SHARE = 0.3
# The share of the mean activation by which a dead unit's bias rises in a step.
BIAS_RATE = 0.01
RESAMPLE_EVERY = 64
# The share of the schedule in which units are resampled: each time the others have to settle again.
RESAMPLED_SHARE = 0.8
# Norm of a new row of the dictionary, as a share of the living rows' mean: larger ones disturb what
# the others have learnt.
ANSWER_SHARE = 0.1


def residual(sparse: BottleneckOutput) -> Tensor:
    """Compute the direction [B, E] that lowers the loss, of root mean square 1.

    After backward().
    """
    grad = sparse.output.grad
    if grad is None:
        raise RuntimeError("residual: the output must have kept its gradient (retain_grad)")
    down = -grad.float()
    return down / down.square().mean().sqrt().clamp_min(torch.finfo(down.dtype).tiny)


def auxiliary_loss(layer: SparseBottleneck, sparse: BottleneckOutput, dead: Tensor) -> Tensor:
    """Measure how badly the dead units alone tell the residual: a scalar, 0 without dead units.

    As AuxK (Gao et al. 2024, arXiv 2406.04093), but on scores without ReLU: a unit whose score is
    negative everywhere is reached, too. Only the layer's own weights get gradients.

    Args:
        layer: which it is.
        sparse: what went through it, with the output's gradient.
        dead: [N] bool.
    """
    scores = layer.to_units(sparse.input.detach()).masked_fill(~dead, -torch.inf)
    values, indices = topk(scores, min(AUX_K, layer.units))
    values = torch.where(dead[indices], values, 0)
    answer = sparse_matmul(values.float(), indices, layer.dictionary)
    spread = (sparse.output - sparse.output.mean(0)).detach().float().square().mean().sqrt()
    wanted = AUX_SHARE * spread * residual(sparse)
    error = (wanted - answer).square().sum() / wanted.square().sum().clamp_min(1e-30)
    return torch.where(dead.any(), error, 0.0)


@torch.no_grad()
def raise_biases(layer: SparseBottleneck, sparse: BottleneckOutput, dead: Tensor) -> None:
    """Raise the biases of dead units in each step until they fire: homeostasis."""
    bias = layer.to_units.bias
    bias.add_(dead * (BIAS_RATE * sparse.values.detach().float().abs().mean()))


@torch.no_grad()
def resample(
    layer: SparseBottleneck,
    sparse: BottleneckOutput,
    dead: Tensor,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Give dead units new weights: each detects one input, and answers with its residual.

    Inputs of the batch are drawn with torch's generator in proportion to their squared residuals.

    After Bricken et al. 2023 ("Towards monosemanticity"), who draw by squared loss. Adam's state of
    the units is cleared; they count as alive until they are silent for as long again.
    """
    rows = residual(sparse)
    drawn = torch.multinomial(rows.square().sum(1) + 1e-12, layer.units, replacement=True)
    alive = ~dead
    weight, bias, dictionary = layer.to_units.weight, layer.to_units.bias, layer.dictionary
    inputs = sparse.input[drawn].float()
    inputs = inputs / inputs.norm(dim=1, keepdim=True).clamp_min(1e-12)
    answers = rows[drawn] / rows[drawn].norm(dim=1, keepdim=True).clamp_min(1e-12)
    _replace(weight, inputs * _mean_norm(weight, alive), dead, optimizer)
    size = ANSWER_SHARE * _mean_norm(dictionary, alive)
    _replace(dictionary, answers * size, dead, optimizer)
    mean_bias = (bias * alive).sum() / alive.sum().clamp_min(1)
    _replace(bias, mean_bias.expand_as(bias), dead, optimizer)
    layer.activity.reset(dead)


def _mean_norm(rows: Tensor, chosen: Tensor) -> Tensor:
    """Compute the mean norm of the chosen rows."""
    total: Tensor = (rows.norm(dim=1) * chosen).sum()
    return total / chosen.sum().clamp_min(1)


def _replace(
    parameter: Tensor, value: Tensor, chosen: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    """Put rows of value into the chosen rows of a parameter, and forget Adam's moments there."""
    mask = chosen.view(-1, *[1] * (parameter.dim() - 1))
    parameter.copy_(torch.where(mask, value.to(parameter.dtype), parameter))
    for name in ("exp_avg", "exp_avg_sq"):
        if name in (state := optimizer.state.get(parameter, {})):
            state[name].masked_fill_(mask, 0)
