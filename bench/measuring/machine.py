"""Which machine, which versions and which sources a row was measured with."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from measuring.checkout import ROOT, sparsekern

CPU_INFO = Path("/proc/cpuinfo")
SOURCES = ("sparsekern/**/*.py", "csrc/**/*")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    if CPU_INFO.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", CPU_INFO.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A file name from a processor's or GPU's name."""
    plain = re.sub(r"\((r|tm|c)\)|@", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def machine_name(device: str) -> str:
    """The name of the file that holds this machine's rows: the GPU, or the CPU with its cores."""
    if device == "cuda":
        return slug(torch.cuda.get_device_name())
    return f"{slug(cpu_model())}-{os.cpu_count()}-cores"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit of the sources, "+ changes" where they differ from it, or "unknown"."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "sparsekern", "csrc", "setup.py")
    return f"{head} + changes" if head and changed else head or "unknown"


def sources_digest() -> str:
    """Twelve hex digits over the library's sources: says which code it was without git."""
    digest = hashlib.sha256()
    suffixes = {".py", ".cpp", ".h", ".cu", ".cuh"}
    files = {path for pattern in SOURCES for path in ROOT.glob(pattern) if path.suffix in suffixes}
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@functools.cache
def facts(device: str) -> dict[str, Any]:
    """Everything about this session that every row repeats, apart from the time of day."""
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
        "commit": commit(),
        "sources": sources_digest(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }
