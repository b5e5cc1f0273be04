"""pytest looks into every folder of tests."""

from __future__ import annotations

import fnmatch
import pathlib

import pytest

TESTS = pathlib.Path(__file__).parents[1]


def test_no_folder_of_tests_is_left_out(pytestconfig: pytest.Config) -> None:
    folders = {path.parent for path in TESTS.rglob("test_*.py")}
    names = {part for folder in folders for part in folder.relative_to(TESTS).parts}
    assert "build" in names, "pytest leaves out a folder of this name unless it is told not to"
    for pattern in pytestconfig.getini("norecursedirs"):
        assert not fnmatch.filter(names, pattern), pattern
