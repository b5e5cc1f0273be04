"""The dense product, for codes among which few zeros lie."""

from __future__ import annotations

import torch

from ...dispatch.backends import forced_backend
from ..checks import check_range
from ..layout import sum_dtype

# With fewer of them the dense product is mostly faster: see the note of `pointwise_conv`.
ELEMENTS_PER_CODE = 16


def dense_wins(values: torch.Tensor, elements: int) -> bool:
    """Return True where the dense product is faster: on a CPU, with many codes.

    False for a forced backend, under autocast, and in compiled code, which would be specialised to
    the number of codes. On GPUs it was not measured.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if ELEMENTS_PER_CODE * len(values) <= elements:
        return False
    return forced_backend() is None and not torch.is_autocast_enabled("cpu")


def dense_pointwise_conv(
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outer: int,
    inner: int,
) -> torch.Tensor:
    """Return what the operation does, by way of the dense tensor."""
    outputs, channels = weight.shape
    elements = outer * channels * inner
    check_range("pointwise_conv", indices, elements)
    dtype = sum_dtype(values.dtype)
    x = values.new_zeros(elements, dtype=dtype).index_add(0, indices.long(), values.to(dtype))
    x = x.view(outer, channels, inner)
    bias = None if bias is None else bias.to(dtype)
    if inner == 1:
        out = torch.nn.functional.linear(x.squeeze(2), weight.to(dtype), bias)
    else:
        out = torch.nn.functional.conv1d(x, weight.to(dtype).unsqueeze(2), bias)
    return out.view(outer, outputs, inner).to(values.dtype)
