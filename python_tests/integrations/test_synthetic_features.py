"""bench/synthetic_features.py, at a size that takes seconds: every autoencoder is trained, saved in
SAELens' format where it is ours, and judged by SAELens' evaluation of known features.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerated import imported

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"TopK", "BatchTopK", "Matryoshka"}
ARMS = {
    "SAELens", "sparsekern", "sparsekern, AuxK's weight 1", "sparsekern, SAELens' settings"
}  # fmt: skip


@pytest.fixture(scope="module")
def quick_size(tmp_path_factory):
    """Return a function that runs the benchmark, all times in the same folder."""
    imported("sae_lens.synthetic")
    folder = tmp_path_factory.mktemp("synthetic_features")

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "bench/synthetic_features.py", "--quick", "--work", folder / "work",
             "--results", folder, "--seeds", "3", *arguments],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((folder / "synthetic-features.json").read_text())

    return run


@pytest.fixture(scope="module")
def runs(quick_size):
    return {(run["kind"], run["arm"]): run for run in quick_size()["runs"]}


def test_every_kind_is_trained_by_each(runs):
    assert runs.keys() == {(kind, arm) for kind in KINDS for arm in ARMS}


def test_all_are_judged_on_the_same_rows(runs):
    assert len({run["true_l0"] for run in runs.values()}) == 1


def test_training_explains_rows_it_has_not_seen(runs):
    explained = {name: run["explained_variance"] for name, run in runs.items()}
    assert all(0.2 < share < 1 for share in explained.values()), explained


def test_k_latents_are_active(runs):
    for (kind, arm), run in runs.items():
        if kind == "TopK":
            assert run["sae_l0"] == pytest.approx(1.0, abs=0.05), (kind, arm)
        else:  # by a threshold, of few rows
            assert run["sae_l0"] == pytest.approx(1.0, rel=0.3), (kind, arm)


def test_saving_topk_changes_nothing(runs):
    run = runs["TopK", "SAELens"]
    loaded = run["loaded"]
    assert loaded == pytest.approx({name: run[name] for name in loaded}, rel=1e-4)


def test_what_is_trained_is_not_trained_again(quick_size, runs):
    again = {(run["kind"], run["arm"]): run for run in quick_size("--kinds", "TopK")["runs"]}
    assert again == {name: run for name, run in runs.items() if name[0] == "TopK"}
