"""Build the two native modules with ninja. Needs a C++ compiler; torch is not needed to build.

sparsekern._native  C++ for the CPU: csrc/cpu, most of it compiled once per instruction set.
sparsekern._cuda    CUDA C++: built when nvcc is found and an NVIDIA GPU is visible, or on request,
which needs no GPU. No CUDA build of torch is needed.

SPARSEKERN_BUILD names what to build: "auto" (default: "cpu", and "cuda" where a GPU is visible),
"cpu", "cuda", "cpu,cuda" or "none".
SPARSEKERN_CUDA_ARCHS lists GPU architectures, such as "80;90"; the default is those of 80, 90, 100
that nvcc knows. CXX is the command of the C++ compiler, such as "ccache g++".

Where something is missing (a compiler, nvcc, a header, the sources), the install goes on without
the module that needs it, and sparsekern/_build_report.json says what is missing and why. It ends
with an error where "cuda" was asked for by name. A compiler that is there and fails on the sources
is an error in a build that names the module, and for _native in one beside the sources.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import glob
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
import tempfile
import textwrap
from collections.abc import Callable

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

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
# not compiled per instruction set
ONCE = {"bindings_cpu.cpp", "dispatch.cpp", "memory.cpp", "threads.cpp"}
CUDA_ARCHS = ("80", "90", "100")
# what the driver shows of each GPU; WSL's has neither, and its nvidia-smi need not be on PATH
GPU_FILES = ("/dev/nvidia[0-9]*", "/proc/driver/nvidia/gpus/*")
WSL_NVIDIA_SMI = "/usr/lib/wsl/lib/nvidia-smi"
NVIDIA_SMI_SECONDS = 60  # it starts the driver, and may hang with it
REPORT = "_build_report.json"
REPORTED = 300  # characters of a compiler's message in the build report
# what a wheel lacks, pip would take from its cache again
REINSTALL = "and reinstall with pip install --force-reinstall --no-cache-dir"
# what the sources need of a compiler, beside the instruction sets
PROBE = """
#include <optional>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
int main() { return std::optional<int>(0).value(); }
"""
OPENMP_PROBE = """
#include <omp.h>
int main() { return omp_get_max_threads() < 1; }
"""


class MissingError(RuntimeError):
    """A module cannot be built here; the message, with its remedy, is its line in the report."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what} when sparsekern was installed ({remedy})")


class CompileError(Exception):
    """A compiler ran and failed on the sources; the message is its first error."""

    def __init__(self, output: list[str]) -> None:
        super().__init__(first_error(output))
        self.output = "".join(output)


def wanted_kinds() -> list[str]:
    """What SPARSEKERN_BUILD names: ["auto"], ["none"], or some of "cpu" and "cuda"."""
    given = os.environ.get("SPARSEKERN_BUILD") or "auto"
    kinds = [kind.strip() for kind in given.split(",")]
    if kinds not in (["auto"], ["none"]) and not set(kinds) <= {"cpu", "cuda"}:
        raise SetupError(
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
            # ninja runs it in another folder
            return [os.path.abspath(shutil.which(command[0])), *command[1:]]
        raise MissingError(f"CXX={given!r} did not run", f"correct or unset CXX {REINSTALL}")
    for name in ("g++", "clang++"):
        if (path := shutil.which(name)) and runs([path, "--version"]):
            return [os.path.abspath(path)]
    raise MissingError("no C++ compiler was found", f"install g++ {REINSTALL}")


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    inside = pathlib.Path(home, "bin", "nvcc") if home else None
    path = str(inside) if inside and inside.exists() else shutil.which("nvcc")
    if path is None or not runs([path, "--version"]):
        raise MissingError("nvcc was not found", f"install the CUDA toolkit {REINSTALL}")
    return os.path.abspath(path)


def gpu_is_visible() -> bool:
    """Whether the driver shows an NVIDIA GPU: in its files, or through nvidia-smi."""
    if any(glob.glob(pattern) for pattern in GPU_FILES):
        return True
    command = [shutil.which("nvidia-smi") or WSL_NVIDIA_SMI, "-L"]
    try:
        run = subprocess.run(command, capture_output=True, timeout=NVIDIA_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0 and re.search(rb"^GPU \d", run.stdout, re.MULTILINE) is not None


def left_out(kind: str, wanted: list[str]) -> str:
    """The line in the report of a module that is not to be built; "" of one that is."""
    if wanted != ["auto"]:
        named = f"left out by SPARSEKERN_BUILD={','.join(wanted)} when sparsekern was installed"
        return "" if kind in wanted else named
    if kind != "cuda" or gpu_is_visible():
        return ""
    try:
        nvcc()
    except MissingError:  # which the build reports, since it comes before the GPU
        return ""
    return (
        "left out: no GPU was visible when sparsekern was installed "
        f"(set SPARSEKERN_BUILD=cpu,cuda {REINSTALL})"
    )


def ninja() -> str:
    try:
        import ninja as package
    except ImportError:
        package = None
    # BIN_DIR is "" where the package does not find its program
    path = shutil.which("ninja", path=(package and package.BIN_DIR) or None)
    if path is None:
        raise MissingError("ninja was not found", f"pip install ninja {REINSTALL}")
    return os.path.abspath(path)


def runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def cuda_archs(nvcc_path: str) -> list[str]:
    """What SPARSEKERN_CUDA_ARCHS lists, or those of CUDA_ARCHS that nvcc knows."""
    given = os.environ.get("SPARSEKERN_CUDA_ARCHS", "")
    if archs := [arch.strip() for arch in given.replace(",", ";").split(";") if arch.strip()]:
        if wrong := [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]:
            raise SetupError(
                f"SPARSEKERN_CUDA_ARCHS must list numbers such as 80;90, got {wrong[0]!r}"
            )
        return archs
    listed = subprocess.run([nvcc_path, "--list-gpu-arch"], capture_output=True, text=True).stdout
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed.split()]
    if not archs:
        raise MissingError(
            f"{nvcc_path} knew none of sm_{', sm_'.join(CUDA_ARCHS)}",
            f"install CUDA 12 or later {REINSTALL}",
        )
    return archs


def compiles(command: list[str], program: str, folder: pathlib.Path) -> str:
    """Compiles and links a program of a few lines; returns the first error, "" when there is
    none."""
    source = folder / "probe.cpp"
    source.write_text(program)
    made = subprocess.run(
        [*command, str(source), "-o", str(folder / "probe")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LC_ALL": "C"},
    )
    output = made.stdout.decode("ascii", "backslashreplace")
    return first_error(output.splitlines()) if made.returncode else ""


def words(arguments: list[str | pathlib.Path]) -> str:
    """Arguments as one line of ninja that the shell splits into the same arguments again."""
    line = shlex.join(map(str, arguments))
    if "\n" in line:
        raise MissingError(f"a path held a line break, {line!r},", f"rename it {REINSTALL}")
    return line.replace("$", "$$")


class NinjaFile:
    """Rules and edges of one build.ninja. A command is given in ninja's language, its arguments
    through `words`."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        self.lines = ["ninja_required_version = 1.8"]
        self.objects: list[str] = []

    def path(self, place: pathlib.Path) -> str:
        """A path as the commands see it, which run in the folder of the file: without the names of
        the folders above both, which nvcc does not quote and dependency files do not escape."""
        return os.path.relpath(place.resolve(), self.folder)

    def include_flags(self) -> list[str]:
        """Flags for the headers of pybind11 and Python, through links whose names need no quotes,
        since nvcc sets none."""
        flags = []
        for name, place in include_folders().items():
            link = self.folder / name
            if not link.is_symlink() or os.readlink(link) != place:
                fresh = self.folder / f"{name}.{os.getpid()}"
                fresh.symlink_to(place, target_is_directory=True)
                fresh.replace(link)
            flags += ["-isystem", name]
        return flags

    def rule(self, name: str, command: str) -> None:
        self.lines += [
            f"rule {name}",
            f"  command = {command}",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  description = {name} $out",
        ]

    def compile(self, rule: str, source: pathlib.Path, tag: str, flags: list[str]) -> None:
        names = f"{source.stem}.{tag}.o", self.path(source)
        target, escaped = (re.sub(r"[$ :]", r"$\g<0>", name) for name in names)
        self.lines += [f"build {target}: {rule} {escaped}", f"  flags = {words(flags)}"]
        self.objects.append(target)

    def link(self, command: str, target: str) -> None:
        self.lines += ["rule link", f"  command = {command}", "  description = link $out"]
        self.lines.append(f"build {target}: link {' '.join(self.objects)}")

    def run(self, shown: bool = True) -> None:
        """Builds, one process at a time, with the output shown as it comes if asked for."""
        lines = []
        with open(self.folder / "lock", "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            (self.folder / "build.ninja").write_bytes(os.fsencode("\n".join(self.lines) + "\n"))
            with subprocess.Popen(
                [ninja(), "-C", str(self.folder)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="ascii",
                errors="backslashreplace",
                # English messages; temporary files in this folder, whose name nvcc never sees
                env={**os.environ, "LC_ALL": "C", "TMPDIR": "."},
            ) as process:
                for line in process.stdout:
                    lines.append(line)
                    if shown:
                        print(line, end="", flush=True)
        if process.returncode != 0:
            raise CompileError(lines)


def first_error(lines: list[str]) -> str:
    """The first line that speaks of an error, or the last before ninja's own."""
    own = [line for line in lines if line.strip() and not line.startswith("ninja:")]
    speaks = r"\b(error|fatal|undefined reference|multiple definition|cannot find)\b"
    errors = [line for line in own if re.search(speaks, line, re.IGNORECASE)]
    return textwrap.shorten((errors or own[-1:] or lines[-1:] or ["no output"])[0], REPORTED)


def include_folders() -> dict[str, str]:
    """Where the headers of pybind11 and Python are, by names that change with their versions."""
    try:
        import pybind11
    except ImportError:
        raise MissingError("pybind11 was not found", f"pip install pybind11 {REINSTALL}") from None
    paths = sysconfig.get_paths()
    if not pathlib.Path(paths["include"], "Python.h").exists():
        raise MissingError(
            f"Python.h was not found in {paths['include']}", f"install python3-dev {REINSTALL}"
        )
    version = platform.python_version()
    return {
        f"pybind11-{pybind11.__version__}": pybind11.get_include(),
        f"python-{version}": paths["include"],
        f"python-{version}-platform": paths["platinclude"],
    }


def sources(*patterns: str) -> list[pathlib.Path]:
    """The files of csrc that match, at least one for each pattern."""
    found = []
    for pattern in patterns:
        matching = sorted(CSRC.glob(pattern))
        if not matching:
            raise MissingError(
                f"{CSRC / pattern} was not there", "install from a complete copy of the sources"
            )
        found += matching
    return found


def build_native(folder: pathlib.Path, target: str) -> str:
    found = sources("cpu/**/*.cpp", "bindings_cpu.cpp")
    command = compiler()
    file = NinjaFile(folder)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = X86_FLAGS if x86 else {"baseline": ""}
    flags = COMMON_FLAGS.split()
    every = [*command, *flags, *" ".join(sets.values()).split()]
    if error := compiles(every, PROBE, file.folder):
        raise MissingError(
            f"{shlex.join(command)} could not compile C++17 ({error})",
            f"install g++ 9 or later {REINSTALL}",
        )
    openmp = [] if compiles([*command, "-fopenmp"], OPENMP_PROBE, file.folder) else ["-fopenmp"]
    flags += [*openmp, f"-I{file.path(CSRC)}", *file.include_flags(), *["-DSPARSEKERN_X86"] * x86]
    cxx = words(command)
    file.rule("cxx", f"{cxx} -MMD -MF $out.d {words(flags)} $flags -c $in -o $out")
    for source in found:
        if source.name in ONCE:
            file.compile("cxx", source, "once", [])
            continue
        for name, isa_flags in sets.items():
            file.compile("cxx", source, name, [f"-DSPARSEKERN_ISA={name}", *isa_flags.split()])
    flat = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    file.link(f"{cxx} -shared {words([*openmp, *flat])} $in -o $out", target)
    file.run()
    with_openmp = openmp[0] if openmp else "no OpenMP"
    return f"built with {shlex.join(command)}, instruction sets {', '.join(sets)}, {with_openmp}"


def build_cuda(folder: pathlib.Path, target: str) -> str:
    kernels, (bindings,) = sources("cuda/**/*.cu"), sources("bindings_cuda.cpp")
    path = nvcc()
    compiler()  # nvcc needs one
    archs = cuda_archs(path)
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    file = NinjaFile(folder)
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags += [f"-I{file.path(CSRC)}", *code]
    file.rule("nvcc", f"{words([path])} -MMD -MF $out.d {words(flags)} $flags -c $in -o $out")
    for source in kernels:
        file.compile("nvcc", source, "cuda", [])
    file.compile("nvcc", bindings, "once", file.include_flags())
    file.link(f"{words([path, '-shared', '-cudart', 'static', *code])} $in -o $out", target)
    file.run()
    return f"built with {path} for sm_{', sm_'.join(archs)}"


BUILDERS = {"_native": ("cpu", build_native), "_cuda": ("cuda", build_cuda)}


class NinjaBuild(build_ext):
    """Hand both modules to ninja; note in the build report what was built and what is missing."""

    def run(self) -> None:
        wanted = wanted_kinds()
        package = self.package_folder()
        package.mkdir(parents=True, exist_ok=True)
        report = {}
        for name, (kind, build) in BUILDERS.items():
            report[name] = left_out(kind, wanted) or self.built(name, kind, build, wanted)
            if not report[name].startswith("built"):  # nor is one of an earlier build used
                (package / module_file(name)).unlink(missing_ok=True)
            print(f"sparsekern.{name}: {report[name]}".encode("ascii", "backslashreplace").decode())
        (package / REPORT).write_text(json.dumps(report, indent=2) + "\n")

    def built(self, name: str, kind: str, build: Callable, wanted: list[str]) -> str:
        """Builds a module into the package; returns its line in the report."""
        given = f"SPARSEKERN_BUILD={','.join(wanted)}"
        folder = scratch() / module_file(name).removesuffix(".so")
        try:
            line = build(folder, module_file(name))
        except MissingError as reason:
            if "cuda" in wanted:
                raise SetupError(f"{given}: {reason}") from None
            return str(reason)
        except CompileError as error:
            tool = "nvcc" if kind == "cuda" else "the C++ compiler"
            line = f"{tool} failed when sparsekern was installed: {error}"
            if kind in wanted or (self.inplace and kind == "cpu"):
                raise SetupError(f"{given}: {line}") from None
            return f"{line} (to see all of its output: SPARSEKERN_BUILD=cpu,cuda pip install -v .)"
        # a running process may have the old module mapped: replace it, never write into it
        place = self.package_folder() / module_file(name)
        fresh = place.with_name(f"{place.name}.new")
        shutil.copy2(folder / place.name, fresh)
        fresh.replace(place)
        return line

    def package_folder(self) -> pathlib.Path:
        return pathlib.Path(ROOT if self.inplace else self.build_lib, "sparsekern")

    def get_output_mapping(self) -> dict[str, str]:
        """For an editable install: where each file would lie in a wheel, and where it lies."""
        if not self.inplace:
            return {}
        wheel = pathlib.Path(self.build_lib, "sparsekern")
        return {str(wheel / path.name): str(path) for path in self.outputs()}

    def get_outputs(self) -> list[str]:
        return list(self.get_output_mapping()) or [str(path) for path in self.outputs()]

    def outputs(self) -> list[pathlib.Path]:
        folder = self.package_folder()
        names = [REPORT, *map(module_file, BUILDERS)]
        return [folder / name for name in names if (folder / name).exists()]


class FreshPackage(build_py):
    """A package that holds today's files alone: what an earlier build left is removed."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(pathlib.Path(self.build_lib, "sparsekern"), ignore_errors=True)
        super().run()


def module_file(name: str) -> str:
    return f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


@functools.cache
def scratch() -> pathlib.Path:
    """Where what is compiled lies: build/ beside the sources, kept for the next time; where they
    can only be read, a folder for this time."""
    if os.access(ROOT, os.W_OK):
        return ROOT / "build"
    folder = tempfile.mkdtemp(prefix="sparsekern-build-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pathlib.Path(folder)


def main() -> None:
    place = str(scratch())
    elsewhere = {"build": {"build_base": place}, "egg_info": {"egg_base": place}}
    setup(
        ext_modules=[
            Extension(f"sparsekern.{name}", sources=[], optional=True) for name in BUILDERS
        ],
        cmdclass={"build_ext": NinjaBuild, "build_py": FreshPackage},
        options=elsewhere if scratch() != ROOT / "build" else {},
    )


if __name__ == "__main__":  # the tests use the functions above
    main()
