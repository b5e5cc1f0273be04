"""The compiled modules, and the test whether Triton runs here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable
from types import ModuleType

import torch

PACKAGE = pathlib.Path(__file__).parents[1]

IMPORTS: dict[str, Callable[[], ModuleType]] = {
    "_native": lambda: importlib.import_module("sparsekern._native"),
    "_cuda": lambda: importlib.import_module("sparsekern._cuda"),
}
# By device type, for the tests that run the CUDA sources on a CPU (see backends.stand_in).
stand_ins: dict[str, ModuleType] = {}


@functools.cache
def load_module(name: str) -> tuple[ModuleType | None, str]:
    """Return a compiled module and an empty reason, or None and the reason."""
    try:
        return IMPORTS[name](), ""
    except ImportError as error:
        report = PACKAGE / "_build_report.json"
        if report.exists():
            built = json.loads(report.read_text()).get(name, "")
            if built and not built.startswith("built"):
                return None, built
        elif isinstance(error, ModuleNotFoundError):
            reason = "was never built (run 'pip install .', or leave the source folder)"
            return None, f"{PACKAGE} {reason}"
        return None, f"sparsekern.{name} cannot be loaded: {error}"


@functools.cache
def native_module(device_type: str) -> tuple[ModuleType | None, str]:
    """Return the compiled module for a device type and an empty reason, or None and the reason."""
    if device_type in stand_ins:
        return stand_ins[device_type], ""
    if device_type == "cpu":
        return load_module("_native")
    if device_type == "cuda":
        if torch.version.hip:
            return None, "the CUDA C++ kernels do not run on ROCm"
        return load_module("_cuda")
    return None, f"there is no native code for {device_type}"


def triton_is_interpreted() -> bool:
    """Return True if Triton was asked to interpret its kernels on the host."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True")


def why_no_triton(device_type: str) -> str:
    """Return why the Triton kernels do not run on a device; empty where they do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'sparsekern[triton]')"
    if device_type == "cpu" and not triton_is_interpreted():
        return "triton runs on a CPU only in its interpreter (TRITON_INTERPRET=1)"
    if device_type not in ("cpu", "cuda"):
        return f"the Triton kernels do not run on {device_type}"
    return ""
