"""The documentation builds without a warning, and shows the committed rows."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from pages import ROOT

import sparsekern


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    built = run("-m", "sphinx", "-W", "-n", "-q", "--keep-going", "-d", tmp_path / "trees",
                "docs", tmp_path / "site")  # fmt: skip
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "site" / "api.html").read_text()
    assert [name for name in sparsekern.__all__ if f'id="sparsekern.{name}"' not in api] == []
    assert "<svg" in (tmp_path / "site" / "benchmarks.html").read_text()  # and no picture of it


def test_every_operation_is_in_the_table():
    page = (ROOT / "docs" / "getting-started.md").read_text()
    operations = {*sparsekern.__all__} & {*sparsekern.ops.__all__}
    functions = [name for name in operations if name.islower()]
    assert len(functions) > 10 and [name for name in functions if f"`{name}" not in page] == []


def test_tables_and_figures_are_those_of_the_committed_rows():
    checked = run("bench/pages.py", "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("figure", sorted((ROOT / "docs" / "figures").glob("*.svg")), ids=str)
def test_a_figure_follows_the_mode_of_its_reader(figure):
    """Colours are variables, which the page or the system sets for light and for dark."""
    text = figure.read_text()
    root = ElementTree.fromstring(text)
    assert root.get("aria-label") and "prefers-color-scheme:dark" in text, figure
    assert not [e for e in root.iter() if {"fill", "stroke", "color"} & e.attrib.keys()]
    assert figure.stat().st_size < 60_000
