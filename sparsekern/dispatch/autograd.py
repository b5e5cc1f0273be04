"""How a gradient that is written in Python is recorded, and what autograd has to know of outputs
and of arguments that change.

torch's own registration of such gradients refuses the transforms of torch.func. Here each level of
transforms records the operation for itself, as it does torch's own operations: on the tensors of
that level, with the levels below run inside.

This needs private names of torch. Where one is missing `CAN_RECORD` is False, and gradients are
registered torch's own way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

try:
    from torch._C import (
        DispatchKey,
        _after_ADInplaceOrView_keyset,
        _any_requires_grad,
        _are_functorch_transforms_active,
        _AutoDispatchBelowADInplaceOrView,
    )
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.forward_ad import _set_fwd_grad_enabled
    from torch.autograd.function import _SingleLevelFunction

    CAN_RECORD = hasattr(forward_ad, "_current_level") and hasattr(DispatchKey, "ADInplaceOrView")
except ImportError:
    CAN_RECORD = False


def recording_kernel(
    name: str,
    overload: Any,
    arguments: int,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> Callable[..., Any]:
    """The kernel of an operation for torch's dispatch key Autograd.

    arguments: how many it has; those left out are None. backward, setup_context: as those of an
    autograd.Function. Forward-mode differentiation is refused: its tangents would be lost.
    """

    def run(keys: Any, *args: Any) -> Any:
        # Below the tracking of views, too: results are no views of the tensors they were made from.
        with _AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keys & _after_ADInplaceOrView_keyset, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keys = args
        if _are_functorch_transforms_active():
            # autograd.Function has turned recording off, for the levels below as well.
            with torch.enable_grad(), _set_fwd_grad_enabled(True):
                outputs = run(keys, *inputs)
        else:
            outputs = run(keys, *inputs)
        if setup_context is not None:
            # The dispatcher leaves out arguments that equal their default, None.
            left_out = arguments - len(inputs)
            setup_context(ctx, (*inputs, *[None] * left_out), outputs)
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
        recording = torch.is_grad_enabled() and _any_requires_grad(*args)
        if not recording and forward_ad._current_level < 0:
            return run(keys, *args)
        if _are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*args, keys)
        return function.apply(*args, keys)

    return kernel


def versioning_kernel(overload: Any, mutated: list[int]) -> Callable[..., Any]:
    """The kernel of an operation for torch's dispatch key ADInplaceOrView, where some arguments are
    changed in place."""

    def kernel(keys: Any, *args: Any) -> Any:
        with _AutoDispatchBelowADInplaceOrView():
            outputs = overload.redispatch(keys & _after_ADInplaceOrView_keyset, *args)
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
            return tuple(t.detach() if _is_view(t) else t for t in outputs)
        return outputs.detach() if outputs is not None and _is_view(outputs) else outputs

    return run


def _is_view(tensor: torch.Tensor) -> bool:
    try:
        return tensor._is_view()
    except AttributeError:  # private in torch
        return True
