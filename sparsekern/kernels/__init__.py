"""How Triton does it: one file per stem, launchers that take checked matrices and allocate their
outputs.

The kernels of `topk` and `topk_stream` see floating point numbers only as integers of the same
width, so they are exact by construction and run alike compiled and interpreted. Those that do
arithmetic widen every load to float32 at once.
"""

from __future__ import annotations

import contextlib

import torch


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU current, as Triton launches on the current device; nothing on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
