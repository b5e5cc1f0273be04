"""The CUDA kernels compile for the architectures that we name, within limits on registers, into a
module that can be imported. An install leaves them out where no GPU is visible; this builds them
wherever nvcc is, as an install with SPARSEKERN_BUILD=cpu,cuda does."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import pathlib
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest
from builds import ROOT
from setup_file import setup_file

pytestmark = pytest.mark.compiles
ARCHITECTURES = ("80", "90", "100")
# With 128 registers two blocks of 256 threads fit in the 65536 registers of a multiprocessor: one
# computes while the other waits for memory.
MOST_REGISTERS = 128
# An array that is indexed by what only the run knows lies on the stack, in local memory; ours must
# lie in registers or in shared memory.
MOST_STACK_BYTES = 0


@dataclass(frozen=True)
class Usage:
    """What ptxas says about one kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Built:
    """The module, and what ptxas says about its kernels."""

    path: pathlib.Path
    usages: list[Usage]


def nvcc() -> str:
    try:
        return setup_file().nvcc()
    except RuntimeError:
        pytest.skip("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to its folder")


def usages(log: str) -> list[Usage]:
    """Reads the messages of ptxas: one part for each kernel and architecture, headed by both."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        kernel, architecture = re.match(r"(\w+)' for 'sm_(\w+)'", part).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Usage(
                kernel=kernel,
                architecture=architecture,
                registers=int(re.search(r"Used (\d+) registers", part).group(1)),
                stack=int(stack),
                spilled=int(stores) + int(loads),
                shared=int(shared.group(1)) if shared else 0,
            )
        )
    return found


def readable(kernels: list[str]) -> dict[str, str]:
    """Demangled names without their arguments, where c++filt is at hand."""
    if shutil.which("c++filt") is None:
        return {kernel: kernel for kernel in kernels}
    done = subprocess.run(["c++filt"], input="\n".join(kernels), capture_output=True, text=True)
    short = []
    for name in done.stdout.splitlines():
        name = name.removeprefix("void ").replace("sparsekern::cuda::", "")
        short.append(name.replace("(anonymous namespace)::", "").split("(", 1)[0])
    return dict(zip(kernels, short, strict=True))


def print_table(all_usages: list[Usage]) -> None:
    names = readable(sorted({usage.kernel for usage in all_usages}))
    print(f"\n{'arch':>6} {'registers':>9} {'stack':>5} {'spilled':>7} {'shared':>6}  kernel")
    for u in sorted(all_usages, key=lambda u: (names[u.kernel], int(u.architecture))):
        print(
            f"{'sm_' + u.architecture:>6} {u.registers:9} {u.stack:5} {u.spilled:7} {u.shared:6}"
            f"  {names[u.kernel]}"
        )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    path, setup = nvcc(), setup_file()
    listed = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [arch for arch in ARCHITECTURES if f"compute_{arch}" in listed.split()]
    if known != list(ARCHITECTURES):
        pytest.skip(f"this nvcc knows only sm_{', sm_'.join(known)}: install CUDA 12.8 or later")
    folder, target = tmp_path_factory.mktemp("cuda"), setup.module_file("_cuda")
    log = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(log):
        patch.setenv("SPARSEKERN_CUDA_ARCHS", ";".join(ARCHITECTURES))
        patch.setenv("NVCC_APPEND_FLAGS", "-Xptxas=-v")
        try:
            setup.build_cuda(folder, target)
        except setup.CompileError as error:
            pytest.fail(error.output)
    found = usages(log.getvalue())
    print_table(found)
    return Built(folder / target, found)


@pytest.fixture(scope="module")
def compiled(built: Built) -> list[Usage]:
    return built.usages


def test_there_are_kernels_for_every_architecture(compiled: list[Usage]) -> None:
    kernels = {
        arch: {u.kernel for u in compiled if u.architecture == arch} for arch in ARCHITECTURES
    }
    assert kernels["80"]
    assert kernels["80"] == kernels["90"] == kernels["100"]


def test_no_kernel_spills_registers(compiled: list[Usage]) -> None:
    assert [u for u in compiled if u.spilled] == []


def test_no_kernel_needs_a_stack(compiled: list[Usage]) -> None:
    assert [u for u in compiled if u.stack > MOST_STACK_BYTES] == []


def test_registers_leave_room_for_two_blocks(compiled: list[Usage]) -> None:
    assert [u for u in compiled if u.registers > MOST_REGISTERS] == []


def test_every_kernel_of_the_sources_is_in_the_table(compiled: list[Usage]) -> None:
    """Else the limits above would hold of what was not looked at."""
    declared = set()
    for path in (ROOT / "csrc" / "cuda").rglob("*.cu*"):
        text = re.sub(r"__launch_bounds__\([^)]*\)", "", path.read_text())
        names = re.findall(r"__global__\s+void\s+(\w+)\(", text)
        assert len(names) == text.count("__global__"), path
        declared |= set(names)
    seen = " ".join({usage.kernel for usage in compiled})
    assert declared and [name for name in declared if name not in seen] == []


def test_the_module_is_imported_without_a_gpu(built: Built) -> None:
    """Nothing is undefined in it, and it holds what was asked for."""
    spec = importlib.util.spec_from_file_location("_cuda", built.path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    info = module.build_info()
    assert info["kind"] == "cuda" and info["compiler"].startswith("nvcc ")
    assert info["architectures"] == ", ".join(f"sm_{arch}" for arch in ARCHITECTURES)
