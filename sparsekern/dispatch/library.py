"""The only file that knows torch.library, the native modules and the choice of an implementation.

An operation is defined once (`Operation`), with one reference and any number of implementations.
The choice among them is made at each call from the device and dtype of its first tensor, never at
import, so that one process can use several devices and `backend(...)` can force a choice for a
while.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from . import kept_memory
from .autograd import raise_versions, recording_kernel, versioning_kernel, without_views
from .fast_path import device_type_of, dispatcher_has_nothing_to_do

NAMESPACE = "sparsekern"
PACKAGE = pathlib.Path(__file__).parents[1]
BACKENDS = ("auto", "reference", "native", "triton")
# The order in which the automatic choice tries them, before the reference.
PREFERRED = {"cpu": ("native",), "cuda": ("native", "triton")}
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_definitions = torch.library.Library(NAMESPACE, "DEF")
_operations: dict[str, Operation] = {}
# For the whole process: autograd's own threads would miss a thread-local choice.
_forced: list[str] = []
# By device type, for the tests that run the CUDA sources on a CPU.
_stand_ins: dict[str, ModuleType] = {}


class BackendUnavailableError(RuntimeError):
    """A forced backend cannot serve a call; the message says what is missing."""


# -- which implementations exist here --------------------------------------------------------------


@functools.cache
def _load_module(name: str) -> tuple[ModuleType | None, str]:
    """A compiled module and an empty reason, or None and why it is not there."""
    try:
        return importlib.import_module(f"{NAMESPACE}.{name}"), ""
    except ImportError as error:
        report = PACKAGE / "_build_report.json"
        if report.exists():
            built = json.loads(report.read_text()).get(name, "")
            if built and not built.startswith("built"):
                return None, built
        elif isinstance(error, ModuleNotFoundError):
            reason = "was never built (run 'pip install .', or leave the source folder)"
            return None, f"{PACKAGE} {reason}"
        return None, f"{NAMESPACE}.{name} cannot be loaded: {error}"


@functools.cache
def native_module(device_type: str) -> tuple[ModuleType | None, str]:
    """The compiled module for a device type, or None and the reason."""
    if device_type in _stand_ins:
        return _stand_ins[device_type], ""
    if device_type == "cpu":
        return _load_module("_native")
    if device_type == "cuda":
        if torch.version.hip:
            return None, "the CUDA C++ kernels do not run on ROCm"
        return _load_module("_cuda")
    return None, f"there is no native code for {device_type}"


def empty_cache() -> None:
    """Give the memory of freed large outputs on the CPU back to the system.

    Outputs of 32 MiB and more leave theirs, up to 2 GiB, to the next ones of the same sizes.
    torch.cuda.empty_cache() is the same for GPUs.

    Example:
        >>> import sparsekern
        >>> sparsekern.empty_cache()
    """
    kept_memory.release()


@contextlib.contextmanager
def stand_in(device_type: str, module: ModuleType) -> Iterator[None]:
    """Use another compiled module, of the same functions, for a device type (the tests' host
    emulation of CUDA)."""
    before = _stand_ins.copy()
    _stand_ins[device_type] = module
    _clear_modules()
    try:
        yield
    finally:
        _stand_ins.clear()
        _stand_ins.update(before)
        _clear_modules()


def _clear_modules() -> None:
    native_module.cache_clear()
    _clear_choices()


@functools.cache
def kernels(backend_name: str, stem: str) -> ModuleType:
    """What serves a stem for a backend: `native/<stem>.py` or, with triton, `kernels/<stem>.py`."""
    folder = {"native": "native", "triton": "kernels"}[backend_name]
    return importlib.import_module(f"{NAMESPACE}.{folder}.{stem}")


def triton_interpreted() -> bool:
    """True when Triton was asked to interpret its kernels on the host."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True")


def _missing_triton(device_type: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'sparsekern[triton]')"
    if device_type == "cpu" and not triton_interpreted():
        return "triton runs on a CPU only in its interpreter (TRITON_INTERPRET=1)"
    if device_type not in ("cpu", "cuda"):
        return f"the Triton kernels do not run on {device_type}"
    return ""


# -- operations ------------------------------------------------------------------------------------


@dataclass
class Operation:
    """One torch operation: its schema, its reference, and how else it can be computed.

    `implementations` maps a backend name to a function of the operation's arguments; `cpu_only`
    says that the native one has no CUDA kernel, `owned` that none of its outputs is a view;
    `mutated` are the places of arguments that change.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    implementations: dict[str, Callable[..., Any]]
    cpu_only: bool = False
    owned: bool = False
    mutated: list[int] = field(default_factory=list)
    choices: dict[tuple[str, torch.dtype], Callable[..., Any]] = field(default_factory=dict)

    def missing(self, name: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
        """Why backend `name` cannot serve tensors of this device and dtype; empty when it can."""
        if name == "reference":
            return ""
        if name not in self.implementations:
            return f"{self.name} has no {name} implementation"
        reason = _missing_triton(device_type) if name == "triton" else native_module(device_type)[1]
        if reason:
            return reason
        on_cpu = name == "native" and device_type == "cpu" and device_type not in _stand_ins
        if self.cpu_only and not on_cpu:
            return f"{self.name} has kernels for the CPU only"
        if dtype == torch.float64 and not on_cpu:
            return "float64 is served by the reference and the CPU kernels only"
        return ""

    def choose(self, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
        """The backend that serves a call, and the reason."""
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

    def __call__(self, *args: Any) -> Any:
        first = args[0]
        key = (device_type_of(first), first.dtype)
        function = self.choices.get(key)
        if function is None:
            name, _ = self.choose(key[0], _ranked_dtype(first.dtype))
            function = self.reference if name == "reference" else self.implementations[name]
            if name != "native" or not self.owned:
                function = without_views(function)
            self.choices[key] = function
        return function(*args)


def _ranked_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that decides the choice: integer tensors (indices) are served wherever float32
    is."""
    return dtype if dtype.is_floating_point else torch.float32


def _clear_choices() -> None:
    for operation in _operations.values():
        operation.choices.clear()


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    implementations: dict[str, Callable[..., Any]],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    vmap: Callable[..., Any] | None = None,
    autocast: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    cpu_only: bool = False,
    owned: bool = False,
) -> Callable[..., Any]:
    """Register one operation with torch and return it.

    name: inside the namespace. schema: torch's, without the name. reference, implementations:
    functions of the schema's positional arguments. fake: shapes and dtypes only. backward,
    setup_context: the one gradient that every backend shares. vmap: as in
    torch.library.register_vmap. autocast: maps (arguments, dtype) to the arguments to use inside an
    autocast region. check: raises for arguments that the implementations must not see; the public
    function's own checks may spare it where the dispatcher is skipped. cpu_only: there is no kernel
    for GPUs. owned: no output of the native implementation is a view (one that is will be replaced
    otherwise, which small calls notice).
    """
    operation = Operation(name, schema, reference, implementations, cpu_only, owned)
    _operations[name] = operation
    qualified = f"{NAMESPACE}::{name}"
    _definitions.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _definitions.impl(name, _checked(operation, check), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_definitions)
    if vmap is not None:
        torch.library.register_vmap(qualified, vmap, lib=_definitions)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if backward is not None:
        kernel = recording_kernel(name, overload, backward, setup_context)
        _definitions.impl(name, kernel, "Autograd", with_keyset=True)
    arguments = enumerate(overload._schema.arguments)
    operation.mutated = [at for at, a in arguments if a.alias_info and a.alias_info.is_write]
    if operation.mutated:
        kernel = versioning_kernel(overload, operation.mutated)
        _definitions.impl(name, kernel, "ADInplaceOrView", with_keyset=True)
    if autocast is not None:
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _definitions.impl(name, _autocast_rule(overload, autocast, device_type), key)
    return _entrance(operation, overload)


def _checked(operation: Operation, check: Callable[..., None] | None) -> Callable[..., Any]:
    if check is None:
        return operation

    def run(*args: Any) -> Any:
        check(*args)
        return operation(*args)

    return run


def differentiating() -> bool:
    """In a backward pass: whether its own derivative is wanted, in either mode."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def unknown_size() -> Any:
    """In a fake: the size of a dimension that depends on the data."""
    return torch.library.get_ctx().new_dynamic_size()


def _entrance(operation: Operation, overload: Callable[..., Any]) -> Callable[..., Any]:
    """What the public functions call: the implementation itself where torch's dispatcher has
    nothing to do, else the overload.
    """

    @functools.wraps(overload)
    def call(*args: Any) -> Any:
        if not dispatcher_has_nothing_to_do(args):
            return overload(*args)
        outputs = operation(*args)
        if operation.mutated:
            raise_versions(operation.mutated, args)
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


# -- forcing a backend -----------------------------------------------------------------------------


def forced_backend() -> str | None:
    """The backend forced by `backend(...)` or SPARSEKERN_BACKEND, or None for the automatic
    choice."""
    name = _forced[-1] if _forced else os.environ.get("SPARSEKERN_BACKEND", "auto")
    _check_backend(name, "backend" if _forced else "SPARSEKERN_BACKEND")
    return None if name == "auto" else name


def _check_backend(name: str, argument: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: name must be one of {', '.join(BACKENDS)}, got {name!r}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one implementation for every operation inside the `with` block.

    The choice holds for the whole process, not for the calling thread only, because autograd runs
    backward passes on threads of its own. A call that the chosen backend cannot serve raises and
    says what is missing.

    Args:
        name: "auto" (choose per device, dtype and operation), "reference", "native" or "triton".

    Raises:
        ValueError: name is none of these.

    Example:
        >>> import torch, sparsekern
        >>> with sparsekern.backend("reference"):
        ...     values, indices = sparsekern.topk(torch.tensor([3.0, 1.0, 2.0]), 2)
        >>> indices.tolist()
        [0, 2]
    """
    _check_backend(name, "backend")
    _forced.append(name)
    _clear_choices()
    try:
        yield
    finally:
        _forced.pop()
        _clear_choices()


# -- what `sparsekern info` tells ------------------------------------------------------------------


def implementation_table() -> list[dict[str, str]]:
    """One row per operation and device type: operation, device, chosen backend, reason, and why not
    the others."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for operation in _operations.values():
        for device in devices:
            try:
                name, reason = operation.choose(device, torch.float32)
            except BackendUnavailableError as error:
                name, reason = "none", str(error)
            others = {
                other: operation.missing(other, device) or "available"
                for other in BACKENDS[1:]
                if other != name
            }
            rows.append(
                {
                    "operation": operation.name,
                    "device": device,
                    "backend": name,
                    "reason": reason,
                    "others": "; ".join(f"{other}: {why}" for other, why in others.items()),
                }
            )
    return rows


def describe() -> dict[str, Any]:
    """Versions, instruction sets, threads, GPU and the implementation table, as plain data."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    modules = {}
    for device, name in (("cpu", "_native"), ("cuda", "_cuda")):
        module, reason = native_module(device)
        modules[name] = dict(module.build_info()) if module else {"missing": reason}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = (
        "sparsekern", "torch", "numpy", "triton", "h5py", "matplotlib", "safetensors",
        "tqdm",
    )  # fmt: skip
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: version(package) for package in packages},
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "modules": modules,
        "forced_backend": forced_backend() or "none",
        "implementations": implementation_table(),
    }
