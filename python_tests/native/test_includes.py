"""What the C++ and CUDA sources include: by paths from csrc, downwards, in no circle."""

from __future__ import annotations

import graphlib
import pathlib
import re

import pytest
from builds import ROOT

CSRC = ROOT / "csrc"
SUFFIXES = (".h", ".cpp", ".cu", ".cuh", ".def")
# From the ground up; what matches no prefix is a folder of an operation.
FLOORS = (
    ("interface/",),
    ("cpu/simd/",),
    ("cpu/common/", "cpu/order/", "cuda/common/"),
    ("cpu/kernels.h", "cpu/dispatch", "cuda/kernels.h"),
    ("cpu/", "cuda/"),
    ("bindings_", "tests/"),
)


def files() -> list[pathlib.Path]:
    """All sources but the stand-ins for CUDA's own headers."""
    found = [path for path in CSRC.rglob("*") if path.suffix in SUFFIXES]
    return [path for path in found if "tests/emulation/include" not in path.as_posix()]


def includes(path: pathlib.Path) -> list[str]:
    return re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.MULTILINE)


def floor(name: str) -> int:
    return next(i for i, prefixes in enumerate(FLOORS) if name.startswith(prefixes))


def check(included: dict[str, list[str]]) -> list[str]:
    """The includes that are wrong, of a map from files to what they include."""
    wrong = []
    for name, others in included.items():
        for other in others:
            if other not in included:
                wrong.append(f"{name} includes {other}, which is no path from csrc")
            elif floor(other) > floor(name):
                wrong.append(f"{name} includes {other}, which lies above it")
    try:
        graphlib.TopologicalSorter(included).prepare()
    except graphlib.CycleError as error:
        wrong.append(f"a circle: {' -> '.join(error.args[1])}")
    return wrong


def test_includes_point_down_in_no_circle():
    included = {path.relative_to(CSRC).as_posix(): includes(path) for path in files()}
    assert len(included) > 80 and sum(map(len, included.values())) > 150
    assert check(included) == []


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        ({"cpu/topk/a.h": ["a.h"]}, "no path from csrc"),
        ({"cpu/simd/a.h": ["cpu/topk/b.h"], "cpu/topk/b.h": []}, "lies above"),
        ({"cpu/topk/a.h": ["cpu/topk/b.h"], "cpu/topk/b.h": ["cpu/topk/a.h"]}, "a circle"),
    ],
)
def test_a_planted_include_is_found(planted, message):
    (wrong,) = check(planted)
    assert message in wrong
