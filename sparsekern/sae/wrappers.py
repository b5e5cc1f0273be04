"""Wrappers for training in several processes, and calls that must go through them.

Wrappers average only the gradients of what their own forward pass computes.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..nn.recomputation import recomputing
from ..nn.wrappers import active_wrapper

# Each of the first calls searches for a wrapper, then each whose number is a power of two.
SEARCHES = 16


class Wrapper:
    """A search for the wrapper of a module.

    torch leaves no trace of a wrapper in the wrapped module, so the objects of this process are
    searched: at the first calls, and then ever more rarely. A wrapper that is made after more than
    16 training calls without it is found late: wrap the model before training it.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._known: weakref.ref[DistributedDataParallel] | None = None

    def around(self, module: nn.Module, method: str) -> nn.Module | None:
        """Return the wrapper to call instead of a module's own method.

        None if the method may be called: outside training, without other processes, and inside the
        wrapper's forward pass.

        Raises:
            RuntimeError: the wrapper is that of a model around the module, whose forward pass alone
                can call the method.
        """
        if torch.compiler.is_compiling():
            return None
        if hasattr(next(module.parameters()), "device_mesh"):  # sharded: gathered by its call
            return module
        if (
            not (module.training and torch.is_grad_enabled() and _has_other_processes())
            or recomputing()
        ):
            return None
        if active_wrapper() is not None:
            return None
        wrapper = self._known() if self._known is not None else None
        self._asked += 1
        if wrapper is None and (self._asked <= SEARCHES or self._asked & (self._asked - 1) == 0):
            wrapper = _find_wrapper(module)
            self._known = None if wrapper is None else weakref.ref(wrapper)
        if wrapper is None or wrapper.module is module:
            return wrapper
        raise RuntimeError(
            f"{type(module).__name__}.{method}: in training it must be called in the forward pass "
            "of the model around it that DistributedDataParallel wraps, since its gradients are "
            f"not averaged otherwise, got a call from outside of {type(wrapper.module).__name__}"
        )

    def __reduce__(self) -> Any:
        return Wrapper, ()


def _has_other_processes() -> bool:
    """Return True if there are other processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1


def _find_wrapper(module: nn.Module) -> DistributedDataParallel | None:
    wrappers: list[DistributedDataParallel] = [
        candidate
        for candidate in gc.get_objects()
        if issubclass(type(candidate), DistributedDataParallel)
    ]
    for wrapper in wrappers:
        if any(part is module for part in wrapper.modules()):
            return wrapper
    return None
