"""Builds of a copy of the sources, with stand-ins for the compilers."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = ("CXX", "CUDA_HOME", "SPARSEKERN_BUILD", "SPARSEKERN_CUDA_ARCHS")
# These run in any folder, and fail where a file or folder that they are given is not there. The
# first one writes an empty file after -o, the second one knows options and fails.
CXX = """#!/bin/sh
{refusal}
while [ $# -gt 0 ]; do
  case "$1" in
    -o) : > "$2"; shift ;;
    -isystem|-c) [ -e "$2" ] || {{ echo "error: no '$2' in $PWD" >&2; exit 1; }}; shift ;;
    -I*) [ -d "${{1#-I}}" ] || {{ echo "error: no '$1' in $PWD" >&2; exit 1; }} ;;
  esac
  shift
done
"""
NVCC = """#!/bin/sh
case "$1" in
  --version) ;;
  --list-gpu-arch) echo compute_{arch} ;;
  *) echo "nvcc fatal   : broken on purpose" >&2; exit 1 ;;
esac
"""
NVIDIA_SMI = """#!/bin/sh
echo 'GPU 0: a stand-in (UUID: GPU-0)'
"""


def copy_sources(folder: pathlib.Path) -> None:
    """Copies what the build needs, with a package of one file."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
    (folder / "sparsekern").mkdir(exist_ok=True)
    (folder / "sparsekern" / "__init__.py").write_text('__version__ = "1.0"\n')


def run_setup(
    folder: pathlib.Path, *command: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs setup.py in a folder, with nothing on PATH unless `environment` has one."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=folder,
        env={**kept, "PATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )


def build(folder: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds a copy of the sources into folder/lib."""
    copy_sources(folder)
    return run_setup(folder, "build", "--build-lib", "lib", **environment)


def report_of(folder: pathlib.Path) -> dict[str, str]:
    """What the build into folder/lib says of each module."""
    return json.loads((folder / "lib" / "sparsekern" / "_build_report.json").read_text())


def last_line(run: subprocess.CompletedProcess[str]) -> str:
    return run.stderr.strip().splitlines()[-1]


def write_program(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def stand_ins(folder: pathlib.Path, arch: int) -> dict[str, str]:
    """Writes both compilers and a GPU; returns the environment in which they are found."""
    cxx = write_program(folder / "bin" / "cxx", CXX.format(refusal=""))
    write_program(folder / "bin" / "nvcc", NVCC.format(arch=arch))
    write_program(folder / "bin" / "nvidia-smi", NVIDIA_SMI)
    place = {"CUDA_HOME": str(folder), "CXX": str(cxx)}
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return {**place, "PATH": path, "SPARSEKERN_CUDA_ARCHS": ""}
