"""Which machine and which versions a row was measured with."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import sparsekern

CPU_INFO = Path("/proc/cpuinfo")


def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    if CPU_INFO.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """Make a file name from a processor's or GPU's name."""
    plain = re.sub(r"\((r|tm|c)\)|@", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def machine_name(device: str) -> str:
    """Return the name of the machine in file names: the GPU, or the CPU with its cores."""
    if device == "cuda":
        return slug(torch.cuda.get_device_name())
    return f"{slug(cpu_model())}-{os.cpu_count()}-cores"


@functools.cache
def facts(device: str) -> dict[str, Any]:
    """Return what every row of this session repeats, apart from the time of day."""
    described = sparsekern.describe()
    module = described["modules"]["_cuda" if device == "cuda" else "_native"]
    built_for = module.get("instruction set") or module.get("architectures") or "none"
    return {
        "machine": machine_name(device),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": described["gpu"],
        "platform": described["platform"],
        "versions": {
            **{name: v for name, v in described["versions"].items() if v != "not installed"},
            "python": described["python"],
            "sparsekern": sparsekern.__version__,
            "cuda": torch.version.cuda or "none",
        },
        "instruction_set": built_for,
        "compiler": module.get("compiler", "none"),
        "load_at_start": round(os.getloadavg()[0], 2),
    }
