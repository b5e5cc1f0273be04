"""The public functions: accelerate, restore, and the report of what they do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from .classes import standing_in
from .peers import find, peer_of
from .replacement import Accelerated, Replacement, class_of
from .trial import find_plain

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Report:
    """What of a model is replaced, and why the rest is not.

    Attributes:
        replaced: by the name of a module in the model, its class and what is faster.
        left: by the name of a module of a known library, or of one that selects, its class and the
            reason.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name or '(model)'}: {text}" for name, text in self.replaced.items()]
        lines += [f"{name or '(model)'}: not replaced, {text}" for name, text in self.left.items()]
        return "\n".join(lines) or "nothing of a known library"


def accelerate(model: Module, *, inplace: bool = True, match_upstream: bool = False) -> Module:
    """Let the sparse autoencoders and top-k layers inside a model run on our kernels.

    Each module of a class that other libraries have (see docs/accelerating.md) gets a subclass of
    its class whose encoder, selection, decoder and losses never store [B, N]. A module of your own
    that calls torch.topk runs its own code, with our selections. Parameters, buffers, hooks,
    attributes and the keys of state_dict stay as they are, and so do the shapes and the gradients
    of all results. ``encode`` still returns a dense tensor; in the classes of libraries
    ``encode_sparse`` is new beside it.

    Args:
        model: any module; it may contain others that are not known.
        inplace: change model itself; False changes a deep copy.
        match_upstream: also keep what a library gets wrong (see docs/accelerating.md); by default
            it is made right.

    Returns:
        The model, or its copy. `report` says what was replaced. If nothing was, there is a warning,
        and nothing has changed. A second call changes nothing but match_upstream.

    Raises:
        TypeError: model is not a module.
        ValueError: a library in a version that was not tested, or a compiled model.

    Example:
        >>> import sparsekern, torch, warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # this model has nothing to replace
        ...     model = sparsekern.accelerate(torch.nn.Linear(2, 3))
    """
    _check(model)
    if not inplace:
        model = copy.deepcopy(model)
    found = [
        (module, replacement)
        for _, module, replacement, _ in _walk(model)
        if replacement is not None
    ]
    if not found:
        warnings.warn(
            f"accelerate: {type(model).__name__} has nothing to replace: {report(model)}",
            stacklevel=2,
        )
    for module, replacement in found:
        if not isinstance(module, Accelerated) or module.match_upstream != match_upstream:
            _check_class("accelerate", module)
            module.__class__ = standing_in(class_of(module), replacement, match_upstream)
    return model


def restore(model: Module) -> Module:
    """Undo `accelerate` in place: every module has its own class again. Return the model.

    Raises:
        TypeError: model is not a module.
        ValueError: a module's class was replaced once more since, as fully_shard does.

    Example:
        >>> import sparsekern, torch
        >>> sparsekern.restore(torch.nn.Linear(2, 3))
        Linear(in_features=2, out_features=3, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    accelerated = [module for module in model.modules() if isinstance(module, Accelerated)]
    for module in accelerated:
        _check_class("restore", module)
    for module in accelerated:
        module.__class__ = class_of(module)  # type: ignore[assignment]
    return model


def report(model: nn.Module) -> Report:
    """Return what `accelerate` has replaced, or would replace, in a model, and why not the rest."""
    result = Report()
    for name, module, replacement, reason in _walk(model):
        own = class_of(module).__name__
        if replacement is None:
            result.left[name] = f"{own}: {reason}"
        elif isinstance(module, Accelerated):
            matching = ", as upstream" if module.match_upstream else ""
            result.replaced[name] = f"{own}: {replacement.parts}{matching}"
        else:
            result.left[name] = f"{own}: accelerate was not called"
    return result


def _check_class(op: str, module: nn.Module) -> None:
    """Check that nobody has given an accelerated module a class of its own since."""
    if isinstance(module, Accelerated) and "stands_for" not in vars(type(module)):
        raise ValueError(
            f"{op}: a module must have the class that accelerate gave it, got "
            f"{type(module).__name__}, which was made since; undo that first"
        )


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise ValueError(
                "accelerate: model must not be compiled yet, got a compiled "
                f"{type(module).__name__} at {name or 'its top'}; accelerate first, compile then"
            )
        peer = peer_of(class_of(module))
        if peer is not None and (trouble := peer.trouble()) is not None:
            raise ValueError(f"accelerate: {trouble}")


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, Replacement | None, str]]:
    """Yield the modules that are known by name, with what stands in or the reason."""
    for name, module in model.named_modules():
        known = peer_of(class_of(module)) is not None
        replacement, reason = find(class_of(module)) if known else find_plain(module)
        if replacement is not None or reason:
            yield name, module, replacement, reason
