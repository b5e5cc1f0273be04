"""How the compiled modules are called: outputs are allocated here, pointers and sizes go down.

The CPU module and the CUDA module export the same functions with the same arguments, so one file
per stem serves both. The last argument is the context: the number of threads on a CPU, the stream
on a GPU.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

import torch

from .. import _library

DTYPE_TAGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
INDEX_TAGS = {torch.int64: 0, torch.int32: 1}


def module_for(tensor: torch.Tensor) -> ModuleType:
    """The compiled module for the tensor's device."""
    module, reason = _library.native_module(tensor.device.type)
    if module is None:
        raise _library.BackendUnavailableError(reason)
    return module


def context_for(tensor: torch.Tensor) -> int:
    """torch's thread count for a CPU tensor, the current stream for a CUDA tensor."""
    if tensor.device.type == "cpu":
        return torch.get_num_threads()
    return torch.cuda.current_stream(tensor.device).cuda_stream


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one for a launch; nothing to do on a CPU."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def pointer(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's data; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()
