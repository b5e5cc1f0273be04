"""Exact selections among the latents of all processes, from the candidates of each.

A latent that is among the k largest of a row is among the k largest of those of its process. So
each process gives its own k largest, and what all of them select from these by the library's total
order (value, then index) is what one process would select from all scores. Nothing is searched by
rounds of thresholds, and no score but the candidates' is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.batch_topk.candidates import largest_of_list
from ..ops.topk import topk
from .collectives import Group

# Indices and positions of places that a process leaves empty: after all others.
NO_INDEX = 2**31 - 1
NO_POSITION = 2**63 - 1


@torch.no_grad()
def select_in_rows(values: Tensor, indices: Tensor, k: int, width: int, group: Group) -> Tensor:
    """Select the k largest of each row among the candidates of all processes.

    Args:
        values: [..., m] of this process, the same leading dimensions in all of them.
        indices: int64 [..., m], counted over all processes, below 2^31 - 1.
        k: how many to select; together the processes have at least as many.
        width: m of the process that has most candidates.
        group: the processes.

    Returns:
        bool [..., m]: True for the candidates of this process that are selected.
    """
    m = values.shape[-1]
    if group.size == 1 and m == k:
        return torch.ones_like(indices, dtype=torch.bool)
    missing = (0, width - m)
    values = torch.nn.functional.pad(values, missing, value=-torch.inf)
    indices = torch.nn.functional.pad(indices.int(), missing, value=NO_INDEX)
    all_values, all_indices = (
        gathered.movedim(0, -2).flatten(-2) for gathered in group.gather_bytes(values, indices)
    )
    order = all_indices.argsort(dim=-1, stable=True)
    # Of equal values the first in order is taken, the one of the lowest index.
    _, places = topk(all_values.gather(-1, order), k, sorted=False)
    selected = torch.zeros_like(order, dtype=torch.bool)
    selected.scatter_(-1, order.gather(-1, places), True)
    return selected[..., group.rank * width : group.rank * width + m]


@torch.no_grad()
def select_in_batch(
    values: Tensor, positions: Tensor, total: int, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the largest candidates of all processes, as many as `total` or all there are.

    Args:
        values: [m] of this process.
        positions: int64 [m], in the order of which equal values are taken.
        total: how many to select.
        group: the processes.

    Returns:
        bool [m], True for the candidates of this process that are selected, and values and
        positions of all that are selected, by ascending position.
    """
    m = len(values)
    if m > total:
        order = positions.argsort()
        values, places = largest_of_list(values[order], order, total)
        selected = torch.zeros(m, dtype=torch.bool, device=values.device)
        selected[places], *best = select_in_batch(values, positions[places], total, group)
        return selected, best[0], best[1]
    missing = (0, total - m)
    values = torch.nn.functional.pad(values, missing, value=-torch.inf)
    positions = torch.nn.functional.pad(positions, missing, value=NO_POSITION)
    all_values, all_positions = group.gather_bytes(values, positions)
    all_positions, order = all_positions.flatten().sort(stable=True)
    kept, places = largest_of_list(
        all_values.flatten()[order], torch.arange(len(order), device=order.device), total
    )
    selected = torch.zeros_like(order, dtype=torch.bool)
    selected[order[places]] = True
    begin = group.rank * total
    positions = all_positions[places]
    exist = positions < NO_POSITION
    return selected[begin : begin + m], kept[exist], positions[exist]
