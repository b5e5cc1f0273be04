"""Rules for torch.vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .count_active.reference import counts_reference


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


def leading_dimensions(op: Any, tensors: int) -> Any:
    """A vmap rule for an operation that treats all dimensions but the last alike in its first
    `tensors` arguments."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        moved = [
            arg.movedim(dim, 0) if dim is not None else arg.expand(info.batch_size, *arg.shape)
            for arg, dim in zip(args[:tensors], in_dims[:tensors], strict=True)
        ]
        outputs = op()(*moved, *args[tensors:])
        single = isinstance(outputs, torch.Tensor)
        return outputs, 0 if single else (0,) * len(outputs)

    return rule


def counted_rows(op: Any) -> Any:
    """The same for operations whose last output counts over all leading dimensions: counted once
    per batch entry."""
    leading = leading_dimensions(op, 1)

    def rule(info: Any, in_dims: Any, x: torch.Tensor, k: int, *options: Any) -> Any:
        *flags, counted = options
        outputs, dims = leading(info, in_dims, x, k, *flags, False)
        values, indices, empty = outputs[-3:]
        n = x.movedim(in_dims[0], 0).shape[-1]
        counts = empty.expand(info.batch_size, 0)
        if counted:
            counts = torch.stack(
                [counts_reference(i, n, v) for i, v in zip(indices, values, strict=True)]
            )
        return (*outputs[:-1], counts), dims

    return rule
