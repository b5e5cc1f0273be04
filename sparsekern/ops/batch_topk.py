"""The k*B largest of a whole batch of B rows: BatchTopK.

Definition, for a matrix x of B rows and n columns, flattened row by row, with elements ordered by
value (largest first, NaN before +inf, -0 equal to +0) and then by flat index (smallest first):

    batch_topk(x, k) = y with y_i = x_i for the first floor(k * B) elements of that order, else 0

Gradient: selection is locally constant, so dx = dy masked to what was kept; an element that ReLU
set to zero gets none. It is written with public operations, so that every backend shares it and a
second derivative exists.

Source: Bussmann, Leask and Nanda 2024, BatchTopK sparse autoencoders (arXiv 2412.06410), section 3.

How B*n numbers are never sorted: the m largest of each row are candidates, m somewhat above k, and
the k*B largest candidates are found by their threshold. They are the k*B largest of the matrix if
no row had all of its candidates taken: whatever such a row left out comes after its last
candidate, which was not taken. Rows that fail this certificate share 2 k*B new candidates, each at
least twice as many as before since each had filled m places of k*B; and so on until none fails.
Candidates stand in the order of their flat index; the first among equals is then the first in the
list.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch

from ..dispatch import library
from .batching import one_by_one
from .checks import check_count, check_floating, check_row
from .order import ordered_key
from .topk import passed_by_relu


def batch_topk(x: torch.Tensor, k: int | float, *, relu: bool = False) -> torch.Tensor:
    """Return x with everything but the k*B largest of its B rows together set to zero.

    Equivalent PyTorch, but with one definite answer for equal values::

        values, positions = x.flatten().topk(int(k * B))
        masked = torch.zeros_like(x).flatten().scatter(0, positions, values).view_as(x)

    Args:
        x: [..., n] float32, bfloat16, float16 or float64; any strides. B is the product of the
            leading dimensions, 1 if there are none.
        k: how many to keep per row on average, an integer in 1..n or a float in 0..n with
            int(k * B) >= 1; may differ from call to call.
        relu: also zero the kept values that are <= 0.

    Returns:
        [..., n], contiguous, of x's dtype, differentiable with respect to x.

    Raises:
        TypeError: x is not floating point, or k is not a number.
        ValueError: x has no dimension, k is out of range, or int(k * B) is 0.

    Note:
        Equal values are ordered by flat index, smallest first, so the result is the same on every
        backend, device and thread count. NaN ranks above +inf; -0.0 equals +0.0. A row may keep
        anything between none and all of its elements. The backward pass keeps k*B indices, not a
        mask. Memory: the output, candidates of about 2 k*B elements, and a copy of the rows (at
        most half of them) that hold more than twice their share. On a GPU the host waits once for
        each round of candidates, mostly one; while a CUDA graph is captured all of x are
        candidates, which needs no waiting but several passes.

    Example:
        >>> import torch, sparsekern
        >>> sparsekern.batch_topk(torch.tensor([[3.0, 1.0, 2.0], [0.5, 0.2, 0.1]]), 1).tolist()
        [[3.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    """
    return batch_mask(x, k, relu=relu)[0]


def batch_mask(
    x: torch.Tensor, k: int | float, *, relu: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`batch_topk` with what its kernels know besides: (masked [..., n], values [total], positions
    int64 [total]).

    total = int(k * B); positions are flat, ascending; both outputs of floats are differentiable.
    """
    op = "batch_topk"
    check_floating(op, "x", x)
    n = x.shape[-1]
    k = check_share(op, "k", k, n, "the size of the last dimension")
    rows = math.prod(x.shape[:-1])
    total = kept_in_all(op, k, rows) if rows > 0 else 0
    return _batch_topk(x, total, relu)


def kept_in_all(op: str, k: int | float, rows: int) -> int:
    """k * rows, rounded down and at least 1."""
    total = int(k * rows)
    if total < 1:
        raise ValueError(f"{op}: k must keep at least one element of {rows} rows, got {k}")
    return total


def check_share(op: str, name: str, k: int | float, upper: int, what: str) -> int | float:
    """An integer in 1..upper, or a float above 0 and at most upper."""
    if not isinstance(k, (float, torch.SymFloat)):
        real = isinstance(k, numbers.Real) and not isinstance(k, numbers.Integral)
        if not real:
            return check_count(op, name, k, upper, what)
        k = float(k)
    if not 0 < k <= upper:
        raise ValueError(f"{op}: {name} must be above 0 and at most {upper} ({what}), got {k}")
    return k


# -- reference -------------------------------------------------------------------------------------


def batch_topk_reference(
    x: torch.Tensor, total: int, relu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = x.reshape(-1)
    key = ordered_key(flat)
    positions = key.sort(descending=True, stable=True).indices[:total].sort().values
    values = flat[positions]
    if relu:
        values = torch.where(values <= 0, 0, values)
    masked = torch.zeros_like(flat).scatter(0, positions, values)
    return masked.view(x.shape), values, positions


def _fake(x: torch.Tensor, total: int, relu: bool) -> Any:
    values = x.new_empty(total)
    return x.new_empty(x.shape), values, torch.empty_like(values, dtype=torch.int64)


# -- by candidates ---------------------------------------------------------------------------------


def _by_candidates(backend: str) -> Any:
    def run(x: torch.Tensor, total: int, relu: bool) -> Any:
        if x.numel() == 0:
            return batch_topk_reference(x, total, relu)
        if not 0 < total <= x.numel():
            raise ValueError(
                f"batch_topk: total must lie in 1..{x.numel()} (the size of x), got {total}"
            )
        check_row("batch_topk", x, x.shape[-1])
        kernels = library.kernels(backend, "topk")
        rows = x.reshape(-1, x.shape[-1])
        values, positions = _largest(rows, total, kernels.topk)
        if relu:
            values = torch.where(values <= 0, 0, values)
        # One zero per row through the kernel: it fills a matrix in a fifth of torch.zeros' time.
        none = torch.zeros(len(rows), 1, dtype=torch.int64, device=x.device)
        masked = kernels.codes_to_dense(none.to(x.dtype), none, x.shape[-1])
        masked.view(-1)[positions] = values
        return masked.view(x.shape), values, positions

    return run


def _largest(
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
    key = ordered_key(values)
    threshold = key.topk(total, sorted=False).values.amin()
    above, equal = key > threshold, key == threshold
    taken = above | (equal & (equal.cumsum(0) <= total - above.sum()))
    chosen = taken.nonzero_static(size=total).view(-1)
    return values[chosen], positions[chosen]


# -- gradient, shared by every backend -------------------------------------------------------------


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, relu = inputs
    _, values, positions = output
    ctx.shape = x.shape
    ctx.mark_non_differentiable(positions)
    ctx.save_for_backward(positions, passed_by_relu(values) if relu else None)


def _backward(ctx: Any, grad_masked: torch.Tensor, grad_values: torch.Tensor, *_: Any) -> Any:
    positions, passed = ctx.saved_tensors
    grad = grad_masked.reshape(-1)[positions] + grad_values
    if passed is not None:  # ReLU: what ended at zero passes nothing on
        grad = torch.where(passed, grad, 0)
    dense = grad.new_zeros(math.prod(ctx.shape)).scatter(0, positions, grad)
    return dense.view(ctx.shape), None, None


_batch_topk: Callable[..., Any] = library.define(
    "batch_topk",
    "(Tensor x, SymInt total, bool relu) -> (Tensor masked, Tensor values, Tensor positions)",
    reference=batch_topk_reference,
    implementations={"native": _by_candidates("native"), "triton": _by_candidates("triton")},
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=one_by_one(lambda: _batch_topk),
)
