"""The versions that pyproject.toml allows, and those that the tests run with."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
# PyPI has no small build of its oldest version for CPUs.
NEWER = {"torch"}


def pins(name: str) -> dict[str, tuple[int, ...]]:
    lines = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / name).read_text(), re.MULTILINE)
    return {package: numbers(version) for package, version in lines}


def numbers(version: str) -> tuple[int, ...]:
    """1.26 and 1.26.0 are the same."""
    return tuple(map(int, re.sub(r"(\.0)+$", "", version).split(".")))


def floors() -> dict[str, tuple[int, ...]]:
    """The lowest versions that the build, the package and the tests ask for."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    wanted = ("requires =", "dependencies =", "triton =", "data =", "test =")
    found: dict[str, tuple[int, ...]] = {}
    for line in lines:
        if line.startswith(wanted):
            for package, version in re.findall(r'"([\w-]+)>=([\d.]+)"', line):
                assert found.setdefault(package, numbers(version)) == numbers(version), package
    return found


def test_the_oldest_versions_allowed_are_those_of_the_constraints():
    oldest = pins("constraints-oldest.txt")
    lowest = floors()
    assert oldest.keys() == lowest.keys()
    assert {name: oldest[name] for name in lowest.keys() - NEWER} == {
        name: lowest[name] for name in lowest.keys() - NEWER
    }
    assert all(oldest[name] >= lowest[name] for name in NEWER)


def test_every_package_has_a_version_known_to_work():
    assert floors().keys() <= pins("constraints.txt").keys()
