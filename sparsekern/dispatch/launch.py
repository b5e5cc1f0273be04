"""How a compiled kernel is called: outputs are allocated here, pointers and sizes go down.

The CPU module and the CUDA module export the same functions with the same arguments, so one
`native.py` per operation serves both. The last argument is the context: the number of threads on a
CPU, the stream on a GPU.
"""

from __future__ import annotations

import contextlib
import math
from types import ModuleType
from typing import Any

import torch

from . import kept_memory
from .backends import BackendUnavailableError
from .fast_path import device_type_of
from .modules import native_module

DTYPE_TAGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
INDEX_TAGS = {torch.int64: 0, torch.int32: 1}
# From here on malloc of glibc maps a block anew each time, whatever was freed before.
KEPT_FROM = 32 << 20


def module_for(tensor: torch.Tensor) -> ModuleType:
    """The compiled module for the tensor's device."""
    module, reason = native_module(device_type_of(tensor))
    if module is None:
        raise BackendUnavailableError(reason)
    return module


def launch(name: str, tensor: torch.Tensor, *args: Any) -> Any:
    """Call a function of the compiled module for the tensor's device, with that device's context:
    torch's thread count on a CPU, the current stream on a GPU."""
    function = getattr(module_for(tensor), name)
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            return function(*args, torch.cuda.current_stream(tensor.device).cuda_stream)
    return function(*args, torch.get_num_threads())


def workspace(name: str, tensor: torch.Tensor, *sizes: int) -> torch.Tensor | None:
    """Scratch memory of as many bytes as the module's function `name` asks for; a module without
    that function needs none."""
    size_of = vars(module_for(tensor)).get(name)
    size = size_of(*sizes) if size_of else 0
    return tensor.new_empty(size, dtype=torch.uint8) if size else None


def new_output(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """An empty tensor of like's dtype and device for a result.

    On a CPU a large one lies in memory that is kept for the next of its size when it is freed (see
    kept_memory.py): a training step makes the same ones every time.
    """
    size = math.prod(shape) * like.itemsize
    if size < KEPT_FROM or not like.is_cpu:
        return like.new_empty(shape)
    output: Any = like.new_empty(0)
    return output.set_(kept_memory.storage_of(size), 0, shape)


def pointer(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's data; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU current, as Triton launches on the current device; nothing on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
