"""The C++ kernels alone, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import collections
import concurrent.futures
import os
import pathlib
import platform
import re
import shutil
import subprocess

import pytest
from setup_file import setup_file

from sparsekern.dispatch import modules

ROOT = pathlib.Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = CSRC / "cpu"
PROGRAM = CSRC / "tests" / "cpu"
CXX = shutil.which("g++")
# Without optimisation every access is still there to be checked, and compiling takes half as long.
FLAGS = "-std=c++17 -O0 -g1 -fopenmp -fno-math-errno".split()
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all".split()
KERNELS = CSRC / "interface" / "kernels.def"

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.sanitizer,
    pytest.mark.skipif(CXX is None, reason="no g++: install it to run the C++ kernels"),
    pytest.mark.skipif(not SOURCES.exists(), reason="no csrc/cpu: run from a source checkout"),
]


def run(command: list[str], **arguments) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **arguments)
    assert done.returncode == 0, (
        f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def has_sanitizers(folder: pathlib.Path) -> bool:
    (folder / "probe.cpp").write_text("int main() { return 0; }\n")
    command = [CXX, *SANITIZERS, "-fopenmp", str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> pathlib.Path:
    """csrc/tests/cpu/driver.cpp, built with every instruction set and both sanitizers."""
    folder = tmp_path_factory.mktemp("sanitizers")
    if not has_sanitizers(folder):
        pytest.skip("g++ cannot link the sanitizers: install libasan and libubsan")
    names = setup_file()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = names.X86_FLAGS if x86 else {"baseline": ""}
    commands = {}
    for source in [*SOURCES.rglob("*.cpp"), *PROGRAM.glob("*.cpp")]:
        tests = source.parent == PROGRAM
        once = tests or source.name in names.ONCE
        for isa, isa_flags in {"once": ""}.items() if once else sets.items():
            target = str(folder / f"{source.stem}.{isa}.o")
            define = [] if once else [f"-DSPARSEKERN_ISA={isa}"]
            define += ["-DSPARSEKERN_X86"] if x86 else []
            define += ["-O2"] if tests else []  # most time goes there
            flags = [*FLAGS, *SANITIZERS, f"-I{CSRC}", *isa_flags.split(), *define]
            commands[target] = [CXX, *flags, "-c", str(source), "-o", target]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands.values()))
    program = folder / "driver"
    run([CXX, *SANITIZERS, "-fopenmp", *commands, "-o", str(program)])
    return program


def test_driver_agrees_with_plain_loops(driver):
    # libgomp keeps its threads until the process ends, which would be reported as a leak. Those
    # that wait give way: there may be fewer cores.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "passive"}
    out = run([str(driver)], env={**os.environ, **options}, timeout=900)
    counted = dict(re.findall(r"^(\w+): (\d+) cases$", out, re.MULTILINE))
    on_the_cpu = r"^SPARSEKERN_(?!CUDA_)\w*KERNEL\w*\((\w+),"
    listed = re.findall(on_the_cpu, KERNELS.read_text(), re.MULTILINE)
    assert len(listed) >= 15 and len(set(listed)) == len(listed), listed
    for name in [*listed, "conversions", "threads"]:
        assert int(counted.get(name, 0)) > 0, f"no case of {name}: {out}"


def frames_of_module(module) -> dict[str, list[int]]:
    """Bytes of each function's frame by instruction set, read from the x86 code of the module."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump: install binutils to read the frames of the compiled kernels")
    frames, name = collections.Counter(), ""
    for line in run([objdump, "-d", "--no-show-raw-insn", module.__file__]).splitlines():
        if head := re.match(r"[0-9a-f]+ <(\S+)>:$", line):
            name = head[1]
        # A compiler that probes the stack takes a large frame in steps, to where r11 points first.
        step = re.search(r"\bsub +\$0x(\w{1,8}),%rsp|\blea +-0x(\w+)\(%rsp\),%r11", line)
        if step:
            frames[name] += int(step[1] or step[2], 16)
    pushed = 128  # registers, and what aligns the frame
    return {
        isa: [bytes + pushed for name, bytes in frames.items() if f"3cpu{len(isa)}{isa}" in name]
        for isa in setup_file().X86_FLAGS
    }


def frames_of_compiler(folder: pathlib.Path) -> dict[str, list[int]]:
    """The same of top-k, as the compiler reports them."""
    names = setup_file()
    source, out = SOURCES / "topk" / "topk.cpp", folder / "topk.o"
    optimised = [*names.COMMON_FLAGS.split(), "-fopenmp", "-DSPARSEKERN_ISA=baseline"]
    run([CXX, *optimised, f"-I{CSRC}", "-fstack-usage", "-c", str(source), "-o", str(out)])
    report = out.with_suffix(".su").read_text().splitlines()
    return {"baseline": [int(line.split("\t")[1]) for line in report]}


def test_top_k_takes_at_most_64_kib_of_stack(tmp_path):
    """The promise of `topk`, which all kernels keep: outputs and 64 KiB a thread. What is inlined
    shares one frame; with the largest called one it is below the limit."""
    module, reason = modules.native_module("cpu")
    if module is None:
        pytest.skip(reason)
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    for isa, frames in (frames_of_module(module) if x86 else frames_of_compiler(tmp_path)).items():
        assert max(frames) > 16 * 1024, f"{isa}: the frame with the candidates is not among them"
        assert max(frames) + 12 * 1024 <= 64 * 1024, f"{isa}: a frame of {max(frames)} bytes"
