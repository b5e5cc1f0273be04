"""Triton's interpreter, made quick where it calls Python for every element of a tensor.

A reduction with a function of one's own (`tl.reduce`) is done there element by element, about 20 us
each: 0.1 s for a block of 4096. The function takes tensors of any shape, so halves of a tensor are
combined at once. Kernels, functions and everything else of the interpreter stay as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from triton.runtime.interpreter import ReduceOps

    by_elements = ReduceOps.generic_reduce
except (ImportError, AttributeError):
    ReduceOps = by_elements = None


def install() -> None:
    """Let the interpreter reduce by halves; where triton or its method is missing, do nothing."""

    def reduce(operation: Any, inputs: Any) -> list[Any]:
        if operation.axis is None:
            return by_elements(operation, inputs)
        return reduce_by_halves(operation, inputs)

    if by_elements is not None:
        ReduceOps.generic_reduce = reduce


def reduce_by_halves(operation: Any, inputs: Any) -> list[Any]:
    """Reduce tensors along an axis: the first half of it is combined with the second, and so on.

    Which elements meet first differs from the interpreter's own order, as it does on a GPU: what
    is combined must be associative and commutative.

    Args:
        operation: the interpreter's `ReduceOps`, with an axis.
        inputs: its tensors, of one shape; lengths are powers of two.
    """
    axis, dtypes = operation.axis, [each.dtype for each in inputs]
    parts = [each.handle.data for each in inputs]
    while (length := parts[0].shape[axis]) > 1:
        sides = [np.split(part, [length // 2], axis) for part in parts]
        left = [operation.to_tensor(a, d) for (a, _), d in zip(sides, dtypes, strict=True)]
        right = [operation.to_tensor(b, d) for (_, b), d in zip(sides, dtypes, strict=True)]
        combined = operation.combine_fn.fn(*left, *right)
        combined = combined if isinstance(combined, tuple) else (combined,)
        parts = [each.handle.data for each in combined]
    if not operation.keep_dims:
        parts = [part.squeeze(axis) for part in parts]
    return [
        operation.to_tensor(part if part.ndim else part.item(), dtype)
        for part, dtype in zip(parts, dtypes, strict=True)
    ]
