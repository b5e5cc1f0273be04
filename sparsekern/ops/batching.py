"""Rules for torch.vmap.

A rule takes the operation, torch's information on the batch, the batched dimension of each argument
(None where it has none) and the arguments; it returns outputs and their batched dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .count_active.reference import counts_reference


def apply_to_entries(
    operation: Callable[..., Any], info: Any, in_dims: Any, args: tuple[Any, ...]
) -> list[Any]:
    """Apply an operation to each entry of a batch; return a list of its outputs."""
    dims = [*in_dims, *[None] * (len(args) - len(in_dims))]
    outputs = []
    for entry in range(info.batch_size):
        pairs = zip(args, dims, strict=True)
        entry_args = (arg if dim is None else arg.select(dim, entry) for arg, dim in pairs)
        outputs.append(operation(*entry_args))
    return outputs


def one_by_one(operation: Callable[..., Any], info: Any, in_dims: Any, *args: Any) -> Any:
    """Apply an operation entry by entry and stack the outputs: a rule for any operation."""
    outputs = apply_to_entries(operation, info, in_dims, args)
    if isinstance(outputs[0], torch.Tensor):
        return torch.stack(outputs), 0
    return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])


def leading_dimensions(tensors: int) -> Callable[..., Any]:
    """Make a rule that calls an operation once, the batch as one more leading dimension.

    The operation treats all dimensions but the last alike in its first `tensors` arguments.
    """

    def rule(operation: Callable[..., Any], info: Any, in_dims: Any, *args: Any) -> Any:
        moved = [
            arg.movedim(dim, 0) if dim is not None else arg.expand(info.batch_size, *arg.shape)
            for arg, dim in zip(args[:tensors], in_dims[:tensors], strict=True)
        ]
        outputs = operation(*moved, *args[tensors:])
        single = isinstance(outputs, torch.Tensor)
        return outputs, 0 if single else (0,) * len(outputs)

    return rule


_leading_dimensions_of_x = leading_dimensions(1)


def counted_rows(
    operation: Callable[..., Any], info: Any, in_dims: Any, x: torch.Tensor, k: int, *options: Any
) -> Any:
    """Apply a top-k operation once and count each entry's codes by itself.

    The operation's last output counts over all leading dimensions, so it cannot be used here.
    """
    *flags, count = options
    outputs, dims = _leading_dimensions_of_x(operation, info, in_dims, x, k, *flags, False)
    values, indices, no_counts = outputs[-3:]
    n = x.movedim(in_dims[0], 0).shape[-1]
    counts = no_counts.expand(info.batch_size, 0)
    if count:
        counts = torch.stack(
            [counts_reference(i, n, v) for i, v in zip(indices, values, strict=True)]
        )
    return (*outputs[:-1], counts), dims
