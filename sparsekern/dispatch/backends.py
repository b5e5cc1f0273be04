"""The backends, the order in which they are tried, and a way to force one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from . import modules

BACKENDS = ("auto", "reference", "native", "triton")
# The order in which the automatic choice tries them, before the reference.
PREFERRED = {"cpu": ("native",), "cuda": ("native", "triton")}

# For the whole process: autograd's own threads would miss a thread-local choice.
_forced: list[str] = []
_choices: list[dict[Any, Any]] = []


class BackendUnavailableError(RuntimeError):
    """A forced backend cannot serve a call; the message says what is missing."""


def new_choices() -> dict[Any, Any]:
    """Return a dictionary of choices already made, cleared whenever they may no longer hold."""
    choices: dict[Any, Any] = {}
    _choices.append(choices)
    return choices


def _forget_choices() -> None:
    for choices in _choices:
        choices.clear()


def forced_backend() -> str | None:
    """Return the backend forced by `backend(...)` or SPARSEKERN_BACKEND; None if there is none."""
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
    _forget_choices()
    try:
        yield
    finally:
        _forced.pop()
        _forget_choices()


@contextlib.contextmanager
def stand_in(device_type: str, module: ModuleType) -> Iterator[None]:
    """Use another compiled module with the same functions for a device type.

    The tests do so to run the CUDA sources on a CPU.
    """
    before = modules.stand_ins.copy()
    modules.stand_ins[device_type] = module
    forget_modules()
    try:
        yield
    finally:
        modules.stand_ins.clear()
        modules.stand_ins.update(before)
        forget_modules()


def forget_modules() -> None:
    """Look for the compiled modules again at the next call."""
    modules.native_module.cache_clear()
    modules.load_module.cache_clear()
    _forget_choices()
