"""The k largest of each row, as codes or as a masked dense tensor.

Definition, for a row x of n values, ordered by value (largest first, NaN before +inf, -0 equal to
+0) and then by index (smallest first):

    topk(x, k)      = the first k pairs (x_i, i) of that order
    topk_mask(x, k) = y with y_i = x_i for the indices of topk(x, k), else 0

Gradient: selection is locally constant, so dx = scatter(dvalues, indices) and dx = dy masked to the
indices; a selected value that ReLU set to zero gets none. Both are written with public operations,
so that every backend shares them and a second derivative exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch

from ..dispatch import library
from .activity import counts_reference
from .checks import check_codes, check_count, check_floating, check_range, check_row, check_size
from .exported import exported
from .order import ordered_key


@exported("sparsekern.ops.topk.Codes")
class Codes(NamedTuple):
    """Sparse codes: values [..., k] and indices int64 [..., k]."""

    values: torch.Tensor
    indices: torch.Tensor


class CountedCodes(NamedTuple):
    """Sparse codes with counts int64 [n]: how many rows each latent fired in."""

    values: torch.Tensor
    indices: torch.Tensor
    counts: torch.Tensor


@overload
def topk(
    x: torch.Tensor, k: int, *, sorted: bool = ..., relu: bool = ..., abs: bool = ...,
    return_counts: Literal[False] = ...,
) -> Codes: ...  # fmt: skip


@overload
def topk(
    x: torch.Tensor, k: int, *, sorted: bool = ..., relu: bool = ..., abs: bool = ...,
    return_counts: Literal[True],
) -> CountedCodes: ...  # fmt: skip


@overload
def topk(
    x: torch.Tensor, k: int, *, sorted: bool = ..., relu: bool = ..., abs: bool = ...,
    return_counts: bool,
) -> Codes | CountedCodes: ...  # fmt: skip


def topk(
    x: torch.Tensor,
    k: int,
    *,
    sorted: bool = True,
    relu: bool = False,
    abs: bool = False,
    return_counts: bool = False,
) -> Codes | CountedCodes:
    """Return the k largest values of the last dimension and their indices.

    Equivalent PyTorch, but with one definite answer for equal values::

        order = x.sort(dim=-1, descending=True, stable=True)
        values, indices = order.values[..., :k], order.indices[..., :k]

    Args:
        x: [..., n] float32, bfloat16, float16 or float64; any strides, any number of leading
            dimensions.
        k: how many to keep, 1..n; may differ from call to call.
        sorted: True gives the largest first; False gives ascending indices, which is cheaper.
        relu: set selected values <= 0 to zero after the selection; their slots and indices stay.
        abs: select by magnitude; the values returned keep their sign.
        return_counts: also count, in the same kernel, in how many rows each latent fired (was
            selected with a value other than zero).

    Returns:
        Codes(values, indices): values [..., k] of x's dtype, differentiable with respect to x;
        indices [..., k] int64. With return_counts, CountedCodes adds counts [n] int64.

    Raises:
        TypeError: x is not floating point, or k is not an integer.
        ValueError: x has no dimension, or k is outside 1..n.

    Note:
        Equal values are ordered by index, smallest first, so the result is the same on every
        backend, device and thread count. NaN ranks above +inf; -0.0 equals +0.0. Memory: the
        outputs, plus at most 64 KiB a thread on the CPU.

    Example:
        >>> import torch, sparsekern
        >>> values, indices = sparsekern.topk(torch.tensor([[0.1, 0.7, 0.7, -1.0]]), 2)
        >>> indices.tolist()
        [[1, 2]]
    """
    check_floating("topk", "x", x)
    k = check_count("topk", "k", k, x.shape[-1], "the size of the last dimension")
    values, indices, counts = _topk(x, k, sorted, relu, abs, return_counts)
    return CountedCodes(values, indices, counts) if return_counts else Codes(values, indices)


def topk_mask(x: torch.Tensor, k: int, *, relu: bool = False, abs: bool = False) -> torch.Tensor:
    """Return x with everything but the k largest of each row set to zero.

    Equivalent PyTorch::

        values, indices = sparsekern.topk(x, k)
        masked = torch.zeros_like(x).scatter(-1, indices, values)

    Args:
        x: [..., n] float32, bfloat16, float16 or float64; any strides.
        k: how many to keep, 1..n.
        relu: also zero the kept values that are <= 0.
        abs: keep the largest magnitudes instead; values keep their sign.

    Returns:
        [..., n], contiguous, of x's dtype, differentiable with respect to x.

    Raises:
        TypeError: x is not floating point, or k is not an integer.
        ValueError: x has no dimension, or k is outside 1..n.

    Note:
        One kernel selects and writes the masked row. Ties, NaN and signed zeros as in `topk`. The
        backward pass keeps only the k indices of a row, not a mask.

    Example:
        >>> import torch, sparsekern
        >>> sparsekern.topk_mask(torch.tensor([3.0, 1.0, 2.0]), 2).tolist()
        [3.0, 0.0, 2.0]
    """
    return mask_with_codes(x, k, relu=relu, abs=abs)[0]


def mask_with_codes(
    x: torch.Tensor, k: int, *, relu: bool = False, abs: bool = False, return_counts: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`topk_mask` with what its kernel knows besides: (masked [..., n], values [..., k], indices
    [..., k], counts).

    Indices are in ascending order; counts is int64 [n], or [0] unless return_counts.
    """
    check_floating("topk_mask", "x", x)
    k = check_count("topk_mask", "k", k, x.shape[-1], "the size of the last dimension")
    return _topk_mask(x, k, relu, abs, return_counts)


def codes_to_dense(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    """Write codes whose indices are unique within a row into a dense tensor.

    Equivalent PyTorch: ``values.new_zeros(*values.shape[:-1], n).scatter(-1, indices, values)``

    Args:
        values: [..., k] floating point.
        indices: [..., k] int64 or int32, unique within a row, in 0..n-1 (as from `topk`).
        n: width of the result.

    Returns:
        [..., n] of values' dtype, differentiable with respect to values.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.
        IndexError: an index outside 0..n-1 (not on a GPU, unless SPARSEKERN_DEBUG=1).
    """
    check_codes("codes_to_dense", values, indices)
    n = check_count("codes_to_dense", "n", n, 2**31 - 1, "the largest index")
    return _codes_to_dense(values, indices, n)


# -- reference -------------------------------------------------------------------------------------


def topk_reference(
    x: torch.Tensor, k: int, sorted: bool, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    key = ordered_key(x.abs() if abs else x)
    indices = key.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    if not sorted:
        indices = indices.sort(dim=-1).values
    values = x.gather(-1, indices)
    if relu:
        values = torch.where(values <= 0, 0, values)
    n = x.shape[-1]
    counts = counts_reference(indices, n, values) if count else indices.new_empty(0)
    return values, indices, counts


def topk_mask_reference(
    x: torch.Tensor, k: int, relu: bool, abs: bool, count: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    values, indices, counts = topk_reference(x, k, False, relu, abs, count)
    return codes_to_dense_reference(values, indices, x.shape[-1]), values, indices, counts


def codes_to_dense_reference(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    check_range("codes_to_dense", indices, n)
    return values.new_zeros(*values.shape[:-1], n).scatter(-1, indices.long(), values)


# -- shapes without data ---------------------------------------------------------------------------


def _topk_fake(x: torch.Tensor, k: int, sorted: bool, relu: bool, abs: bool, count: bool) -> Any:
    values = x.new_empty(*x.shape[:-1], k)
    counts = x.new_empty(x.shape[-1] if count else 0, dtype=torch.int64)
    return values, torch.empty_like(values, dtype=torch.int64), counts


def _topk_mask_fake(x: torch.Tensor, k: int, relu: bool, abs: bool, count: bool) -> Any:
    return x.new_empty(x.shape), *_topk_fake(x, k, False, relu, abs, count)


def _codes_to_dense_fake(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    return values.new_empty(*values.shape[:-1], n)


# -- kernels take matrices -------------------------------------------------------------------------


def _rows(backend: str, name: str, reference: Any) -> Any:
    """A backend's function of non-empty matrices, for any leading dimensions."""

    def run(x: torch.Tensor, k: int, *options: Any) -> Any:
        if x.numel() == 0:
            return reference(x, k, *options)
        check_count(name, "k", k, x.shape[-1], "the size of the last dimension")
        check_row(name, x, x.shape[-1])
        kernel = getattr(library.kernels(backend, "topk"), name)
        if x.dim() == 2 or (backend == "native" and x.is_contiguous()):
            return kernel(x, k, *options)
        *rows, counts = kernel(x.reshape(-1, x.shape[-1]), k, *options)
        return *(t.view(*x.shape[:-1], t.shape[-1]).detach() for t in rows), counts

    return run


def _check_codes_to_dense(values: torch.Tensor, indices: torch.Tensor, n: int) -> None:
    check_codes("codes_to_dense", values, indices)
    check_size("codes_to_dense", "n", n)


def _rows_to_dense(backend: str) -> Any:
    def run(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
        check_range("codes_to_dense", indices, n)
        if values.numel() == 0:
            return codes_to_dense_reference(values, indices, n)
        k = values.shape[-1]
        dense = library.kernels(backend, "topk").codes_to_dense(
            values.reshape(-1, k).contiguous(), indices.reshape(-1, k).long().contiguous(), n
        )
        return dense.view(*values.shape[:-1], n)

    return run


# -- gradients, shared by every backend ------------------------------------------------------------


def _setup_topk(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, _, relu, _, _ = inputs
    values, indices, _ = output
    ctx.n = x.shape[-1]
    ctx.save_for_backward(indices, passed_by_relu(values) if relu else None)


def _topk_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
    indices, passed = ctx.saved_tensors
    return _grad_to_dense(grad, indices, passed, ctx.n), None, None, None, None, None


def _setup_topk_mask(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, relu, _, _ = inputs
    _, values, indices, _ = output
    ctx.n = x.shape[-1]
    ctx.save_for_backward(indices, passed_by_relu(values) if relu else None)


def _topk_mask_backward(
    ctx: Any, grad_masked: torch.Tensor, grad_values: torch.Tensor, *_: Any
) -> Any:
    indices, passed = ctx.saved_tensors
    grad = grad_masked.gather(-1, indices) + grad_values
    return _grad_to_dense(grad, indices, passed, ctx.n), None, None, None, None


def passed_by_relu(values: torch.Tensor) -> torch.Tensor:
    """Where values after ReLU have a gradient. Backward passes keep this and not the values, which
    the caller may change in place."""
    return values != 0  # above zero or NaN


def _grad_to_dense(
    grad: torch.Tensor, indices: torch.Tensor, passed: torch.Tensor | None, n: int
) -> torch.Tensor:
    if passed is not None:  # ReLU: a slot that ended at zero passes nothing on
        grad = torch.where(passed, grad, 0)
    return _codes_to_dense(grad, indices, n)


def _setup_codes_to_dense(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _codes_to_dense_backward(ctx: Any, grad: torch.Tensor) -> Any:
    (indices,) = ctx.saved_tensors
    return grad.gather(-1, indices.long()), None, None


# -- vmap: a batch dimension is one more leading dimension -----------------------------------------


def _leading_vmap(op: Any, tensors: int) -> Any:
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


def _counted_vmap(op: Any) -> Any:
    """The same for operations whose last output counts over all leading dimensions: counted once
    per batch entry."""
    leading = _leading_vmap(op, 1)

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


_implementations = {
    backend: {
        "topk": _rows(backend, "topk", topk_reference),
        "topk_mask": _rows(backend, "topk_mask", topk_mask_reference),
        "codes_to_dense": _rows_to_dense(backend),
    }
    for backend in ("native", "triton")
}


def _of(name: str) -> dict[str, Any]:
    return {backend: functions[name] for backend, functions in _implementations.items()}


_topk: Callable[..., Any] = library.define(
    "topk",
    "(Tensor x, SymInt k, bool sorted, bool relu, bool abs, bool count)"
    " -> (Tensor values, Tensor indices, Tensor counts)",
    reference=topk_reference,
    implementations=_of("topk"),
    fake=_topk_fake,
    setup_context=_setup_topk,
    backward=_topk_backward,
    vmap=_counted_vmap(lambda: _topk),
    owned=True,
)
_topk_mask: Callable[..., Any] = library.define(
    "topk_mask",
    "(Tensor x, SymInt k, bool relu, bool abs, bool count)"
    " -> (Tensor masked, Tensor values, Tensor indices, Tensor counts)",
    reference=topk_mask_reference,
    implementations=_of("topk_mask"),
    fake=_topk_mask_fake,
    setup_context=_setup_topk_mask,
    backward=_topk_mask_backward,
    vmap=_counted_vmap(lambda: _topk_mask),
    owned=True,
)
_codes_to_dense: Callable[..., Any] = library.define(
    "codes_to_dense",
    "(Tensor values, Tensor indices, SymInt n) -> Tensor",
    reference=codes_to_dense_reference,
    implementations=_of("codes_to_dense"),
    fake=_codes_to_dense_fake,
    check=_check_codes_to_dense,
    setup_context=_setup_codes_to_dense,
    backward=_codes_to_dense_backward,
    vmap=_leading_vmap(lambda: _codes_to_dense, 2),
)
