"""The test whether a call may skip torch's dispatcher.

The dispatcher reaches a kernel through several layers of Python, which cost more than some of the
kernels here. It can be skipped when it would do nothing but record a gradient: none of the keys
that it would visit (functorch, autocast, tracing, modes, subclasses, lazy negation, ...) is set,
neither on a tensor nor on this thread. A gradient is recorded without it (see autograd.py).

torch has only private names for these keys. Where one is missing, or does not work as it should, no
call skips the dispatcher.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd import forward_ad

try:
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _dispatch_keys,
        _dispatch_tls_local_exclude_set,
        _dispatch_tls_local_include_set,
    )
    from torch._C._autograd import _profiler_enabled
    from torch.overrides import has_torch_function, has_torch_function_unary

    def _bits(*keys: DispatchKey) -> int:
        empty = DispatchKeySet.from_raw_repr(0)
        return functools.reduce(lambda found, key: found.add(key), keys, empty).raw_repr()

    _AUTOGRAD = _bits(DispatchKey.AutogradCPU, DispatchKey.AutogradCUDA)
    # Beside those of the kernels, keys whose kernels only pass a call on when nothing requires a
    # gradient.
    _NEEDS_DISPATCHER = ~(
        _AUTOGRAD
        | _bits(
            DispatchKey.CPU,
            DispatchKey.CUDA,
            DispatchKey.BackendSelect,
            DispatchKey.ADInplaceOrView,
        )
    )
    _known = hasattr(forward_ad, "_current_level")
except (ImportError, AttributeError):
    _known = False

# What there is for torch to do in a call, beside the kernel.
NOTHING, RECORDING, MORE = 0, 1, 2
# Most arguments that are no tensors have these types. isinstance(_, Tensor) takes longer.
_SCALARS = frozenset((bool, int, float, type(None)))


def left_to_torch(args: tuple[Any, ...]) -> int:
    """Return what the dispatcher would do with these arguments before the kernel.

    Returns: NOTHING; RECORDING, if it would record a gradient and that is all; else MORE.
    """
    # has_torch_function: tensor subclasses, and modes.
    if not _known or torch.compiler.is_compiling() or has_torch_function(args):
        return MORE
    if _profiler_enabled() or forward_ad._current_level >= 0:
        return MORE
    recording = False
    keys = _dispatch_tls_local_include_set().raw_repr()
    for arg in args:
        if type(arg) not in _SCALARS and isinstance(arg, torch.Tensor):
            recording = recording or arg.requires_grad
            keys |= _dispatch_keys(arg).raw_repr()
    excluded = _dispatch_tls_local_exclude_set().raw_repr()
    if keys & ~excluded & _NEEDS_DISPATCHER:
        return MORE
    if not (recording and torch.is_grad_enabled()):
        return NOTHING
    return MORE if excluded & _AUTOGRAD else RECORDING


def left_to_torch_of(tensor: torch.Tensor) -> int:
    """Return `left_to_torch` of a call with one tensor, in less time."""
    if not _known or torch.compiler.is_compiling() or has_torch_function_unary(tensor):
        return MORE
    if _profiler_enabled() or forward_ad._current_level >= 0:
        return MORE
    excluded = _dispatch_tls_local_exclude_set().raw_repr()
    keys = _dispatch_keys(tensor).raw_repr() | _dispatch_tls_local_include_set().raw_repr()
    if keys & ~excluded & _NEEDS_DISPATCHER:
        return MORE
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return NOTHING
    return MORE if excluded & _AUTOGRAD else RECORDING


def dispatcher_has_nothing_to_do(args: tuple[Any, ...]) -> bool:
    """Return True if the dispatcher would pass these arguments straight to the kernel."""
    return left_to_torch(args) == NOTHING


def _private_names_work() -> bool:
    """Return True if calls that need the dispatcher are recognised by the names above."""
    skipped: list[bool] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        skipped.append(dispatcher_has_nothing_to_do((tensor,)))
        return tensor

    try:
        x = torch.zeros(2, device="cpu")
        with torch.enable_grad():
            record(x.clone().requires_grad_())
        with torch.no_grad():
            torch.vmap(record)(x)
            record(torch.complex(x, x).conj().imag)  # negated when it is read
            record(x.to("meta"))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                record(x)
    except (AttributeError, TypeError):
        return False
    return len(skipped) == 5 and not any(skipped)


_known = _known and _private_names_work()


def device_type_of(tensor: torch.Tensor) -> str:
    """Return tensor.device.type; quicker for a CPU."""
    return "cpu" if tensor.is_cpu else tensor.device.type
