"""A module built here runs on an x86-64 processor without AVX: AVX instructions stand in functions
of the namespaces `avx2` and `avx512` alone, which run after a look at the processor.

An inline function of any other namespace would be emitted in the objects of each instruction set,
and the linker would keep one of them for all.
"""

from __future__ import annotations

import importlib.util
import pathlib
import platform
import re
import shutil
import subprocess

import pytest
from setup_file import setup_file

# VEX and EVEX encoded instructions, and those of AVX-512's masks, in objdump's spelling
AVX = re.compile(r"\s*[0-9a-f]+:\s+(?:v[a-z0-9]+|k[a-z]+[bwdq]) ")
OF_A_SET = re.compile(r"4avx2|6avx512")  # as mangled names hold the namespaces

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None,
    reason="reads x86-64 code with objdump (install binutils on x86-64)",
)


def functions_with_avx(module: pathlib.Path) -> set[str]:
    """The functions that hold AVX instructions, by their mangled names."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(module)]
    code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names, name = set(), ""
    for line in code.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            name = head[1]
        elif AVX.match(line):
            names.add(name)
    return names


def run_anywhere(names: set[str]) -> set[str]:
    """Those of the functions that run on every processor: initialisers of a file, too."""
    return {name for name in names if name.startswith("_GLOBAL_") or not OF_A_SET.search(name)}


def test_avx_instructions_stand_in_their_namespaces_alone():
    spec = importlib.util.find_spec("sparsekern._native")
    if spec is None or spec.origin is None:
        pytest.skip("sparsekern._native is not built (install g++ and reinstall)")
    names = functions_with_avx(pathlib.Path(spec.origin))
    assert any("4avx2" in name for name in names) and any("6avx512" in name for name in names)
    assert not run_anywhere(names)


@pytest.mark.parametrize("flags", ["avx2", "avx512"])
def test_avx_instructions_elsewhere_are_found(tmp_path, flags):
    """In an inline function of no namespace, and in what a file does when it is loaded."""
    setup = setup_file()
    source = tmp_path / "leak.cpp"
    source.write_text(
        """
        __attribute__((noinline)) inline void add(float* x, const float* y) {
          for (int i = 0; i < 64; ++i) x[i] += y[i];
        }
        namespace avx2 { void clean(float* x) { for (int i = 0; i < 64; ++i) x[i] *= 3; } }
        void avx2_caller(float* x, float* y) { add(x, y); }
        float table[64];
        struct Fill { Fill() { for (int i = 0; i < 64; ++i) table[i] = i * 0.5f; } } fill;
        """
    )
    command = [*setup.compiler(), "-O3", "-shared", "-fPIC", *setup.X86_FLAGS[flags].split()]
    module = tmp_path / "leak.so"
    subprocess.run([*command, str(source), "-o", str(module)], check=True)
    found = run_anywhere(functions_with_avx(module))
    assert any("add" in name for name in found)
    assert any(name.startswith("_GLOBAL_") for name in found)
    assert not any("clean" in name for name in found)
