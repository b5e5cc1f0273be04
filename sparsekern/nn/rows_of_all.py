"""Selections among the rows of all processes, from the candidates of each."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.batch_topk import batch_mask_of, kept_in_all
from ..ops.batch_topk.candidates import largest_of_list


@torch.no_grad()
def select_among_all(x: Tensor, k: int | float) -> tuple[int, Tensor]:
    """Select the k B largest entries of all processes' rows, B of them together.

    Equal values are ordered by process, then by place, as in one process that has the rows of all,
    those of the first process first. Each process sends as many values as all keep together.

    Args:
        x: [..., n] of this process; the same n in all.
        k: how many to keep of a row on average.

    Returns:
        How many of them are entries of x: its largest. And the values of all of them.
    """
    rows = math.prod(x.shape[:-1])
    rows_of_each = [int(count) for count in gather_from_all(torch.tensor([rows], device=x.device))]
    total = kept_in_all("BatchTopK", k, sum(rows_of_each))
    candidates = x.reshape(-1)
    if candidates.numel() > total:
        candidates = batch_mask_of(x.detach(), total)[1]
    padded = torch.nn.functional.pad(candidates, (0, total - len(candidates)))
    sizes = [min(total, count * x.shape[-1]) for count in rows_of_each]
    every = torch.cat(
        [part[:size] for part, size in zip(gather_from_all(padded), sizes, strict=True)]
    )
    kept, places = largest_of_list(every, torch.arange(len(every), device=x.device), total)
    begin = sum(sizes[: dist.get_rank()])
    here = (places >= begin) & (places < begin + sizes[dist.get_rank()])
    return int(here.sum()), kept


def rows_of_all(rows: int, device: torch.device) -> int:
    """Return the number of rows of all processes together."""
    return sum(int(count) for count in gather_from_all(torch.tensor([rows], device=device)))


def gather_from_all(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, of one shape and dtype."""
    own = tensor.contiguous().reshape(-1).view(torch.uint8)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return [part.view(tensor.dtype).view(tensor.shape) for part in parts]
