"""The k*B largest of a batch, by candidates.

How B*n numbers are never sorted: the m largest of each row are candidates, m somewhat above k, and
the k*B largest candidates are found by their threshold. They are the k*B largest of the matrix if
no row had all of its candidates taken: whatever such a row left out comes after its last
candidate, which was not taken. Rows that fail this certificate share 2 k*B new candidates, each at
least twice as many as before since each had filled m places of k*B; and so on until none fails.
Candidates stand in the order of their flat index; the first among equals is then the first in the
list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..checks import check_row
from ..order import key_of


def largest(
    x: torch.Tensor, total: int, select: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `total` largest of x [B, n]: values [total] and flat positions [total], ascending."""
    rows, n = x.shape
    most = min(n, total)  # no row can give more
    share = -(-total // rows)
    # Twice the share holds nearly every row of independent scores; twice as many cost the row
    # kernel a tenth of its time, and a row with more costs one more round.
    m = min(most, max(2 * share, share + 16))
    if m == n or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        positions = torch.arange(rows * n, device=x.device)
        return _first(x.reshape(-1), positions, total, select)
    values, positions = _candidates(x, None, m, select)
    values, positions = _first(values, positions, total, select)
    starts = torch.arange(0, rows * n + 1, n, device=x.device)
    while m < most:
        filled = torch.searchsorted(positions, starts).diff() == m
        chosen = filled.nonzero().view(-1)
        if len(chosen) == 0:
            break
        m = min(most, 2 * total // len(chosen))  # at least twice as many as before
        more_values, more_positions = _candidates(x, chosen, m, select)
        kept = ~filled[positions // n]
        values = torch.cat((values[kept], more_values))
        positions, order = torch.cat((positions[kept], more_positions)).sort()
        values, positions = _first(values[order], positions, total, select)
    return values, positions


def _candidates(
    x: torch.Tensor, chosen: torch.Tensor | None, m: int, select: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The m largest of all or of the chosen rows: values and flat positions, ascending."""
    rows = x if chosen is None else x[chosen]
    values, columns, _ = select(rows, m, False, False, False, False)
    if chosen is None:
        chosen = torch.arange(len(rows), device=x.device)
    return values.view(-1), columns.add_(chosen.unsqueeze(1) * x.shape[1]).view(-1)


def _first(
    values: torch.Tensor, positions: torch.Tensor, total: int, select: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`first_of_list`, on a CPU as the top-k of a single row: three times as fast there, while on a
    GPU one block would have the row to itself."""
    if values.is_cuda:
        return first_of_list(values, positions, total)
    check_row("batch_topk", values, len(values))  # all candidates
    taken, chosen, _ = select(values.unsqueeze(0), total, False, False, False, False)
    return taken.view(-1), positions[chosen.view(-1)]


def first_of_list(
    values: torch.Tensor, positions: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `total` largest of a list, the first among equals, in the order of the list."""
    key = key_of(values)
    threshold = key.topk(total, sorted=False).values.amin()
    above, equal = key > threshold, key == threshold
    taken = above | (equal & (equal.cumsum(0) <= total - above.sum()))
    chosen = taken.nonzero_static(size=total).view(-1)
    return values[chosen], positions[chosen]
