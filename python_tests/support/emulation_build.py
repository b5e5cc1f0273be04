"""Builds the host emulation of the CUDA kernels with ninja: a Python module, and the stand-alone
checker under a sanitizer. Only what has changed is compiled again."""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import subprocess
import types

from setup_file import setup_file

ROOT = pathlib.Path(__file__).parents[2].resolve()
CSRC = ROOT / "csrc"
EMULATION = CSRC / "tests" / "emulation"
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
    setup = setup_file()
    target = setup.module_file(MODULE)
    flags = ["-O1", "-fPIC", "-fvisibility=hidden"]
    sources = [source for source in _emulation() if not source.name.startswith("driver")]
    sources += [*_kernels(), CSRC / "bindings_cuda.cpp"]
    flags += setup.NinjaFile(folder / "module").include_flags()
    _build(folder / "module", target, flags, ["-shared"], sources)
    spec = importlib.util.spec_from_file_location(MODULE, folder / "module" / target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_driver(sanitizer: str, folder: pathlib.Path = FOLDER) -> pathlib.Path:
    """The stand-alone checker under "address" (with undefined behaviour) or "thread"."""
    flags = SANITIZERS[sanitizer].split()
    _require_sanitizer(sanitizer, folder)
    sources = _emulation() + _kernels()
    _build(folder / sanitizer, "driver", ["-O1", "-g1", *flags], flags, sources)
    return folder / sanitizer / "driver"


def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        raise RuntimeError("g++ was not found (install g++ 11 or later)")
    return found


def _kernels() -> list[pathlib.Path]:
    return sorted((CSRC / "cuda").rglob("*.cu"))


def _emulation() -> list[pathlib.Path]:
    return sorted(EMULATION.glob("*.cpp"))


def _require_sanitizer(sanitizer: str, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [compiler(), *SANITIZERS[sanitizer].split(), "-x", "c++", "-", "-o"]
    probe = folder / f"probe_{sanitizer}"
    if not probe.exists():
        made = subprocess.run([*command, str(probe)], input=b"int main() {}", capture_output=True)
        if made.returncode != 0:
            raise RuntimeError(f"g++ cannot link -fsanitize={sanitizer} (install libasan, libtsan)")


def _build(
    folder: pathlib.Path,
    target: str,
    flags: list[str],
    link_flags: list[str],
    sources: list[pathlib.Path],
) -> None:
    setup = setup_file()
    file = setup.NinjaFile(folder)
    cxx = setup.words([compiler()])
    includes = [f"-I{file.path(place)}" for place in (EMULATION / "include", CSRC)]
    common = setup.words([*COMMON_FLAGS.split(), *includes, *flags])
    file.rule("cxx", f"{cxx} -MMD -MF $out.d {common} $flags -x c++ -c $in -o $out")
    for source in sources:
        file.compile("cxx", source, source.suffix[1:], [])
    file.link(f"{cxx} $in {setup.words(link_flags)} -o $out", target)
    try:
        file.run(shown=False)
    except setup.CompileError as error:
        raise BuildError(f"building {folder / target} failed:\n{error.output}") from None
