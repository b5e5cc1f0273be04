"""Builds the host emulation of the CUDA kernels with ninja: a Python module, and the stand-alone
checker under a sanitizer. Only what has changed is compiled again."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sysconfig
import types

ROOT = pathlib.Path(__file__).parent.parent.resolve()
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "emulation"
MODULE = "_cuda_emulation"
# The kernels read memory as other types, which nvcc lets them do.
COMMON_FLAGS = (
    "-std=c++20 -DSPARSEKERN_EMULATION -fno-strict-aliasing -Wall -Wextra -Wno-unknown-pragmas"
)
SANITIZERS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-fsanitize=thread",
}


class BuildError(Exception):
    """The sources do not compile or link. (What is missing on this machine is a RuntimeError.)"""


def build_module(folder: pathlib.Path = FOLDER) -> types.ModuleType:
    """The CUDA kernels as a Python module that takes addresses of host memory."""
    import pybind11

    target = f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    python = sysconfig.get_paths()["include"]
    if not pathlib.Path(python, "Python.h").exists():
        raise RuntimeError(f"the headers of Python are missing in {python} (install python3-dev)")
    includes = f"-isystem {pybind11.get_include()} -isystem {python}"
    flags = f"-O2 -fPIC -fvisibility=hidden {includes}"
    sources = [source for source in _emulation() if not source.name.startswith("driver")]
    sources += [*_kernels(), CSRC / "bindings_cuda.cpp"]
    _build(folder / "module", target, flags, "-shared", sources)
    spec = importlib.util.spec_from_file_location(MODULE, folder / "module" / target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_driver(sanitizer: str, folder: pathlib.Path = FOLDER) -> pathlib.Path:
    """The stand-alone checker under "address" (with undefined behaviour) or "thread"."""
    flags = SANITIZERS[sanitizer]
    _require_sanitizer(sanitizer, folder)
    sources = _emulation() + _kernels()
    _build(folder / sanitizer, "driver", f"-O1 -g {flags}", flags, sources)
    return folder / sanitizer / "driver"


def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        raise RuntimeError("g++ was not found (install g++ 11 or later)")
    return found


def ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise RuntimeError("ninja was not found (pip install ninja)") from None
        return found
    return os.path.join(BIN_DIR, "ninja")


def _kernels() -> list[pathlib.Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def _emulation() -> list[pathlib.Path]:
    return sorted((CSRC / "emulation").glob("*.cpp"))


def _require_sanitizer(sanitizer: str, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [compiler(), *SANITIZERS[sanitizer].split(), "-x", "c++", "-", "-o"]
    probe = folder / f"probe_{sanitizer}"
    if not probe.exists():
        made = subprocess.run([*command, str(probe)], input=b"int main() {}", capture_output=True)
        if made.returncode != 0:
            raise RuntimeError(f"g++ cannot link -fsanitize={sanitizer} (install libasan, libtsan)")


def _build(
    folder: pathlib.Path, target: str, flags: str, link_flags: str, sources: list[pathlib.Path]
) -> None:
    cxx = compiler()
    common = f"{COMMON_FLAGS} -I{CSRC / 'emulation' / 'include'} -I{CSRC} {flags}"
    lines = [
        "ninja_required_version = 1.8",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {common} -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} $in {link_flags} -o $out",
    ]
    objects = [f"{source.name}.o" for source in sources]
    lines += [f"build {o}: cxx {source}" for o, source in zip(objects, sources, strict=True)]
    lines.append(f"build {target}: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        made = subprocess.run([ninja(), "-C", str(folder)], capture_output=True, text=True)
    if made.returncode != 0:
        raise BuildError(f"building {folder / target} failed:\n{made.stdout}{made.stderr}")
