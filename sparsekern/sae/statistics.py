"""Sums over rows for the losses of an autoencoder, the geometric median, normalized rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

MEDIAN_STEPS = 100
MEDIAN_TOLERANCE = 1e-6
# Added to the deviation of a row before it divides; OpenAI's and SAELens' number.
SMALLEST_DEVIATION = 1e-5


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def total_variance(x: Tensor) -> Tensor:
    """Return sum |x - mean over rows|^2 of x [..., D], a scalar of at least float32.

    If the rows do not differ (one row, or equal ones up to rounding) it is sum |x|^2, and 1 if that
    is zero, so that a loss divided by it has its usual size.

    Differences from the first row are exact where rows are similar, so a large offset costs no
    precision. The mean that rounding leaves in the centred rows is subtracted again (the corrected
    two-pass algorithm: Chan, Golub and LeVeque 1983).
    """
    rows = at_least_float32(x.reshape(-1, x.shape[-1]))
    centred = rows - rows[:1]
    centred = centred - centred.mean(0)
    variance = centred.square().sum() - centred.sum(0).square().sum() / max(1, len(rows))
    energy = rows.square().sum()
    return divisor(variance, energy)


def divisor(variance: Tensor, energy: Tensor) -> Tensor:
    """Return what errors are divided by, from sum |x - mean|^2 and sum |x|^2 of rows x, 0-d."""
    rounding = (2 * torch.finfo(energy.dtype).eps) ** 2 * energy
    scale = torch.where(variance > rounding, variance, energy)
    return torch.where(scale == 0, 1.0, scale)


def squared_error(x: Tensor, estimate: Tensor) -> Tensor:
    """Return sum |x - estimate|^2 over all elements, a scalar of at least float32."""
    return nn.functional.mse_loss(at_least_float32(estimate), at_least_float32(x), reduction="sum")


@torch.no_grad()
def geometric_median(
    x: Tensor, steps: int = MEDIAN_STEPS, tolerance: float = MEDIAN_TOLERANCE
) -> Tensor:
    """Return the point with the least sum of distances to rows, by Weiszfeld's iteration.

    Args:
        x: [rows, D], at least one row, floating point.
        steps: largest number of iterations.
        tolerance: stop when the point moves by less than this share of the rows' mean distance.

    Returns:
        [D] of x's dtype.
    """
    if x.dim() != 2 or len(x) == 0:
        raise ValueError(
            f"geometric_median: x must be [rows, D] with at least one row, got {list(x.shape)}"
        )
    rows = at_least_float32(x)
    point = rows.mean(0)
    for _ in range(steps):
        distance = (rows - point).norm(dim=1)
        weights = 1 / distance.clamp_min(1e-12)
        moved = (weights @ rows) / weights.sum()
        done = (moved - point).norm() <= tolerance * distance.mean()
        point = moved
        if done:
            break
    return point.to(x.dtype)


def gather_rows(x: Tensor, group: Any) -> Tensor:
    """Return the rows [..., D] of all processes of a group (None: of all), as [rows, D]."""
    rows = x.reshape(-1, x.shape[-1])
    counts = [torch.tensor([0], device=x.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([len(rows)], device=x.device), group=group)
    most = max(map(int, counts))
    padded = nn.functional.pad(rows, (0, 0, 0, most - len(rows))).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


class Rows(NamedTuple):
    """Rows as they are encoded, and what brings reconstructions of them back.

    Attributes:
        values: [..., D].
        mean: [..., 1], of the rows given; None where values are these rows.
        deviation: [..., 1], standard deviation (divisor D - 1) of the rows given, or None.
    """

    values: Tensor
    mean: Tensor | None = None
    deviation: Tensor | None = None

    def normalize(self, y: Tensor) -> Tensor:
        """Do with y [..., D] what was done with the rows."""
        if self.mean is None or self.deviation is None:
            return y
        return (y - self.mean) / (self.deviation + SMALLEST_DEVIATION)

    def rescale(self, y: Tensor) -> Tensor:
        """Give y [..., D], a difference of reconstructions, the scale of the rows given."""
        return y if self.deviation is None else y * self.deviation

    def restore(self, y: Tensor) -> Tensor:
        """Give y [..., D], a reconstruction, scale and mean of the rows given."""
        y = self.rescale(y)
        return y if self.mean is None else y + self.mean


def normalized_rows(x: Tensor) -> Rows:
    """Subtract from rows x [..., D] their means, and divide them by their standard deviations."""
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    deviation = centred.std(dim=-1, keepdim=True)
    return Rows(centred / (deviation + SMALLEST_DEVIATION), mean, deviation)
