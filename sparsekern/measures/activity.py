"""Measures of trained sparse layers: which units are dead, and how many are active at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.codes_to_dense import codes_to_dense
from ..ops.count_active import count_active

DEAD_THRESHOLDS = (1e-4, 1e-3, 1e-2)


class UnitActivity:
    """How often and how strongly each of n units is active over a pass through a data set.

    Args:
        n: number of units.
        device: where the codes will be.

    Attributes:
        rows: how many rows were seen.
        fired: in how many rows each unit was not zero, int64 [n].
        sums: sum of each unit's absolute activations, float64 [n].
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.n = n
        self.rows = 0
        self.fired = torch.zeros(n, dtype=torch.int64, device=device)
        self.sums = torch.zeros(n, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, values: Tensor, indices: Tensor) -> None:
        """Count codes in: values [rows, k] and indices [rows, k] in 0..n-1."""
        self.rows += len(values)
        self.fired += count_active(indices, self.n, values)
        self.sums += codes_to_dense(values, indices, self.n).abs().sum(0, dtype=torch.float64)

    def l0(self) -> float:
        """Compute the mean number of units that are not zero in a row.

        Raises ValueError before the first row.
        """
        self._check_rows("l0")
        return float(self.fired.sum()) / self.rows

    def dead_panel(self) -> dict[str, float]:
        """Compute the share of dead units, 0..1, under each usual definition.

        "never": not active in any row. "frequency<t": active in less than a share t of the rows
        (with fewer than 1/t rows this is "never"). "mean<t": mean absolute activation over all rows
        below t, in the activation's own units.
        """
        self._check_rows("dead_panel")
        frequency = self.fired.double() / self.rows
        mean = self.sums / self.rows
        panel = {"never": _share(self.fired == 0)}
        panel |= {
            f"frequency<{threshold:.0e}": _share(frequency < threshold)
            for threshold in DEAD_THRESHOLDS
        }
        panel |= {
            f"mean<{threshold:.0e}": _share(mean < threshold) for threshold in DEAD_THRESHOLDS
        }
        return panel

    def _check_rows(self, function: str) -> None:
        if self.rows == 0:
            raise ValueError(f"UnitActivity.{function}: update must have seen at least one row")


def _share(mask: Tensor) -> float:
    """Compute the share of a mask that is true, 0..1."""
    return float(mask.double().mean())
