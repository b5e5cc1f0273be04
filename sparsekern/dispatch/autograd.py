"""How a gradient that is written in Python is recorded, and what autograd has to know of outputs
and of arguments that change.

torch's own registration of such gradients refuses the transforms of torch.func. Here each level of
transforms records the operation for itself, as it does torch's own operations: on the tensors of
that level, with the levels below run inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

_AFTER = torch._C._after_ADInplaceOrView_keyset


def recording_kernel(
    name: str,
    overload: Any,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> Callable[..., Any]:
    """The kernel of an operation for torch's dispatch key Autograd.

    backward, setup_context: as those of an autograd.Function. Forward-mode differentiation is
    refused: its tangents would be lost.
    """
    defaults = [argument.default_value for argument in overload._schema.arguments]

    def run(keys: Any, *args: Any) -> Any:
        # Below the tracking of views, too: results are no views of the tensors they were made from.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keys & _AFTER, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keys = args
        if torch._C._are_functorch_transforms_active():
            # autograd.Function has turned recording off, for the levels below as well.
            with torch.enable_grad(), _set_fwd_grad_enabled(True):
                outputs = run(keys, *inputs)
        else:
            outputs = run(keys, *inputs)
        if setup_context is not None:
            # The dispatcher leaves out arguments that equal their default.
            setup_context(ctx, (*inputs, *defaults[len(inputs) :]), outputs)
        return outputs

    def recorded_backward(ctx: Any, *grads: Any) -> Any:
        result = backward(ctx, *grads)
        return (*result, None) if isinstance(result, tuple) else (result, None)

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"{name}: there is no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
            "forward_ad); use reverse mode: torch.autograd.grad, torch.func.jacrev"
        )

    def key(ctx: Any) -> Any:  # by which compiled autograd tells functions apart
        return (ctx._autograd_function_id,)

    functions = {
        "forward": forward,
        "backward": recorded_backward,
        "jvp": refuse,
        "_compiled_autograd_key": key,
    }
    function: Any = type(
        f"sparsekern_{name}",
        (_SingleLevelFunction,),
        {name: staticmethod(function) for name, function in functions.items()},
    )

    def kernel(keys: Any, *args: Any) -> Any:
        recording = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if not recording and forward_ad._current_level < 0:
            return run(keys, *args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*args, keys)
        return function.apply(*args, keys)

    return kernel


def versioning_kernel(overload: Any, mutated: list[int]) -> Callable[..., Any]:
    """The kernel of an operation for torch's dispatch key ADInplaceOrView, where some arguments are
    changed in place."""

    def kernel(keys: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            outputs = overload.redispatch(keys & _AFTER, *args)
        raise_versions(mutated, args)
        return outputs

    return kernel


def raise_versions(mutated: list[int], args: tuple[Any, ...]) -> None:
    """Note that these arguments were changed: what autograd has saved of them is stale."""
    changed = [args[at] for at in mutated]
    torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])


def without_views(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with outputs none of which is a view: autograd treats in-place changes of
    views in its own way, and refuses many."""

    def run(*args: Any) -> Any:
        outputs = function(*args)
        if isinstance(outputs, tuple):
            return tuple(t.detach() if t._is_view() else t for t in outputs)
        return outputs.detach() if outputs is not None and outputs._is_view() else outputs

    return run
