"""The facts of `sparsekern info`: versions, modules, and the backend of each operation."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from .backends import BACKENDS, BackendUnavailableError, forced_backend
from .modules import native_module
from .operations import operations


def implementation_table() -> list[dict[str, str]]:
    """Return one row per operation and device type.

    Its keys: operation, device, backend (the chosen one), reason, others (why not the others).
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for operation in operations.values():
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
    """Return versions, instruction sets, threads, GPU and the implementation table as a dict."""

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
