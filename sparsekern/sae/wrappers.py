"""Wrappers for training in several processes, and calls that must go through them.

Wrappers average only the gradients of what their own forward pass computes.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from ..nn.recomputation import recomputing
from ..nn.wrappers import (
    active_wrapper,
    fully_sharded_kinds,
    has_other_processes,
    in_fully_sharded_forward,
    is_cut,
    is_fully_sharded,
    kinds_of,
)

# Where fully_shard was used, each of the first calls searches for a wrapper, then each whose number
# is a power of two.
SEARCHES = 16
# torch asks the module for it where DistributedDataParallel wraps it.
ASKED_BY_WRAPPER = "_ddp_params_and_buffers_to_ignore"

Outputs = TypeVar("Outputs")


class _Made:
    """How many wrappers of DistributedDataParallel were made since the first search was prepared.

    torch tells of every module that becomes part of another one. The searches of the parts of a
    wrapped module know that it was.
    """

    count = 0
    _handle: Any = None

    @classmethod
    def notice(cls) -> None:
        """Count from now on."""
        if cls._handle is None:
            cls._handle = register_module_module_registration_hook(cls._count)

    @classmethod
    def _count(cls, module: nn.Module, _: str, part: nn.Module | None) -> None:
        if isinstance(module, DistributedDataParallel) and part is not None:
            cls.count += 1
            for inner in part.modules():
                search = getattr(inner, "_wrapper", None)
                if isinstance(search, Wrapper):
                    search.was_wrapped = True


class Wrapper:
    """A search for the wrapper of a module.

    torch leaves no trace of DistributedDataParallel in the wrapped module, nor of fully_shard in
    the parts of one, so the objects of this process are searched: once after any wrapper was made,
    of which torch tells, and where fully_shard was used, of which it does not, at the first calls
    and then ever more rarely. A wrapper that was made and is gone averages nothing any more: there
    is a warning, once.
    """

    def __init__(self) -> None:
        _Made.notice()
        self._asked = 0
        self._searched_when = 0
        self.was_wrapped = False
        self._known: weakref.ref[nn.Module] | None = None

    def search_again(self) -> None:
        """Search at the next calls: the module was wrapped."""
        self._asked = 0
        self._searched_when = -1

    def around(self, module: nn.Module, method: str) -> nn.Module | None:
        """Return the wrapper to call instead of a module's own method.

        None if the method may be called: outside training, without other processes, and inside the
        wrapper's forward pass.

        Raises:
            RuntimeError: the wrapper is that of a model around the module, whose forward pass alone
                can call the method.
        """
        if torch.compiler.is_compiling():
            if not has_other_processes() or active_wrapper() is not None:
                return None
            found: nn.Module | None = torch.compiler.disable(self.around)(module, method)
            return found
        wrapper = self._outside(module)
        if wrapper is None or wrapper is module or _wraps_just(wrapper, module):
            return wrapper
        name = "fully_shard" if is_fully_sharded(wrapper) else "DistributedDataParallel"
        inner = wrapper.module if isinstance(wrapper, DistributedDataParallel) else wrapper
        raise RuntimeError(
            f"{type(module).__name__}.{method}: in training it must be called in the forward pass "
            f"of the model around it that {name} wraps, since its gradients are not averaged "
            f"otherwise, got a call from outside of {type(inner).__name__}"
        )

    def guard(self, module: nn.Module, method: str, outputs: Outputs) -> Outputs:
        """Return the outputs of a method; their gradients raise where no wrapper averages them.

        So it is where the method was called on the wrapped module, in training, outside of the
        wrapper's forward pass.
        """
        if torch.compiler.is_compiling():
            if has_other_processes() and active_wrapper() is None:
                torch.compiler.disable(self.guard)(module, method, outputs)
            return outputs
        if self._outside(module) is None:
            return outputs

        def refuse(_: Tensor) -> None:
            raise RuntimeError(
                f"{type(module).__name__}.{method}: gradients that are to be averaged over "
                "processes must come from the wrapper's forward pass or from loss, got some of a "
                f"call to the wrapped model: call {method} in the forward pass of a module that "
                "is wrapped, give it to register_fsdp_forward_method after fully_shard, or call "
                "it under torch.no_grad()"
            )

        for tensor in _tensors(outputs):
            if tensor.requires_grad:
                tensor.register_hook(refuse)
        return outputs

    def cut_again(self, module: nn.Module, method: str) -> None:
        """Let a module that was given to fully_shard hold its own part, where changes stay.

        Raises:
            RuntimeError: in its forward pass, after which changes are lost.
        """
        wrapper = self._wrapper_of(module)
        if wrapper is None or not is_fully_sharded(wrapper):
            return
        if in_fully_sharded_forward(wrapper):
            raise RuntimeError(
                f"{type(module).__name__}.{method}: it must be called outside of forward passes "
                "of what fully_shard was given (and not be registered as one), since changes of "
                "parameters that are gathered for a pass are lost"
            )
        wrapper.reshard()  # type: ignore[operator]

    def found(self, module: nn.Module) -> nn.Module | None:
        """Search for the wrapper of a module, or of a model around it."""
        self.search_again()
        return self._wrapper_of(module)

    def _outside(self, module: nn.Module) -> nn.Module | None:
        """Return the wrapper outside of whose forward pass a call in training is made, or None."""
        if is_fully_sharded(module):
            return None if in_fully_sharded_forward(module) else module
        if not (module.training and torch.is_grad_enabled() and has_other_processes()):
            return None
        if recomputing() or active_wrapper() is not None:
            return None
        wrapper = self._wrapper_of(module)
        if wrapper is not None and is_fully_sharded(wrapper):
            return None if in_fully_sharded_forward(wrapper) else wrapper
        if wrapper is None and self.was_wrapped:
            self.was_wrapped = False
            warnings.warn(
                f"{type(module).__name__}: the DistributedDataParallel around it is gone, so the "
                "gradients of this process are not averaged: keep the wrapper, or train a copy",
                stacklevel=4,
            )
        return wrapper

    def _wrapper_of(self, module: nn.Module) -> nn.Module | None:
        """Return the wrapper, as far as it is known or it is time to search for it."""
        if is_fully_sharded(module):
            return module
        if not has_other_processes() or is_cut(next(module.parameters())):
            return None
        wrapper = self._known() if self._known is not None else None
        if wrapper is None and self._is_time_to_search():
            wrapper = _find_wrapper(module)
            self._known = None if wrapper is None else weakref.ref(wrapper)
        return wrapper

    def _is_time_to_search(self) -> bool:
        self._asked += 1
        made, self._searched_when = self._searched_when != _Made.count, _Made.count
        early = self._asked <= SEARCHES or self._asked & (self._asked - 1) == 0
        return made or (early and bool(fully_sharded_kinds()))

    def __reduce__(self) -> Any:
        return _copied, ()


def _copied() -> Wrapper:
    """Return the search of a module that was copied or unpickled, its wrapper perhaps with it."""
    wrapper = Wrapper()
    wrapper.search_again()
    return wrapper


def _wraps_just(wrapper: nn.Module, module: nn.Module) -> bool:
    """Return True if a wrapper's forward pass is that of the module, compiled or not."""
    inner = wrapper.module if isinstance(wrapper, DistributedDataParallel) else None
    return inner is module or getattr(inner, "_orig_mod", None) is module


def _tensors(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples and lists."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, tuple | list):
        for part in outputs:
            yield from _tensors(part)


def _find_wrapper(module: nn.Module) -> nn.Module | None:
    """Return the innermost wrapper of a module, or of a model around it."""
    kinds = {*kinds_of(DistributedDataParallel), *fully_sharded_kinds()}
    wrappers = [candidate for candidate in gc.get_objects() if type(candidate) in kinds]
    around = [w for w in wrappers if any(part is module for part in w.modules())]
    return min(around, key=lambda wrapper: sum(1 for _ in wrapper.modules()), default=None)
