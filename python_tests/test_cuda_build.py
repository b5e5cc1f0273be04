"""The CUDA kernels compile for the architectures that we name, within limits on registers."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

pytestmark = pytest.mark.compiles
CSRC = pathlib.Path(__file__).parent.parent / "csrc"
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


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    inside = shutil.which("nvcc", path=str(pathlib.Path(home, "bin"))) if home else None
    found = inside or shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to its folder")
    return found


def compile_one(path: str, source: pathlib.Path, arch: str, folder: pathlib.Path) -> list[Usage]:
    command = [path, "-O3", "-std=c++17", f"-I{CSRC}", f"-arch=sm_{arch}", "-cubin"]
    command += ["-Xptxas", "-v", str(source), "-o", str(folder / f"{source.stem}.{arch}.cubin")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, f"{' '.join(command)}\n{made.stderr}"
    return list(usages(made.stderr, arch))


def usages(log: str, architecture: str) -> list[Usage]:
    """Reads the messages of ptxas: one part for each kernel, headed by its mangled name."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Usage(
                kernel=part.split("'")[0],
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
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[Usage]:
    path = nvcc()
    folder = tmp_path_factory.mktemp("cubin")
    listed = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [arch for arch in ARCHITECTURES if f"compute_{arch}" in listed.split()]
    if known != list(ARCHITECTURES):
        pytest.skip(f"this nvcc knows only sm_{', sm_'.join(known)}: install CUDA 12.8 or later")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(compile_one, path, source, arch, folder)
            for source in sources
            for arch in ARCHITECTURES
        ]
        found = [usage for job in jobs for usage in job.result()]
    print_table(found)
    return found


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
