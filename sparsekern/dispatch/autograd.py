"""Gradients written in Python, and arguments and outputs that autograd must know about.

torch's own `register_autograd` refuses the transforms of torch.func. Here each level of transforms
records the operation for itself, as it records torch's own operations: on the tensors of that
level, with the levels below run inside.

This needs private names of torch. Where one is missing `CAN_RECORD` is False, and gradients are
registered with torch's `register_autograd`.
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
    """Make the kernel of an operation for torch's dispatch key Autograd.

    Forward-mode differentiation is refused: its tangents would be lost.

    Args:
        name: of the operation.
        overload: the operation in torch.ops.
        arguments: their number; those that a call leaves out are None.
        backward: as of an autograd.Function.
        setup_context: as of an autograd.Function, or None.
    """

    def run_below(keys: Any, *args: Any) -> Any:
        # Below the tracking of views, too: results are no views of the tensors they were made from.
        with _AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keys & _after_ADInplaceOrView_keyset, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keys = args
        if _are_functorch_transforms_active():
            # autograd.Function has turned recording off, for the levels below as well.
            with torch.enable_grad(), _set_fwd_grad_enabled(True):
                outputs = run_below(keys, *inputs)
        else:
            outputs = run_below(keys, *inputs)
        if setup_context is not None:
            # The dispatcher leaves out arguments that equal their default, None.
            left_out = arguments - len(inputs)
            setup_context(ctx, (*inputs, *[None] * left_out), outputs)
        return outputs

    def recorded_backward(ctx: Any, *grads: Any) -> Any:
        result = backward(ctx, *grads)
        return (*result, None) if isinstance(result, tuple) else (result, None)

    function = _function(name, forward, recorded_backward)

    def kernel(keys: Any, *args: Any) -> Any:
        recording = torch.is_grad_enabled() and _any_requires_grad(*args)
        if not recording and forward_ad._current_level < 0:
            return run_below(keys, *args)
        if _are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*args, keys)
        return function.apply(*args, keys)

    return kernel


def recording_call(
    name: str,
    implementation: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None,
) -> Callable[..., Any]:
    """Make a function that runs an implementation and records its gradient.

    It is for calls in which the dispatcher has nothing else to do.

    Args:
        name: of the operation.
        implementation: a function of all its arguments, whose outputs are no views.
        backward: as of an autograd.Function.
        setup_context: as of an autograd.Function, or None.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        outputs = implementation(*args)
        if setup_context is not None:
            setup_context(ctx, args, outputs)
        return outputs

    call: Callable[..., Any] = _function(name, forward, backward).apply
    return call


def _function(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """Make an autograd.Function of one level of transforms."""

    def refuse_jvp(*_: Any) -> Any:
        raise NotImplementedError(
            f"{name}: there is no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
            "forward_ad); use reverse mode: torch.autograd.grad, torch.func.jacrev"
        )

    def compiled_autograd_key(ctx: Any) -> Any:  # tells functions apart
        return (ctx._autograd_function_id,)

    methods: dict[str, Callable[..., Any]] = {
        "forward": forward,
        "backward": backward,
        "jvp": refuse_jvp,
        "_compiled_autograd_key": compiled_autograd_key,
    }
    return type(
        f"sparsekern_{name}",
        (_SingleLevelFunction,),
        {name: staticmethod(method) for name, method in methods.items()},
    )


def versioning_kernel(overload: Any, mutated: list[int]) -> Callable[..., Any]:
    """Make the kernel for torch's dispatch key ADInplaceOrView.

    mutated: the positions of the arguments that the operation changes in place.
    """

    def kernel(keys: Any, *args: Any) -> Any:
        with _AutoDispatchBelowADInplaceOrView():
            outputs = overload.redispatch(keys & _after_ADInplaceOrView_keyset, *args)
        increment_versions(mutated, args)
        return outputs

    return kernel


def increment_versions(mutated: list[int], args: tuple[Any, ...]) -> None:
    """Tell autograd that the arguments in these positions changed: saved ones are stale."""
    changed = [args[position] for position in mutated]
    torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])


def without_views(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it detaches outputs that are views.

    Autograd refuses many in-place changes of views.
    """

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
