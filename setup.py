"""Build the two native modules with ninja. Needs a C++ compiler; torch is not needed to build.

sparsekern._native  C++ for the CPU: each file of csrc/cpu is compiled once per instruction set.
sparsekern._cuda    CUDA C++: built when nvcc is found; no GPU and no CUDA build of torch are
needed.

SPARSEKERN_BUILD names what to build: "auto" (default), "cpu", "cuda", "cpu,cuda" or "none".
SPARSEKERN_CUDA_ARCHS lists GPU architectures, such as "80;90"; the default is those of 80, 90, 100
that nvcc knows. CXX is the command of the C++ compiler, such as "ccache g++".

Without a compiler, or when nvcc fails, the install goes on and sparsekern/_build_report.json says
what is missing and why; what SPARSEKERN_BUILD names must be built.
"""

import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
COMMON_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra"
# gcc 12 warns about its own AVX-512 headers (gcc bug 105593)
COMMON_FLAGS += " -Wno-maybe-uninitialized"
X86_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c",
}
ONCE = {"dispatch.cpp", "kept_memory.cpp", "memory.cpp"}  # not compiled per instruction set
CUDA_ARCHS = ("80", "90", "100")
PROGRAMS = {path.name for path in (CSRC / "cpu").glob("driver*.cpp")}  # stand-alone test programs
REPORTED = 300  # characters of a compiler's message in the build report


class MissingError(Exception):
    """A module cannot be built here; the message is its line in the build report."""


class CompileError(Exception):
    """A compiler ran and failed; the message is its first error."""


def wanted_kinds() -> list[str]:
    """What SPARSEKERN_BUILD names: ["auto"], ["none"], or some of "cpu" and "cuda"."""
    given = os.environ.get("SPARSEKERN_BUILD") or "auto"
    kinds = [kind.strip() for kind in given.split(",")]
    if kinds not in (["auto"], ["none"]) and not set(kinds) <= {"cpu", "cuda"}:
        raise RuntimeError(
            f"SPARSEKERN_BUILD must be auto, cpu, cuda, cpu,cuda or none, got {given!r}"
        )
    return kinds


def compiler() -> list[str]:
    """The command of the C++ compiler: CXX, split as a shell splits it, or what is on PATH."""
    if given := os.environ.get("CXX"):
        try:
            command = shlex.split(given)
        except ValueError:  # a quotation mark without its partner
            command = []
        if command and runs([*command, "--version"]):
            return command
        raise MissingError(
            f"CXX={given!r} did not run when sparsekern was installed (correct or unset CXX and "
            "reinstall)"
        )
    for name in ("g++", "clang++"):
        if (path := shutil.which(name)) and runs([path, "--version"]):
            return [path]
    raise MissingError(
        "no C++ compiler was found when sparsekern was installed (install g++ and reinstall)"
    )


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    inside = pathlib.Path(home, "bin", "nvcc") if home else None
    path = str(inside) if inside and inside.exists() else shutil.which("nvcc")
    if path is None or not runs([path, "--version"]):
        raise MissingError(
            "nvcc was not found when sparsekern was installed (install the CUDA toolkit, reinstall)"
        )
    return path


def ninja() -> str:
    try:
        from ninja import BIN_DIR

        return str(pathlib.Path(BIN_DIR, "ninja"))
    except ImportError:
        return "ninja"


def runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def cuda_archs(nvcc_path: str) -> list[str]:
    wanted = os.environ.get("SPARSEKERN_CUDA_ARCHS", "").replace(",", ";").split(";")
    if archs := [arch.strip() for arch in wanted if arch.strip()]:
        return archs
    listed = subprocess.run([nvcc_path, "--list-gpu-arch"], capture_output=True, text=True).stdout
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed.split()]
    if not archs:
        raise MissingError(
            f"{nvcc_path} knew none of sm_{', sm_'.join(CUDA_ARCHS)} when sparsekern was installed "
            "(install CUDA 12 or later and reinstall)"
        )
    return archs


def openmp_flag(cxx: list[str], folder: pathlib.Path) -> str:
    probe = folder / "openmp_probe.cpp"
    probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    command = [*cxx, "-fopenmp", str(probe), "-o", str(folder / "openmp_probe")]
    return "-fopenmp" if runs(command) else ""


class NinjaFile:
    """Rules and edges of one build.ninja."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.8"]
        self.objects: list[str] = []

    def rule(self, name: str, command: str) -> None:
        self.lines += [
            f"rule {name}",
            f"  command = {command}",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  description = {name} $out",
        ]

    def compile(self, rule: str, source: pathlib.Path, tag: str, flags: str) -> None:
        target = f"{source.stem}.{tag}.o"
        self.lines += [f"build {target}: {rule} {source}", f"  flags = {flags}"]
        self.objects.append(target)

    def link(self, command: str, target: str) -> None:
        self.lines += ["rule link", f"  command = {command}", "  description = link $out"]
        self.lines.append(f"build {target}: link {' '.join(self.objects)}")

    def run(self) -> None:
        """Builds, with the output shown as it comes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        lines = []
        with subprocess.Popen(
            [ninja(), "-C", str(self.folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        if process.returncode != 0:
            raise CompileError(first_error(lines))


def first_error(lines: list[str]) -> str:
    """The first line that speaks of an error, or the last before ninja's own."""
    own = [line for line in lines if line.strip() and not line.startswith("ninja:")]
    errors = [line for line in own if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
    return textwrap.shorten((errors or own[-1:] or lines[-1:] or ["no output"])[0], REPORTED)


def include_flags() -> str:
    import pybind11

    python = sysconfig.get_paths()["include"]
    return f"-I{CSRC} -isystem {pybind11.get_include()} -isystem {python}"


def build_native(folder: pathlib.Path, target: str) -> str:
    command = compiler()
    cxx = shlex.join(command)
    folder.mkdir(parents=True, exist_ok=True)
    file = NinjaFile(folder)
    openmp = openmp_flag(command, folder)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = X86_FLAGS if x86 else {"baseline": ""}
    common = f"{COMMON_FLAGS} {openmp} {include_flags()} {'-DSPARSEKERN_X86' if x86 else ''}"
    file.rule("cxx", f"{cxx} -MMD -MF $out.d {common} $flags -c $in -o $out")
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.name in PROGRAMS:
            continue
        if source.name in ONCE:
            file.compile("cxx", source, "once", "")
            continue
        for name, flags in sets.items():
            file.compile("cxx", source, name, f"-DSPARSEKERN_ISA={name} {flags}")
    file.compile("cxx", CSRC / "bindings_cpu.cpp", "once", "")
    flat = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    file.link(f"{cxx} -shared {openmp} {flat} $in -o $out", target)
    file.run()
    return f"built with {cxx}, instruction sets {', '.join(sets)}, {openmp or 'no OpenMP'}"


def build_cuda(folder: pathlib.Path, target: str) -> str:
    path = nvcc()
    compiler()  # nvcc needs one
    archs = cuda_archs(path)
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    file = NinjaFile(folder)
    flags = f"-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden -I{CSRC} {' '.join(code)}"
    file.rule("nvcc", f"{path} -MMD -MF $out.d {flags} $flags -c $in -o $out")
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        file.compile("nvcc", source, "cuda", "")
    file.compile("nvcc", CSRC / "bindings_cuda.cpp", "once", include_flags())
    file.link(f"{path} -shared -cudart static {' '.join(code)} $in -o $out", target)
    try:
        file.run()
    except CompileError as error:
        raise MissingError(
            f"nvcc failed when sparsekern was installed: {error} (to see all of its output: "
            "SPARSEKERN_BUILD=cpu,cuda pip install -v .)"
        ) from None
    return f"built with {path} for sm_{', sm_'.join(archs)}"


BUILDERS = {"_native": ("cpu", build_native), "_cuda": ("cuda", build_cuda)}


class NinjaBuild(build_ext):
    """Hand both modules to ninja; note in the build report what was built and what is missing."""

    def run(self) -> None:
        wanted = wanted_kinds()
        given = f"SPARSEKERN_BUILD={','.join(wanted)}"
        package = (
            ROOT / "sparsekern" if self.inplace else pathlib.Path(self.build_lib, "sparsekern")
        )
        package.mkdir(parents=True, exist_ok=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        report = {}
        for name, (kind, build) in BUILDERS.items():
            if wanted != ["auto"] and kind not in wanted:
                report[name] = f"left out by {given} when sparsekern was installed"
                continue
            folder = ROOT / "build" / f"{name}{suffix}".removesuffix(".so")
            try:
                report[name] = build(folder, f"{name}{suffix}")
            except MissingError as reason:
                if kind in wanted:
                    raise RuntimeError(f"{given}: {reason}") from None
                report[name] = str(reason)
            else:
                # a running process may have the old module mapped: replace it, never write into it
                fresh = package / f"{name}{suffix}.new"
                shutil.copy2(folder / f"{name}{suffix}", fresh)
                fresh.replace(package / f"{name}{suffix}")
            print(f"sparsekern.{name}: {report[name]}")
        (package / "_build_report.json").write_text(json.dumps(report, indent=2) + "\n")

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_outputs(self) -> list[str]:
        return []


setup(
    ext_modules=[Extension(f"sparsekern.{name}", sources=[], optional=True) for name in BUILDERS],
    cmdclass={"build_ext": NinjaBuild},
)
