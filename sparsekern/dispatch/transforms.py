"""What transforms of torch.func, and tracing, do to the tensors of a call.

torch has only private names for that. Where one is missing nothing is taken for transformed.
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
    """Whether a transform has put something around a tensor."""
    return _known and bool(is_functorch_wrapped_tensor(tensor))


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor inside of all that transforms have put around it."""
    while is_wrapped(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def traced_or_vmapped() -> bool:
    """Whether what is computed here will be, or is, that of other numbers, too: while code is
    traced (torch.jit.trace), and under vmap, around other transforms or inside them."""
    if torch.compiler.is_compiling():
        return False
    if torch.jit.is_tracing():
        return True
    return _known and any(
        transform.key() == TransformType.Vmap for transform in get_interpreter_stack() or ()
    )


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape but no numbers."""
    return tensor.is_meta or isinstance(tensor, _fakes)
