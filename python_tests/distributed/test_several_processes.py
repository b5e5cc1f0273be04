"""bench/several_processes.py, at a size that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def test_quick_measures_one_process_and_two(tmp_path):
    done = subprocess.run(
        [sys.executable, "bench/several_processes.py", "--quick", "--results", tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads((tmp_path / "several-processes.json").read_text())
    steps = {(step["kind"], step["processes"]): step for step in written["steps"]}
    assert steps.keys() == {("one", 1), ("latents", 2)}
    rows, features, k = (written["problem"][name] for name in ("rows", "features", "k"))
    assert steps["one", 1]["sent"] == 0
    # All of it is gathered, being small.
    sent = 8 * rows * k + 4 * rows * features + 4 * features + 32
    assert steps["latents", 2]["sent"] == sent
    assert all(0 < step["at_rest"] <= step["steps"] for step in steps.values())
    assert all(step["milliseconds"] > 0 for step in steps.values())
