"""Whether a call may skip torch's dispatcher.

The dispatcher reaches a kernel through several layers of Python, which cost more than some of the
kernels here. It can be skipped when it would do nothing: no gradient is recorded, and none of the
keys that it would visit (functorch, autocast, tracing, modes, subclasses, lazy negation, ...) is
set, neither on a tensor nor on this thread.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd import forward_ad

_keys = torch._C.DispatchKey
# The keys whose kernels only pass a call on when nothing requires a gradient, and the kernels
# themselves.
_PASSED_ON = functools.reduce(
    lambda keys, key: keys.add(key),
    (
        _keys.CPU, _keys.CUDA, _keys.BackendSelect, _keys.ADInplaceOrView, _keys.AutogradCPU,
        _keys.AutogradCUDA,
    ),
    torch._C.DispatchKeySet.from_raw_repr(0),
).raw_repr()  # fmt: skip
_STOPS = ~_PASSED_ON
# Of most arguments that are no tensors; asking Tensor's metaclass takes longer.
_PLAIN = frozenset((bool, int, float, type(None)))

_keys_of = torch._C._dispatch_keys
_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_local_exclude_set
_overridden = torch.overrides.has_torch_function
_profiling = torch._C._autograd._profiler_enabled


def dispatcher_has_nothing_to_do(args: tuple[Any, ...]) -> bool:
    """True when the dispatcher would hand a call with these arguments straight to the kernel."""
    # Overrides: of tensor subclasses, and of modes.
    if torch.compiler.is_compiling() or _overridden(args) or _profiling():
        return False
    if forward_ad._current_level >= 0:
        return False
    recording = torch.is_grad_enabled()
    keys = _included().raw_repr()
    for arg in args:
        if type(arg) not in _PLAIN and isinstance(arg, torch.Tensor):
            if recording and arg.requires_grad:
                return False
            keys |= _keys_of(arg).raw_repr()
    return not keys & ~_excluded().raw_repr() & _STOPS


def device_type_of(tensor: torch.Tensor) -> str:
    """tensor.device.type, found sooner on a CPU."""
    return "cpu" if tensor.is_cpu else tensor.device.type
