"""What activations look like: their mean, their norms, and features that outgrow all others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .rows import row_norms

OUTLIER_MULTIPLE = 30.0


@dataclass(frozen=True)
class ActivationStatistics:
    """Statistics of a sample of rows ``[rows, D]``, summed in float64.

    Attributes:
        rows: how many rows were sampled.
        mean: float64 ``[D]``.
        deviation: float64 ``[D]``, the standard deviation of each feature (divided by ``rows``).
        mean_norm: mean of the rows' L2 norms.
        median_norm: median of the rows' L2 norms.
        largest_norm: the largest of them.
    """

    rows: int
    mean: Tensor
    deviation: Tensor
    mean_norm: float
    median_norm: float
    largest_norm: float

    @property
    def variance(self) -> float:
        """Mean squared distance of a row from the mean: what FVU divides by."""
        return float(self.deviation.square().sum())

    @property
    def offset(self) -> float:
        """Length of the mean in units of the root mean squared distance of a row from it.

        Far above 1, nearly all of a row is the same in every row; float32 loses the rest of it
        from about 1000 on. Infinite where all rows are equal and not zero.
        """
        length, spread = float(self.mean.norm()), self.variance**0.5
        return length / spread if spread else (float("inf") if length else 0.0)

    def outlier_features(self, multiple: float = OUTLIER_MULTIPLE) -> Tensor:
        """Find the features that outgrow the others: their numbers, int64 ``[m]``, largest first.

        Their root mean square exceeds ``multiple`` times the median of all features' root mean
        squares. One such feature can hold nearly all of the variance, so that FVU says how well
        this feature is reconstructed and nothing of the others.
        """
        size = (self.mean.square() + self.deviation.square()).sqrt()
        order = torch.argsort(size, descending=True, stable=True)
        return order[size[order] > multiple * float(np.median(size.numpy()))]


def statistics_of(batches: Iterable[Tensor], rows: int) -> ActivationStatistics:
    """Summarise the first ``rows`` rows of finite batches ``[n, D]`` on the CPU.

    Single-threaded sums in numpy: the same to the bit on any number of threads.

    Args:
        batches: ``[n, D]``, any floating dtype.
        rows: how many to take, at most.
    """
    count, mean, squares, norms = 0, np.float64(0), np.float64(0), []
    for batch in batches:
        part = batch[: rows - count].double().numpy()
        norms.append(row_norms(batch[: rows - count]))
        # The squares around each part's own mean, joined (Chan, Golub, LeVeque 1983): a large
        # mean cancels nothing.
        part_mean = part.mean(0)
        difference, total = part_mean - mean, count + len(part)
        squares = squares + np.square(part - part_mean).sum(0)
        squares = squares + np.square(difference) * (count * len(part) / total)
        mean = mean + difference * (len(part) / total)
        count = total
        if count >= rows:
            break
    all_norms = np.concatenate(norms)
    return ActivationStatistics(
        rows=count,
        mean=torch.from_numpy(mean),
        deviation=torch.from_numpy(np.sqrt(squares / count)),
        mean_norm=float(all_norms.mean()),
        median_norm=float(np.median(all_norms)),
        largest_norm=float(all_norms.max()),
    )
