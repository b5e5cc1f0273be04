"""Calls of compiled kernels: outputs are allocated here, arguments go down by name.

The CPU module and the CUDA module export the same functions of the same arguments, which
csrc/interface/kernels.def lists, so one `native.py` per operation serves both.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import _C

from . import kept_memory
from .backends import BackendUnavailableError, new_choices
from .fast_path import device_type_of
from .modules import native_module

# torch's public function makes an object of the stream, in ten times the time. No CPU build has it.
_raw_stream = getattr(_C, "_cuda_getCurrentRawStream", None)

# The numbers of interface/dtypes.h.
DTYPE_TAGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
INDEX_TAGS = {torch.int64: 0, torch.int32: 1}
# Sizes that glibc's malloc maps anew: from 32 MiB on each time, smaller ones where blocks come and
# go in another order than before.
KEPT_FROM = 4 << 20


def module_for(tensor: torch.Tensor) -> ModuleType:
    """Return the compiled module for the tensor's device."""
    return _module(device_type_of(tensor))


def _module(device_type: str) -> ModuleType:
    module, reason = native_module(device_type)
    if module is None:
        raise BackendUnavailableError(reason)
    return module


def launch(name: str, tensor: torch.Tensor, /, **arguments: Any) -> Any:
    """Call a kernel of the compiled module for the tensor's device.

    The arguments are the fields that csrc/interface/kernels.def lists: numbers, addresses, and the
    operands made below. The device's context is added to them: torch's number of threads on a CPU,
    the current stream on a GPU.
    """
    key = (name, device_type_of(tensor))
    kernel, workspace_of = _kernels.get(key) or _find_kernel(*key)
    if not tensor.is_cuda:
        if workspace_of is None:
            return kernel(arguments, torch.get_num_threads())
        return _with_workspace(kernel, workspace_of, tensor, arguments, torch.get_num_threads())
    with device_of(tensor):
        stream = current_stream(tensor.get_device())
        if workspace_of is None:
            return kernel(arguments, stream)
        return _with_workspace(kernel, workspace_of, tensor, arguments, stream)


# A kernel and, if it needs scratch memory, the function that tells how much.
_Kernel = tuple[Callable[..., Any], Callable[..., int] | None]
_kernels: dict[tuple[str, str], _Kernel] = new_choices()


def _find_kernel(name: str, device_type: str) -> _Kernel:
    module = _module(device_type)
    found = getattr(module, name), vars(module).get(name + "_workspace")
    _kernels[name, device_type] = found
    return found


def keyword_kernel(name: str, tensor: torch.Tensor) -> Callable[..., None] | None:
    """Return a CPU kernel as a function of (threads, **arguments) that makes no dict of them.

    It takes the fields of csrc/interface/kernels.def in their order, and saves half of the time
    that `launch` takes. None on a GPU, and where the module has none.
    """
    if not tensor.is_cpu:
        return None
    if name not in _keyword_kernels:
        _keyword_kernels[name] = getattr(_module("cpu"), name + "_of_keywords", None)
    return _keyword_kernels[name]


_keyword_kernels: dict[str, Callable[..., None] | None] = new_choices()


def _with_workspace(
    kernel: Callable[..., Any],
    workspace_of: Callable[..., int],
    tensor: torch.Tensor,
    arguments: dict[str, Any],
    context: int,
) -> Any:
    size = workspace_of(arguments)
    scratch = tensor.new_empty(size, dtype=torch.uint8) if size else None
    return kernel(arguments, context, pointer(scratch))


# ---- operands: the structs of csrc/interface/operands.h, field by field --------------------------

# Data, dtype, rows, columns, row stride, column stride.
Matrix = tuple[int, int, int, int, int, int]
NO_MATRIX: Matrix = (0, 0, 0, 0, 0, 0)


def matrix(tensor: torch.Tensor) -> Matrix:
    """Describe a tensor [rows, columns] of any strides, or [..., columns] contiguous."""
    if tensor.dim() == 2:  # unpacked by name: with stars it takes twice the time
        rows, columns = tensor.shape
        down, across = tensor.stride()
        return (tensor.data_ptr(), DTYPE_TAGS[tensor.dtype], rows, columns, down, across)
    columns = tensor.shape[-1]
    rows = tensor.numel() // columns
    return (tensor.data_ptr(), DTYPE_TAGS[tensor.dtype], rows, columns, columns, 1)


def channel_tensor(tensor: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Describe a contiguous tensor [outer, channels, inner]: data, dtype and sizes."""
    return (tensor.data_ptr(), DTYPE_TAGS[tensor.dtype], *tensor.shape)


def codes(
    values: torch.Tensor | None, indices: torch.Tensor | None
) -> tuple[int, int, int, int, int, int]:
    """Describe contiguous codes [rows, k], or [k]; values or indices may be missing.

    Returns: values, their dtype, indices, their dtype, rows, k.
    """
    present: Any = indices if values is None else values
    rows, k = present.shape if present.dim() == 2 else (1, present.numel())
    return (
        0 if values is None else values.data_ptr(),
        0 if values is None else DTYPE_TAGS[values.dtype],
        0 if indices is None else indices.data_ptr(),
        0 if indices is None else INDEX_TAGS[indices.dtype],
        rows,
        k,
    )


def codes_without_values(
    indices: torch.Tensor, dtype: torch.dtype, *, with_indices: bool
) -> tuple[int, int, int, int, int, int]:
    """Describe contiguous codes [rows, k] of a dtype to a kernel that reads no values.

    with_indices: it reads the indices; else only their shape counts.
    """
    address = indices.data_ptr() if with_indices else 0
    rows, k = indices.shape
    return (0, DTYPE_TAGS[dtype], address, INDEX_TAGS[indices.dtype], rows, k)


def index_list(indices: torch.Tensor) -> tuple[int, int, int]:
    """Describe contiguous indices without values: data, dtype, count."""
    return (indices.data_ptr(), INDEX_TAGS[indices.dtype], indices.numel())


# ---- results -------------------------------------------------------------------------------------


def new_output(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return an empty tensor of like's dtype and device for a result.

    The memory of a large one on a CPU is kept for the next one of its size (see kept_memory.py).
    """
    size = math.prod(shape) * like.itemsize
    if size < KEPT_FROM or not like.is_cpu:
        return like.new_empty(shape)
    untyped: Any = like.new_empty(0)  # torch's annotations know no set_ without strides
    output: torch.Tensor = untyped.set_(kept_memory.storage_of(size), 0, shape)
    return output


def pointer(tensor: torch.Tensor | None) -> int:
    """Return the address of a tensor's data; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one, on which kernels are launched; nothing on a CPU."""
    # asking takes a tenth of the time of entering torch's context
    if tensor.is_cuda and torch.cuda.current_device() != tensor.get_device():
        return torch.cuda.device(tensor.device)
    return _AS_IT_IS


_AS_IT_IS = contextlib.nullcontext()


def current_stream(device: int) -> int:
    """Return the address of torch's current stream on a GPU."""
    if _raw_stream is not None:
        return int(_raw_stream(device))
    return int(torch.cuda.current_stream(device).cuda_stream)
