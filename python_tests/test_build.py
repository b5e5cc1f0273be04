"""The build: what it needs, what happens without it, and that csrc stays free of torch."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def build(folder: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the build of a copy of the sources into folder/lib, with nothing on PATH."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
    (folder / "sparsekern").mkdir(exist_ok=True)
    (folder / "sparsekern" / "__init__.py").touch()
    kept = {
        k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "SPARSEKERN_BUILD")
    }
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", "lib"],
        cwd=folder,
        env={**kept, "PATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_compiler_the_install_goes_on(tmp_path):
    run = build(tmp_path)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "lib" / "sparsekern" / "_build_report.json").read_text())
    assert report["_native"].startswith("no C++ compiler was found")
    assert report["_cuda"].startswith("nvcc was not found")
    assert not list((tmp_path / "lib").rglob("*.so"))


def test_asking_for_what_cannot_be_built_is_an_error(tmp_path):
    run = build(tmp_path, SPARSEKERN_BUILD="cpu")
    assert run.returncode != 0
    assert "SPARSEKERN_BUILD=cpu: no C++ compiler was found" in run.stderr


def test_unknown_names_are_refused(tmp_path):
    for name in ("gpu", "cpu,gpu", "none,cpu"):
        run = build(tmp_path, SPARSEKERN_BUILD=name)
        assert run.returncode != 0
        assert f"must be auto, cpu, cuda, cpu,cuda or none, got '{name}'" in run.stderr


@pytest.mark.parametrize("command", ["nowhere g++", "/nowhere/g++", 'g++ "'])
def test_a_cxx_that_cannot_be_used_is_named(tmp_path, command):
    run = build(tmp_path, CXX=command)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "lib" / "sparsekern" / "_build_report.json").read_text())
    assert report["_native"].startswith(f"CXX={command!r} did not run")


# stand-ins for compilers: one writes an empty file after -o, the other knows options and fails
CXX = '#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done\nexit 0\n'
NVCC = """#!/bin/sh
case "$1" in
  --version) ;;
  --list-gpu-arch) echo compute_{arch} ;;
  *) echo "nvcc fatal   : broken on purpose" >&2; exit 1 ;;
esac
"""


def stand_ins(folder: pathlib.Path, arch: int) -> dict[str, str]:
    """Writes both compilers; returns the environment in which they are found."""
    (folder / "bin").mkdir()
    for name, text in (("cxx", CXX), ("nvcc", NVCC.format(arch=arch))):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    place = {"CUDA_HOME": str(folder), "CXX": str(folder / "bin" / "cxx")}
    return {**place, "PATH": os.environ["PATH"], "SPARSEKERN_CUDA_ARCHS": ""}


@pytest.mark.parametrize(
    "arch, reason",
    [(60, "knew none of sm_80, sm_90, sm_100"), (90, "nvcc failed .*: nvcc fatal : broken on pu")],
)
def test_without_a_cuda_module_the_cpu_module_is_installed(tmp_path, arch, reason):
    environment = stand_ins(tmp_path, arch)
    run = build(tmp_path, **environment)
    assert run.returncode == 0, run.stderr
    package = tmp_path / "lib" / "sparsekern"
    report = json.loads((package / "_build_report.json").read_text())
    assert report["_native"].startswith("built")
    assert re.search(reason, report["_cuda"])
    assert [path.name.split(".")[0] for path in package.glob("*.so")] == ["_native"]
    assert "sparsekern._cuda: " in run.stdout
    asked = build(tmp_path, **environment, SPARSEKERN_BUILD="cpu,cuda")
    assert asked.returncode != 0
    assert re.search(f"SPARSEKERN_BUILD=cpu,cuda: .*{reason}", asked.stderr)
    assert arch == 60 or "nvcc fatal   : broken on purpose" in asked.stdout


def test_nothing_is_built_on_request(tmp_path):
    run = build(tmp_path, SPARSEKERN_BUILD="none")
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "lib" / "sparsekern" / "_build_report.json").read_text())
    assert all("left out by SPARSEKERN_BUILD=none" in reason for reason in report.values())


@pytest.mark.parametrize("prefix", ["", "env "])
def test_a_broken_source_fails_loudly(tmp_path, prefix):
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no g++ on PATH; install it to test a failing compilation")
    build(tmp_path, SPARSEKERN_BUILD="none")
    (tmp_path / "csrc" / "cpu" / "memory.cpp").write_text("#error broken on purpose\n")
    run = build_again(tmp_path, prefix + compiler)
    assert run.returncode != 0
    assert "broken on purpose" in run.stdout + run.stderr


def build_again(folder: pathlib.Path, compiler: str) -> subprocess.CompletedProcess[str]:
    for path in (folder / "csrc" / "cpu").glob("*.cpp"):
        if path.name not in ("memory.cpp",):
            path.unlink()  # only the broken file is compiled
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", "lib"],
        cwd=folder,
        env={**os.environ, "CXX": compiler, "SPARSEKERN_BUILD": "cpu"},
        capture_output=True,
        text=True,
    )


def test_csrc_includes_neither_torch_nor_python():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        included = re.findall(r'#include [<"]([^>"]+)', path.read_text())
        wrong = [name for name in included if name.startswith(("torch", "ATen", "c10"))]
        if not path.name.startswith("bindings_"):
            wrong += [name for name in included if "pybind" in name or name == "Python.h"]
        assert not wrong, f"{path.relative_to(ROOT)} includes {wrong}"


def test_sources_keep_the_size_limit():
    """Files up to 400 lines: beyond, a reader loses the thread."""
    for pattern in ("csrc/**/*", "sparsekern/**/*.py", "python_tests/*.py", "bench/*.py"):
        for path in ROOT.glob(pattern):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                assert len(path.read_text().splitlines()) <= 400, path
