"""Triton's interpreter, made quick where it repeats itself.

* A reduction with a function of one's own (`tl.reduce`) calls it element by element, about 20 us
  each: 0.1 s for a block of 4096. The function takes tensors of any shape, so halves of a tensor
  are combined at once.
* Each kernel, and each function that a kernel calls, looks through triton.language for what to
  change, about 2 ms; here this is found once, and changed once for a kernel.
* Sums and products of 32-bit integers are computed in 64 bits, too, for an assertion that follows
  only where its debug option is set. Here they are computed where it is.
* Types are made and translated anew for each operation; here each is once.

Kernels, functions and everything else of the interpreter stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from triton import language
    from triton.language import core  # noqa: F401  (found by the interpreter, as is language)
    from triton.runtime import interpreter as tritons

    by_elements = tritons.ReduceOps.generic_reduce
    change_for = tritons._patch_lang
    builder = tritons.interpreter_builder
    tritons._get_np_dtype, language.block_type.with_element_ty  # noqa: B018
    options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
except (ImportError, AttributeError, TypeError):
    language = tritons = by_elements = None


def install() -> None:
    """Make the interpreter quick; where triton or a part of it is missing, do nothing."""
    if tritons is not None:
        tritons.ReduceOps.generic_reduce = _reduce
        tritons._patch_lang = lambda function: _changes().made()
        builder.options = options
        tritons._get_np_dtype = _once_by_name(tritons._get_np_dtype)
        language.block_type.with_element_ty = _once_by_name(language.block_type.with_element_ty)


def _once_by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function of types once for each of them, which their names tell apart."""
    results: dict[tuple[str, ...], Any] = {}

    @functools.wraps(function)
    def call(*types: Any) -> Any:
        names = tuple([each.name for each in types])
        if names not in results:
            results[names] = function(*types)
        return results[names]

    return call


def _reduce(operation: Any, inputs: Any) -> list[Any]:
    if operation.axis is None:
        return by_elements(operation, inputs)
    return reduce_by_halves(operation, inputs)


class Changes:
    """What the interpreter changes in triton.language while a kernel runs."""

    def __init__(self) -> None:
        scope = change_for(Changes.__init__)  # of which it reads the names in this file
        places = {(owner, name) for owner, name, _ in scope._changes}
        self._during = [(owner, name, vars(owner)[name]) for owner, name in places]
        scope.restore()
        self._before = [(owner, name, vars(owner).get(name)) for owner, name in places]
        self._absent = [(owner, name) for owner, name in places if name not in vars(owner)]
        self._in_force = False

    def made(self) -> Changes:
        """Make them for a kernel; for a function that it calls they are made already."""
        if not self._in_force:
            self._in_force = True
            self._set(self._during)
        return self

    def restore(self) -> None:
        """Undo them, at the end of a kernel."""
        self._in_force = False
        self._set(self._before)
        for owner, name in self._absent:
            delattr(owner, name)

    @staticmethod
    def _set(members: list[tuple[Any, str, Any]]) -> None:
        for owner, name, value in members:
            setattr(owner, name, value)


_changes = functools.cache(Changes)


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
