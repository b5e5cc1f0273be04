"""Wrappers for training in several processes, which average gradients only of what is computed
through their own forward pass."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..nn.recomputation import recomputing
from ..nn.wrappers import active_wrapper

# The first calls search for a wrapper each, later ones those whose number is a power of two.
SEARCHES = 16


class Wrapper:
    """Finds what wraps a module.

    torch leaves no trace of a wrapper in what it wraps, so the objects of this process are
    searched: when it is first asked for, and then ever more rarely. A wrapper that is made after
    more than 16 calls in training without it is found late: wrap the model before training it.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._known: weakref.ref[DistributedDataParallel] | None = None

    def around(self, module: nn.Module, method: str) -> nn.Module | None:
        """The wrapper to call instead of a module's own method; None where that is right: outside
        training, without other processes, and inside the wrapper's forward pass.

        Raises:
            RuntimeError: the wrapper is that of a model around the module, whose forward pass alone
                can call the method.
        """
        if torch.compiler.is_compiling():
            return None
        if hasattr(next(module.parameters()), "device_mesh"):  # sharded: gathered by its call
            return module
        if not (module.training and torch.is_grad_enabled() and _others()) or recomputing():
            return None
        if active_wrapper() is not None:
            return None
        found = self._known() if self._known is not None else None
        self._asked += 1
        if found is None and (self._asked <= SEARCHES or self._asked & (self._asked - 1) == 0):
            found = _find(module)
            self._known = None if found is None else weakref.ref(found)
        if found is None or found.module is module:
            return found
        raise RuntimeError(
            f"{type(module).__name__}.{method}: in training it must be called in the forward pass "
            "of the model around it that DistributedDataParallel wraps, since its gradients are "
            f"not averaged otherwise, got a call from outside of {type(found.module).__name__}"
        )

    def __reduce__(self) -> Any:
        return Wrapper, ()


def _others() -> bool:
    """Whether there are other processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1


def _find(module: nn.Module) -> DistributedDataParallel | None:
    wrappers: list[DistributedDataParallel] = [
        candidate
        for candidate in gc.get_objects()
        if issubclass(type(candidate), DistributedDataParallel)
    ]
    for wrapper in wrappers:
        if any(part is module for part in wrapper.modules()):
            return wrapper
    return None
