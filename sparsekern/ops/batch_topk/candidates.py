"""The k*B largest of a batch, by candidates.

The B*n numbers are never sorted. The m largest of each row are candidates, m somewhat above k, and
the k*B largest candidates are found by their threshold. If every row has a candidate that is not
among these, they are the k*B largest of the matrix: all else of the row ranks below that candidate.
A row whose candidates were all taken may hold more. Such rows get more candidates, 2 k*B together;
that is at least twice as many as before for each, as m of the k*B places were its own. This is
repeated until no row has all of its candidates taken. Candidates are listed by ascending flat
index, so of equal values the first in the list is the first in the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..block_sizes import cdiv
from ..checks import check_row
from ..order import key_of


def largest(
    x: torch.Tensor, total: int, select: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `total` largest of x [B, n]: values [total], flat positions [total], ascending."""
    rows, n = x.shape
    largest_m = min(n, total)  # no row can give more
    share = cdiv(total, rows)
    # With independent scores hardly any row has more than twice its share. Twice the candidates
    # cost the kernel a tenth of its time; a row that has more costs another round.
    m = min(largest_m, max(2 * share, share + 16))
    if m == n or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        positions = torch.arange(rows * n, device=x.device)
        return _largest_candidates(x.reshape(-1), positions, total, select)
    values, positions = _candidates(x, None, m, select)
    values, positions = _largest_candidates(values, positions, total, select)
    starts = torch.arange(0, rows * n + 1, n, device=x.device)
    while m < largest_m:
        all_taken = torch.searchsorted(positions, starts).diff() == m
        short_rows = all_taken.nonzero().view(-1)
        if len(short_rows) == 0:
            break
        m = min(largest_m, 2 * total // len(short_rows))  # at least twice as many as before
        more_values, more_positions = _candidates(x, short_rows, m, select)
        kept = ~all_taken[positions // n]
        values = torch.cat((values[kept], more_values))
        positions, order = torch.cat((positions[kept], more_positions)).sort()
        values, positions = _largest_candidates(values[order], positions, total, select)
    return values, positions


def _candidates(
    x: torch.Tensor, row_indices: torch.Tensor | None, m: int, select: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the m largest of each row, or of some rows: values and flat positions, ascending."""
    rows = x if row_indices is None else x[row_indices]
    values, columns, _ = select(rows, m, False, False, False, False)
    if row_indices is None:
        row_indices = torch.arange(len(rows), device=x.device)
    return values.view(-1), columns.add_(row_indices.unsqueeze(1) * x.shape[1]).view(-1)


def _largest_candidates(
    values: torch.Tensor, positions: torch.Tensor, total: int, select: Callable[..., Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `total` largest candidates, as `largest_of_list` does.

    On a CPU the top-k of a single row is three times as fast. On a GPU one block would process the
    whole row.
    """
    if values.is_cuda:
        return largest_of_list(values, positions, total)
    check_row("batch_topk", values, len(values))  # the candidates are one row
    top_values, places, _ = select(values.unsqueeze(0), total, False, False, False, False)
    return top_values.view(-1), positions[places.view(-1)]


def largest_of_list(
    values: torch.Tensor, positions: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `total` largest of a list in the list's order; of equal values the first ones."""
    key = key_of(values)
    threshold = key.topk(total, sorted=False).values.amin()
    greater, equal = key > threshold, key == threshold
    selected = greater | (equal & (equal.cumsum(0) <= total - greater.sum()))
    places = selected.nonzero_static(size=total).view(-1)
    return values[places], positions[places]
