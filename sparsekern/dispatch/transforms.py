"""Tests for tensors and calls under transforms of torch.func, and under tracing.

torch has only private names for them. Where one is missing no tensor counts as transformed.
"""

from __future__ import annotations

import torch

try:
    from torch._C._functorch import (
        TransformType,
        get_interpreter_stack,
        get_unwrapped,
        is_functorch_wrapped_tensor,
    )

    _known = True
except ImportError:
    _known = False
try:
    from torch._subclasses import FakeTensor

    _fakes: tuple[type, ...] = (FakeTensor,)
except ImportError:
    _fakes = ()


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Return True if a transform has wrapped a tensor."""
    return _known and bool(is_functorch_wrapped_tensor(tensor))


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor inside all wrappers of transforms."""
    while is_wrapped(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def traced_or_vmapped() -> bool:
    """Return True if one run of this code stands for several inputs.

    So it does under torch.jit.trace, and under vmap, around other transforms or inside them.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing():
        return True
    return _known and any(
        transform.key() == TransformType.Vmap for transform in get_interpreter_stack() or ()
    )


def is_fake(tensor: torch.Tensor) -> bool:
    """Return True if a tensor has a shape but no numbers."""
    return tensor.is_meta or isinstance(tensor, _fakes)
