"""Code of a stranger's module that runs with our selections.

The module's own methods run, so that all that they read (k, a flag, a schedule) counts at every
call, as before. While they run, two kinds of functions of torch are ours: selections by torch.topk,
and zeros, which are late tensors (late.py): what is scattered into them is written once, as a dense
tensor, or decoded by its codes. All else runs as it is written.
"""

from __future__ import annotations

import itertools
import math
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...nn.hooks import has_hooks
from ...nn.scores import sizes_are_fixed
from ...ops.batch_topk.operation import batch_topk as batch_topk_operation
from ...ops.checks import FLOATING
from ...ops.topk import topk
from .encoders import runs_on_codes
from .late import LateTensor, dense, late_zeros
from .replacement import Methods, class_of

# Selections from fewer numbers are as fast in torch: a call of ours through a mode takes 5 us more.
_FEWEST = 2**13
# Late zeros take 50 us. A decoder's product gains that soon, a scatter alone with large memory.
_LATE_BEFORE_DECODING, _LATE_ALONE = 2**13, 2**22
_NEVER_LATE = 2**63
_PLAIN = (Tensor, nn.Parameter)
_NUMBER = torch.tensor(0, device="cpu")  # of it, sizes are fixed by transforms alone
# A single row of so many numbers is cut before the selection; a power of 2 divides it into parts.
_LONG, _PART, _SHORTEST_PART = 2**16, 2**14, 2**8


class _Inside(threading.local):
    depth = 0


_inside = _Inside()


class Selecting(TorchFunctionMode):
    """While this is on, selections and zeros are ours.

    Attributes:
        fewest: numbers from which a selection is ours.
        late: numbers from which zeros are.
        taken: how many selections were ours.
        left: why others were not.
        decoded: how many products were of late tensors.
    """

    def __init__(self, fewest: int = 1, late: int = 1) -> None:
        super().__init__()
        self.fewest = fewest
        self.late = late
        self.taken = 0
        self.left: list[str] = []
        self.decoded = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = _KNOWN.get(func)
        if known is not None and not sizes_are_fixed(_NUMBER):  # the code may call vmap itself
            result = known(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    def select(
        self,
        input: Any,
        k: Any = None,
        dim: Any = -1,
        largest: bool = True,
        sorted: bool = True,
        **other: Any,
    ) -> Any:
        """Serve torch.topk of the largest of rows; what is refused here stays torch's."""
        k = _number(k)
        reason = _why_torch_selects(input, k, dim, largest, other)
        if reason is not None:
            self.left.append(reason)
            return NotImplemented
        if input.numel() < self.fewest:
            return NotImplemented
        if input.numel() == input.shape[dim] >= _LONG:
            return self._select_of_one_row(input, k, sorted)
        self.taken += 1
        values, indices = topk(input, k, dim, sorted=sorted)
        return torch.return_types.topk((values, indices))

    def _select_of_one_row(self, row: Tensor, k: int, sorted: bool) -> Any:
        """Select from one long row, as BatchTopK does, by its parts."""
        part = math.gcd(row.numel(), _PART)
        if part < _SHORTEST_PART:
            self.left.append(f"topk of one row of {row.numel()} numbers, which has no equal parts")
            return NotImplemented
        self.taken += 1
        _, values, indices = batch_topk_operation(row.reshape(-1, part), k, False)
        if sorted:
            order = values.detach().argsort(descending=True, stable=True)
            values, indices = values[order], indices[order]
        shape = [k if size == row.numel() else 1 for size in row.shape]
        return torch.return_types.topk((values.view(shape), indices.view(shape)))

    def kth(self, input: Any, k: Any, dim: Any = -1, keepdim: bool = False, **other: Any) -> Any:
        """Serve torch.kthvalue near the upper end, as the smallest of the largest."""
        k = _number(k)
        if k is None or not isinstance(input, Tensor) or input.dim() == 0 or other:
            return NotImplemented
        largest = input.shape[dim] - k + 1
        if not 0 < 4 * largest <= input.shape[dim]:
            self.left.append("kthvalue is not among the largest fourth")
            return NotImplemented
        selected = self.select(input, largest, dim)
        if selected is NotImplemented:
            return NotImplemented
        value, index = (part.narrow(dim, largest - 1, 1) for part in selected)
        if not keepdim:
            value, index = value.squeeze(dim), index.squeeze(dim)
        return torch.return_types.kthvalue((value, index))

    def product(self, *factors: Any, **other: Any) -> Any:
        """Count a product that late tensors serve."""
        given = (*factors, *other.values())
        self.decoded += any(isinstance(factor, LateTensor) for factor in given)
        return NotImplemented

    def zeros_like(self, input: Any, **other: Any) -> Any:
        """Serve torch.zeros_like."""
        if other or type(input) not in _PLAIN:
            return NotImplemented
        return self._zeros(input.shape, input.dtype, input.device)

    def new_zeros(self, x: Any, *size: Any, **other: Any) -> Any:
        """Serve Tensor.new_zeros."""
        if other or type(x) not in _PLAIN:
            return NotImplemented
        return self._zeros(size, x.dtype, x.device)

    def zeros(self, *size: Any, dtype: Any = None, device: Any = None, **other: Any) -> Any:
        """Serve torch.zeros."""
        if other:
            return NotImplemented
        device = torch.get_default_device() if device is None else torch.device(device)
        return self._zeros(size, dtype or torch.get_default_dtype(), device)

    def _zeros(self, size: Any, dtype: torch.dtype, device: torch.device) -> Any:
        """Make late zeros of a size, in numbers or as one sequence of them."""
        size = size[0] if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
        shape = torch.Size(size)
        known = dtype in FLOATING and shape and device.type != "meta"
        if not known or shape.numel() < self.late:
            return NotImplemented
        return late_zeros(shape, dtype, device)


def _of_copies(scatter: Callable[..., Any]) -> Callable[..., Any]:
    """Make the handler of a scatter into late zeros: the code may change later what it scatters."""

    def handler(selecting: Selecting, input: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, LateTensor):
            return NotImplemented
        copies = {name: _copy(value) for name, value in kwargs.items()}
        return scatter(input, *map(_copy, args), **copies)

    return handler


def _copy(value: Any) -> Any:
    return value.clone() if type(value) is Tensor else value


_KNOWN: dict[Any, Callable[..., Any]] = {
    torch.topk: Selecting.select,
    torch.Tensor.topk: Selecting.select,
    torch.kthvalue: Selecting.kth,
    torch.Tensor.kthvalue: Selecting.kth,
    torch.nn.functional.linear: Selecting.product,
    torch.matmul: Selecting.product,
    torch.Tensor.matmul: Selecting.product,
    torch.Tensor.__matmul__: Selecting.product,
    torch.scatter: _of_copies(torch.scatter),
    torch.Tensor.scatter: _of_copies(torch.Tensor.scatter),
    torch.Tensor.scatter_: _of_copies(torch.Tensor.scatter_),
    torch.zeros_like: Selecting.zeros_like,
    torch.Tensor.new_zeros: Selecting.new_zeros,
    torch.zeros: Selecting.zeros,
}


def _number(k: Any) -> int | None:
    """Return k, also of a tensor or an array, as a number of Python; None if it is none."""
    try:
        return operator.index(k)
    except TypeError:
        return None


def _why_torch_selects(x: Any, k: Any, dim: Any, largest: Any, other: Any) -> str | None:
    """Return why a selection stays torch's; None if ours is faster."""
    if type(x) not in _PLAIN or x.dtype not in FLOATING:
        return f"topk of {getattr(x, 'dtype', type(x).__name__)} is not faster"
    known = k is not None and type(dim) is int and not other and -x.dim() <= dim < x.dim()
    if not known or not 1 <= k <= x.shape[dim]:
        return "topk has arguments that are for torch alone"
    return None if largest else "topk of the smallest is not faster"


# -- what stands in --------------------------------------------------------------------------------


class PlainForward(Methods):
    """A module whose forward pass selects."""

    __slots__ = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own forward pass does."""
        return _on_codes(self, has_hooks(self), super().forward, args, kwargs)


class PlainEncode(PlainForward):
    """A module with an encode of its own, which selects, too."""

    __slots__ = ()

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own encode does."""
        return _on_codes(self, False, super().encode, args, kwargs)


def _on_codes(module: Any, hooked: bool, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a method with our selections; hooks, and callers outside, get dense tensors."""
    if type(args) is not tuple:
        raise TypeError(
            "accelerate: torch.fx must trace a module as it was, got an accelerated "
            f"{class_of(module).__name__}; call sparsekern.restore(model) first"
        )
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not given:
        return own(*args, **kwargs)
    is_layer = next(module.parameters(), None) is None
    if not runs_on_codes(given[0]) or (is_layer and given[0].numel() < _FEWEST):
        return own(*args, **kwargs)
    if any(map(has_hooks, itertools.islice(module.modules(), 1, None))):
        late = _NEVER_LATE
    else:
        late = _LATE_ALONE if is_layer and not _inside.depth else _LATE_BEFORE_DECODING
    _inside.depth += 1
    try:
        with Selecting(_FEWEST, late):
            result = own(*args, **kwargs)
    finally:
        _inside.depth -= 1
    return result if _inside.depth and not hooked else all_dense(result)


def all_dense(value: Any) -> Any:
    """Return a result with dense tensors in the place of late ones."""
    if isinstance(value, LateTensor):
        return dense(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(all_dense, value))
    if type(value) in (list, tuple):
        return type(value)(map(all_dense, value))
    if type(value) is dict:
        return {key: all_dense(item) for key, item in value.items()}
    return value
