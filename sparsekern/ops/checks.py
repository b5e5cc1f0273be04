"""Checks of arguments, made once, in the public functions.

Each error names function, argument, rule and value.
"""

from __future__ import annotations

import numbers
import operator
import os
from typing import Any

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (torch.int64, torch.int32)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LONGEST_ROW = 2**31 - 1  # on any device


def debug_checks() -> bool:
    """Return True if SPARSEKERN_DEBUG asks for checks that make the host wait for the device."""
    return os.environ.get("SPARSEKERN_DEBUG", "0") not in ("", "0")


def check_dense(op: str, name: str, tensor: torch.Tensor) -> None:
    """Check for a dense tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested tensors" if tensor.is_nested else tensor.layout
        raise TypeError(f"{op}: {name} must be a dense tensor, got one of {layout}")


def check_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    """Check for a tensor of float32, bfloat16, float16 or float64 that is not 0-d."""
    check_dense(op, name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
        )
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dimension, got a 0-d tensor")


def check_dim(op: str, dim: int, dimensions: int) -> int:
    """Return the number, from 0, of a dimension that may be counted from the end; raise for others.

    A tensor of no dimensions is taken as one of a single one, as in torch.
    """
    if type(dim) is not int:
        dim = _to_index(op, "dim", dim)
    bound = max(dimensions, 1)
    if not -bound <= dim < bound:
        raise IndexError(
            f"{op}: dim must lie in {-bound}..{bound - 1} (x is {dimensions}-d), got {dim}"
        )
    return dim % bound


def check_count(op: str, name: str, value: int, upper: int, what: str, lower: int = 1) -> int:
    """Return an integer in lower..upper as an int (or symbolic integer); raise for others.

    what: the upper bound in words, for the message.
    """
    if type(value) is not int:  # torch.compile takes the index of a symbolic integer as a constant
        value = _to_index(op, name, value)
    if upper < lower:
        raise ValueError(f"{op}: no {name} is possible, since {what} is {upper}, got {value}")
    if not lower <= value <= upper:
        raise ValueError(f"{op}: {name} must lie in {lower}..{upper} ({what}), got {value}")
    return value


def check_above_zero(op: str, name: str, value: float) -> None:
    """Check for a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{op}: {name} must be a number, got {value!r} of type {type(value).__name__}"
        )
    if not 0 < value < float("inf"):
        raise ValueError(f"{op}: {name} must be above 0 and finite, got {value}")


def _to_index(op: str, name: str, value: Any) -> Any:
    """Return a number of another integer type (as numpy's) as an int, a symbolic one as it is.

    Of a 0-d tensor of integers its value, for which the host waits.
    """
    if isinstance(value, torch.SymInt):
        return value
    try:
        if isinstance(value, torch.Tensor):
            if value.dim() or value.dtype not in INTEGERS:
                raise TypeError
            return int(value)
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{op}: {name} must be an integer, got {value!r} of type {type(value).__name__}"
        ) from None


def check_codes(op: str, values: torch.Tensor | None, indices: torch.Tensor) -> None:
    """Check integer indices and, where given, floating values of their shape and device."""
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"{op}: indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype not in INDICES:
        raise TypeError(f"{op}: indices must be int64 or int32, got {indices.dtype}")
    if indices.dim() == 0:
        raise ValueError(f"{op}: indices must have at least one dimension, got a 0-d tensor")
    if values is None:
        return
    check_floating(op, "values", values)
    if values.shape != indices.shape:
        raise ValueError(
            f"{op}: values and indices must have the same shape, got {list(values.shape)} "
            f"and {list(indices.shape)}"
        )
    check_same_device(op, values=values, indices=indices)


def autocasting(tensor: torch.Tensor) -> bool:
    """Return True if an autocast region decides the dtype of products with this tensor."""
    device_type = tensor.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_weight_dtype(
    op: str, tensor: torch.Tensor, weight: torch.Tensor, name: str, whose: str, short: str
) -> None:
    """Check for a weight of the tensor's dtype, or float32 with a 16-bit tensor.

    Autocast casts all but float64, so under it both or none must be float64. whose, short: the
    tensor in the message, in the possessive and as a 16-bit one ("x's", "a 16-bit x").
    """
    if not autocasting(tensor):
        mixed = weight.dtype == torch.float32 and tensor.dtype in (torch.bfloat16, torch.float16)
        if weight.dtype != tensor.dtype and not mixed:
            raise TypeError(
                f"{op}: weight must have {whose} dtype {tensor.dtype} or be float32 with {short}, "
                f"got {weight.dtype}"
            )
    elif (weight.dtype == torch.float64) != (tensor.dtype == torch.float64):
        raise TypeError(
            f"{op}: autocast leaves float64 alone, so both or none of {name} and weight must have "
            f"it, got {tensor.dtype} and {weight.dtype}"
        )


def check_same_dtype(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Check that x has the parameters' dtype, unless an autocast region casts both."""
    if x.dtype != weight.dtype and not autocasting(x):
        raise TypeError(f"{op}: x must have the parameters' dtype {weight.dtype}, got {x.dtype}")


def check_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Check that all given tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {listed}")


def check_like(
    op: str, name: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...]
) -> None:
    """Check that a tensor has a shape, and the dtype and device of another."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {tensor.device}")


def check_row(op: str, x: torch.Tensor, size: int) -> None:
    """Check that indices into a row fit the kernels' 32 bits: unsigned on a CPU, else signed."""
    longest = 2**32 - 1 if x.is_cpu else LONGEST_ROW
    if size > longest:
        raise ValueError(f"{op}: a row must hold at most {longest} elements, got {size}")


def check_size(op: str, name: str, size: int) -> None:
    """Check that a size is 0 or more."""
    if size < 0:
        raise ValueError(f"{op}: {name} must be at least 0, got {size}")


def bad_index(
    op: str, indices: torch.Tensor, position: int, n: int, name: str = "indices"
) -> IndexError:
    """Return the error for an index outside 0..n-1 at a flat position."""
    value = indices.reshape(-1)[position].item()
    return IndexError(
        f"{op}: {name} must lie in 0..{n - 1} (the latents of the dictionary), "
        f"got {value} at flat position {position}"
    )


def in_range(indices: torch.Tensor, n: int) -> torch.Tensor:
    """Return where indices lie in 0..n-1."""
    return (indices >= 0) & (indices < n)


def places_in_range(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where indices lie in 0..n-1, and the indices as int64, 0 where they do not.

    For torch's own kernels on devices other than the CPU, where an index out of range is an
    assertion that ends the use of the device.
    """
    inside = in_range(indices, n)
    return inside, torch.where(inside, indices, 0).long()


def check_range(op: str, indices: torch.Tensor, n: int, name: str = "indices") -> None:
    """Check that every index lies in 0..n-1.

    On devices other than the CPU the check synchronises, so it is made in debug mode only.
    """
    if indices.device.type != "cpu" and not debug_checks():
        return
    if indices.numel() == 0:
        return
    low, high = torch.aminmax(indices)
    if low < 0 or high >= n:
        outside = (indices < 0) | (indices >= n)
        position = int(outside.reshape(-1).to(torch.uint8).argmax())
        raise bad_index(op, indices, position, n, name)
