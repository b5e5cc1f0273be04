"""How the compiled modules are called: outputs are allocated here, pointers and sizes go down.

The CPU module and the CUDA module export the same functions with the same arguments, so one file
per stem serves both. The last argument is the context: the number of threads on a CPU, the stream
on a GPU.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

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


def pointer(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's data; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()
