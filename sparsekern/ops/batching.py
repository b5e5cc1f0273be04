"""Rules for torch.vmap of operations that take one entry of a batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def each_entry(op: Callable[..., Any], info: Any, in_dims: Any, args: tuple[Any, ...]) -> list[Any]:
    """What the operation returns for each entry of the batch."""
    dims = [*in_dims, *[None] * (len(args) - len(in_dims))]
    found = []
    for entry in range(info.batch_size):
        pairs = zip(args, dims, strict=True)
        found.append(op(*(arg if dim is None else arg.select(dim, entry) for arg, dim in pairs)))
    return found


def one_by_one(op: Callable[[], Callable[..., Any]]) -> Any:
    """A vmap rule: entry by entry, stacked."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        found = each_entry(op(), info, in_dims, args)
        if isinstance(found[0], torch.Tensor):
            return torch.stack(found), 0
        return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])

    return rule
