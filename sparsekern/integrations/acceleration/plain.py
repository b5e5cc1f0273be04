"""Classes of no known library whose own code selects: found by the functions that it calls."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType

import torch
from torch import nn

from .replacement import Replacement, class_of
from .selecting import PlainEncode, PlainForward

# Code of these is not a stranger's.
_NOT_STRANGERS = ("torch", "sparsekern")
_SELECTIONS = ("topk", "kthvalue")
_FUNCTIONS = (torch.topk, torch.kthvalue)


def plain_replacement(own: type[nn.Module]) -> Replacement:
    """Return what stands in for a class of no known library."""
    encodes = "encode" in selecting_methods(own)
    return Replacement(
        own.__module__,
        own.__name__,
        PlainEncode if encodes else PlainForward,
        ("forward", "encode") if encodes else ("forward",),
        "selections by its own code, and what is scattered and decoded from them",
        own,
    )


def selecting_methods(own: type[nn.Module]) -> tuple[str, ...]:
    """Return those of forward and encode whose code, or a function that it calls, selects."""
    names = ("forward", "encode")
    return tuple(name for name in names if _selects(own, getattr(own, name, None)))


def holds_selection(module: nn.Module) -> bool:
    """Return True if a stranger's module, or nn.Sequential, has a child whose own code selects."""
    own = class_of(module)
    if own is not nn.Sequential and not _is_strangers(own):
        return False
    return any("forward" in selecting_methods(class_of(child)) for child in module.children())


def _is_strangers(defined: type | FunctionType) -> bool:
    module = defined.__module__ or ""  # generated code has none
    return module.partition(".")[0] not in _NOT_STRANGERS


def _selects(own: type, method: object) -> bool:
    pending, seen = [method], set()
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        if not _is_strangers(function):
            continue
        for name in _names(function.__code__):
            found = function.__globals__.get(name)
            if name in _SELECTIONS or any(found is one for one in _FUNCTIONS):
                return True
            pending += [found, *(vars(base).get(name) for base in own.__mro__)]
        pending.append(getattr(function, "__wrapped__", None))  # of a decorator
    return False


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in a function's code, and in those within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
