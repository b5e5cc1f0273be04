"""Operations: their registration with torch, and the choice of an implementation for a call.

An operation is defined once (`Operation`), with one reference and any number of implementations.
The choice among them is made at each call from the device and dtype of its first tensor, never at
import, so that one process can use several devices and `backend(...)` can force a choice for a
while. This is the only file that knows torch.library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from .autograd import (
    CAN_RECORD,
    increment_versions,
    recording_call,
    recording_kernel,
    versioning_kernel,
    without_views,
)
from .backends import PREFERRED, BackendUnavailableError, forced_backend, new_choices
from .dtensors import Rows, call_on_parts, has_dtensors
from .fast_path import NOTHING, RECORDING, device_type_of, left_to_torch
from .modules import native_module, stand_ins, why_no_triton

NAMESPACE = "sparsekern"
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_definitions = torch.library.Library(NAMESPACE, "DEF")
operations: dict[str, Operation] = {}


@dataclass
class Operation:
    """One torch operation: its schema, its reference and its other implementations.

    Attributes:
        name: within the namespace.
        schema: torch's, without the name.
        reference: the definition, a function of the schema's positional arguments.
        implementations: functions of the same arguments, by name of their backend.
        cpu_only: the native implementation has no CUDA kernel.
        owned: no output of the native implementation is a view.
        mutated: positions of the arguments that the operation changes.
        choices: the functions chosen for device types and dtypes so far.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    implementations: dict[str, Callable[..., Any]]
    cpu_only: bool = False
    owned: bool = False
    mutated: list[int] = field(default_factory=list)
    choices: dict[tuple[str, torch.dtype], Callable[..., Any]] = field(default_factory=new_choices)

    def missing(self, name: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
        """Return why backend `name` cannot serve this device and dtype; empty where it can."""
        if name == "reference":
            return ""
        if name not in self.implementations:
            return f"{self.name} has no {name} implementation"
        reason = why_no_triton(device_type) if name == "triton" else native_module(device_type)[1]
        if reason:
            return reason
        on_cpu = name == "native" and device_type == "cpu" and device_type not in stand_ins
        if self.cpu_only and not on_cpu:
            return f"{self.name} has kernels for the CPU only"
        if dtype == torch.float64 and not on_cpu:
            return "float64 is served by the reference and the CPU kernels only"
        return ""

    def choose(self, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
        """Return the backend that serves a call, and the reason."""
        if forced := forced_backend():
            if reason := self.missing(forced, device_type, dtype):
                raise BackendUnavailableError(
                    f"{self.name}: backend '{forced}' was asked for but cannot run on "
                    f"{device_type}: {reason}"
                )
            return forced, "forced"
        reasons: list[str] = []
        for name in PREFERRED.get(device_type, ()):
            if not (reason := self.missing(name, device_type, dtype)):
                return name, "; ".join(reasons) or "first choice"
            reasons.append(f"no {name}: {reason}")
        return "reference", "; ".join(reasons) or f"no kernels for {device_type}"

    def runs_natively(self, first: torch.Tensor) -> bool:
        """Return True if the native implementation was chosen before for such a first argument."""
        function = self.choices.get((device_type_of(first), first.dtype))
        return function is not None and function is self.implementations.get("native")

    def __call__(self, *args: Any) -> Any:
        """Run the implementation that serves the device and dtype of the first argument."""
        first = args[0]
        key = (device_type_of(first), first.dtype)
        function = self.choices.get(key)
        if function is None:
            name, _ = self.choose(key[0], _deciding_dtype(first.dtype))
            function = self.reference if name == "reference" else self.implementations[name]
            if name != "native" or not self.owned:
                function = without_views(function)
            self.choices[key] = function
        return function(*args)


def _deciding_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that decides the choice: float32 for integers, which are served like it."""
    return dtype if dtype.is_floating_point else torch.float32


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[Arguments, Result],
    implementations: dict[str, Callable[..., Any]],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    vmap: Callable[..., Any] | None = None,
    autocast: Callable[..., Any] | None = None,
    check: Callable[..., object] | None = None,
    cpu_only: bool = False,
    owned: bool = False,
    rows: Rows | None = None,
) -> Callable[Arguments, Result]:
    """Register one operation with torch and return it.

    Args:
        name: within the namespace.
        schema: torch's, without the name.
        reference: the definition, a function of the schema's positional arguments.
        implementations: functions of the same arguments, by name of their backend.
        fake: a function of the same arguments that returns empty outputs.
        backward: the gradient that every backend shares, as of an autograd.Function.
        setup_context: as of an autograd.Function.
        vmap: a rule (operation, info, in_dims, *arguments), see ops/batching.py.
        autocast: maps (arguments, dtype) to the arguments to use inside an autocast region.
        check: raises for arguments that the implementations must not get. It is not called where
            the dispatcher is skipped: there the public function has checked them.
        cpu_only: there is no kernel for GPUs.
        owned: no output of the native implementation is a view. Otherwise each output is tested,
            and detached if it is one, which takes time in small calls.
        rows: how it works on DTensors whose rows are cut; None: these are refused.
    """
    arguments = schema[1 : schema.index(") ->")].split(", ")
    mutated = [i for i, argument in enumerate(arguments) if "!" in argument]
    operation = Operation(name, schema, reference, implementations, cpu_only, owned, mutated)
    operations[name] = operation
    qualified = f"{NAMESPACE}::{name}"
    _definitions.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    implementation = _with_check(operation, check)
    if mutated and not CAN_RECORD:  # else a kernel for ADInplaceOrView does it
        implementation = _with_versions(implementation, mutated)
    _definitions.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_definitions)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    record = None
    if backward is not None and CAN_RECORD and not mutated:
        record = recording_call(name, operation, backward, setup_context)
    names = [argument.split(" ")[1].partition("=")[0] for argument in arguments]
    call = _entrance(operation, overload, record, names, rows)
    if vmap is not None:
        rule = functools.partial(vmap, call)
        torch.library.register_vmap(qualified, rule, lib=_definitions)
    if backward is not None and CAN_RECORD:
        kernel = recording_kernel(name, overload, len(arguments), backward, setup_context)
        _definitions.impl(name, kernel, "Autograd", with_keyset=True)
    elif backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_definitions
        )
    if mutated and CAN_RECORD:
        kernel = versioning_kernel(overload, mutated)
        _definitions.impl(name, kernel, "ADInplaceOrView", with_keyset=True)
    if autocast is not None:
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _definitions.impl(name, _autocast_rule(overload, autocast, device_type), key)
    return call


def _with_check(operation: Operation, check: Callable[..., object] | None) -> Callable[..., Any]:
    if check is None:
        return operation

    def run(*args: Any) -> Any:
        check(*args)
        return operation(*args)

    return run


def _with_versions(function: Callable[..., Any], mutated: list[int]) -> Callable[..., Any]:
    """Tell autograd after each call which arguments it changed."""

    def run(*args: Any) -> Any:
        outputs = function(*args)
        increment_versions(mutated, args)
        return outputs

    return run


def differentiating() -> bool:
    """Return True in a backward pass that is differentiated itself, in either mode."""
    return torch.is_grad_enabled() or getattr(forward_ad, "_current_level", 0) >= 0


def unknown_size() -> Any:
    """Return, in a fake, the size of a dimension that depends on the data."""
    return torch.library.get_ctx().new_dynamic_size()


def _entrance(
    operation: Operation,
    overload: Callable[..., Any],
    record: Callable[..., Any] | None,
    names: list[str],
    rows: Rows | None,
) -> Callable[..., Any]:
    """Make the function that public functions call.

    It calls the implementation itself where torch's dispatcher has nothing to do, `record`, if
    there is one, where a gradient is all that it would record, else the overload. Of DTensors,
    which torch knows no rule for, it takes the parts; names and rows: see `call_on_parts`.
    """

    @functools.wraps(overload)
    def call(*args: Any) -> Any:
        left = left_to_torch(args)
        if left == RECORDING and record is not None:
            return record(*args)
        if left != NOTHING:
            if not torch.compiler.is_compiling() and has_dtensors(args):
                return call_on_parts(operation.name, names, rows, call, args)
            return overload(*args)
        outputs = operation(*args)
        if operation.mutated:
            increment_versions(operation.mutated, args)
        return outputs

    return call


def _autocast_rule(
    overload: Callable[..., Any], cast: Callable[..., Any], device_type: str
) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        cast_args = cast(args, torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return overload(*cast_args)

    return run
