"""Copies of weights in bfloat16 that are kept from one call to the next."""

from __future__ import annotations

import threading
import weakref

import torch

from . import native
from .rounded import Rounded, room_for

# Rows of a kept weight that each call compares with the copy, and elements of each.
COMPARED_ROWS = 1024
COMPARED_ELEMENTS = 16


def _round(rows: torch.Tensor) -> Rounded:
    return native.round_rows(rows, room_for(rows))


class RoundedWeight:
    """A weight's copy in bfloat16, which `linear_topk` reads instead while this object lives.

    Made by `keep_rounded`. It can be used in a with statement, at whose end the copy is released.

    Attributes:
        weight: [N, D] float32, the tensor that was given.

    Example:
        >>> import torch, sparsekern
        >>> kept = sparsekern.keep_rounded(torch.randn(4096, 64))
        >>> kept.nbytes  # made at the first call that uses it
        0
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self._lock = threading.Lock()
        self._calls = 0
        self._made_of: tuple[object, ...] = ()
        self._rounded: Rounded | None = None
        _kept.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy: half of the weight's, and eight for each row; zero when released."""
        return 0 if self._rounded is None else sum(tensor.nbytes for tensor in self._rounded)

    def refresh(self) -> None:
        """Make the copy again at the next call."""
        self._made_of = ()

    def release(self) -> None:
        """Give the copy's memory back; from now on `linear_topk` reads the weight itself."""
        _kept.discard(self)
        self._rounded = None

    def __enter__(self) -> RoundedWeight:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def is_of(self, weight: torch.Tensor) -> bool:
        """Return True if this is the copy of a weight: the same numbers in the same memory."""
        mine = self.weight
        return (
            mine.data_ptr() == weight.data_ptr()
            and mine.shape == weight.shape
            and mine.stride() == weight.stride()
        )

    def current(self) -> Rounded:
        """Return the copy, made again if the weight changed."""
        weight = self.weight.detach()
        with self._lock:
            state = (weight._version, weight.data_ptr(), weight.shape, weight.stride())
            if self._rounded is None or state != self._made_of or not self._agrees(weight):
                self._rounded = _round(weight)
                self._made_of = state
            return self._rounded

    def _agrees(self, weight: torch.Tensor) -> bool:
        """Return False if a part of the weight, another one at each call, is not what was copied.

        torch counts no changes made through `Tensor.data`, numpy or other libraries.
        """
        assert self._rounded is not None
        n, d = weight.shape
        step = max(1, n // COMPARED_ROWS)
        self._calls += 1
        rows = slice(self._calls % step, None, step)
        first = self._calls * COMPARED_ELEMENTS % d
        columns = slice(first, min(first + COMPARED_ELEMENTS, d))
        again = _round(weight[rows, columns].contiguous())
        return torch.equal(
            again.rows.view(torch.int16), self._rounded.rows[rows, columns].view(torch.int16)
        )


_kept: weakref.WeakSet[RoundedWeight] = weakref.WeakSet()


def keep_rounded(weight: torch.Tensor) -> RoundedWeight:
    """Keep a weight's copy in bfloat16, so that `linear_topk` of a few rows reads half as much.

    `linear_topk` of a float32 layer screens its latents by a product in bfloat16 and computes the
    scores of those that may be selected in float32: results are the same with and without the copy.
    With many rows, rounding the weight anew in each call costs little. With up to some thirty it
    costs more than it saves, and this is for them, where the weight is too large for the caches.

    Args:
        weight: [N, D] float32 on a CPU, as it is given to `linear_topk`; one stride is 1.

    Returns:
        The copy, which is used while the returned object lives: until its `release`, the end of its
        with statement, or its last reference. `nbytes` tells its size, half of the weight's.

    Raises:
        TypeError: no tensor of float32.
        ValueError: another shape, stride or device, or an inference tensor, whose changes torch
            does not count.

    Note:
        The copy is made at the first call that uses it, and again after a change that torch counts:
        in place, by an optimizer, by load_state_dict, by `set_`. Changes that torch does not count
        (through `Tensor.data`, numpy or other aliases) are noticed where they reach the sixteen
        elements in each of about a thousand rows, other ones each time, that every call compares;
        a change of single elements may not: call `refresh` after one.

    Example:
        >>> import torch, sparsekern
        >>> weight = torch.randn(4096, 64)
        >>> with sparsekern.keep_rounded(weight):
        ...     codes = sparsekern.linear_topk(torch.randn(1, 64), weight, None, 8)
    """
    op = "keep_rounded"
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{op}: weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype != torch.float32:
        raise TypeError(f"{op}: weight must be float32, got {weight.dtype}")
    if weight.dim() != 2 or 1 not in weight.stride():
        raise ValueError(
            f"{op}: weight must be [latents, features] and one stride 1, got shape "
            f"{list(weight.shape)} with strides {list(weight.stride())}"
        )
    if weight.device.type != "cpu":
        raise ValueError(f"{op}: weight must be on a CPU, got {weight.device}")
    if weight.is_inference():
        raise ValueError(f"{op}: weight must be no inference tensor, got one; clone it outside")
    return RoundedWeight(weight)


def kept_copy(weight: torch.Tensor) -> Rounded | None:
    """Return the copy that somebody keeps of a weight, up to date; None if nobody does."""
    if not _kept:
        return None
    for kept in list(_kept):
        if kept.is_of(weight):
            return kept.current()
    return None
