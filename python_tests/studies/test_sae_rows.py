"""What a run trains on and measures: rows held out, units, outliers, and how sparse it becomes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sparsekern
from sparsekern.cli.command import main
from sparsekern.data import DataError, synthetic, write_activations
from sparsekern.models import SparseAutoencoder
from sparsekern.studies import sae
from sparsekern.studies.configs import SettingError
from sparsekern.studies.sae import rows as sae_rows

pytestmark = pytest.mark.slow

SMALL = {
    "latents": 64, "k": 4, "batch_size": 256, "learning_rate": 3e-3, "eval_tokens": 2000,
    "progress": False, "seed": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    """14800 tokens of 16 features: 50 steps of 256, and 2000 held out."""
    path = tmp_path_factory.mktemp("activations") / "tokens.h5"
    synthetic(path, features=16, latents=24, active=4, tokens=14_200, seed=5)
    return str(path)


def config(path, **changes):
    return sae.SAEConfig(**{"activations": (str(path),), **SMALL, **changes})


STEERED = {
    "batchtopk": {"activation": "batchtopk"},
    "batchtopk with a schedule": {"activation": "batchtopk", "k_start": 16},
    "batchtopk in bfloat16": {"activation": "batchtopk", "autocast": True},
    "jumprelu": {"activation": "jumprelu"},
    "jumprelu with a target": {"activation": "jumprelu", "target_l0": 6.5},
}


@pytest.mark.parametrize("name", STEERED)
def test_l0_of_tokens_held_out_is_what_was_asked_for(activations, tmp_path, name):
    changes = STEERED[name]
    results = sae.run(config(activations, **changes), tmp_path / "run").results
    assert results["steps"] == 50 and results["measured_on"] == "rows held out"
    assert results["l0"] == pytest.approx(changes.get("target_l0", 4), rel=0.05)
    assert results["fvu"] < 0.5
    measured = sae.evaluate_run(tmp_path / "run")
    assert (measured["l0"], measured["fvu"]) == (results["l0"], results["fvu"])


def test_jumprelu_learns_the_number_during_training(activations, tmp_path):
    task_l0 = []
    settings = config(activations, activation="jumprelu", epochs=3)
    with sae_rows.Rows(settings) as rows:
        task = sae.SAETask(settings, rows, torch.device("cpu"))
        for epoch in range(3):
            for batch in task.batches(epoch, 0):
                task.optimizer.zero_grad()
                task_l0.append(task.backward(batch)["l0"].item())
                task.optimizer.step()
    assert np.mean(task_l0[-20:]) == pytest.approx(4, rel=0.1)


REFUSED = {
    "relu": ({"activation": "relu"}, "sparsity_weight must be given and above 0"),
    "jumprelu": (
        {"activation": "jumprelu", "sparsity_weight": 0.0},
        "sparsity_weight must be above 0 with --activation jumprelu",
    ),
    "topk": ({"target_l0": 3.0}, "target_l0 must not be given with --activation topk"),
    "threshold": ({"threshold": 3.0}, "threshold must not be given with --activation topk"),
    "filter": ({"outlier_filter": 0.5}, "outlier_filter must be 0 or above 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_training_without_the_sparsity_that_was_asked_for(name):
    changes, message = REFUSED[name]
    with pytest.raises(SettingError, match=message):
        config("x.h5", **changes)


def test_defaults_fit_the_width_and_the_length_of_training(tmp_path, capsys):
    np.save(tmp_path / "few.npy", np.random.default_rng(0).standard_normal((4000, 16), "f4"))
    flags = ["--activations", str(tmp_path / "few.npy"), "--k", "4", "--no-progress"]
    assert main(["train", "sae", *flags, "--out", str(tmp_path / "run")]) == 0
    results = sae.load_run(tmp_path / "run")
    assert results.model.auxk == 4 and results.model.dead_after == 3600 // 20
    default = sae.SAEConfig(activations=("x",))
    assert default.auxk_for(768, 6144) == 32 and default.auxk_for(40, 320) == 20
    assert default.auxk_for(1024, 30) == 30 and default.auxk_for(1, 8) == 1
    assert default.dead_after_in(10**9) == 10_000_000
    text = capsys.readouterr().out
    assert "measured on" in text and "rows held out" in text


def test_dead_latents_are_revived(activations, tmp_path):
    found = [
        sae.run(
            config(activations, activation="batchtopk", revival=revival), tmp_path / str(revival)
        ).results
        for revival in (0.0, 2.5)
    ]
    assert found[1]["dead"] < 0.5 * found[0]["dead"] and found[1]["silent"] == 0
    assert found[1]["fvu"] < 1.02 * found[0]["fvu"]


def test_files_of_their_own_are_measured_instead(activations, tmp_path):
    rows = torch.randn(300, 16)
    write_activations(tmp_path / "held.h5", [rows])
    settings = config(activations, eval_activations=(str(tmp_path / "held.h5"),))
    with sae_rows.Rows(settings) as prepared:
        assert prepared.tokens == 14_200
        found = prepared.measured(torch.device("cpu"))
        torch.testing.assert_close(
            found.sort(0).values, rows.half().float().sort(0).values, atol=1e-2, rtol=0
        )
    write_activations(tmp_path / "narrow.h5", [rows[:, :9]])
    settings = config(activations, eval_activations=(str(tmp_path / "narrow.h5"),))
    with pytest.raises(ValueError, match="eval_activations must be 16 wide"):
        sae.run(settings, tmp_path / "run")


def test_rows_held_out_are_in_no_other_file(activations, tmp_path, monkeypatch):
    (tmp_path / "link.h5").symlink_to(activations)
    (tmp_path / "copy.h5").write_bytes(Path(activations).read_bytes())
    monkeypatch.chdir(Path(activations).parent)
    for again in (activations, str(tmp_path / "link.h5"), Path(activations).name):
        with pytest.raises(SettingError, match="activations must name each file once, got twice"):
            sae_rows.Rows(config(activations, activations=(activations, again)))
    held = {"eval_activations": (str(tmp_path / "copy.h5"),)}
    with sae_rows.Rows(config(activations, **held)) as rows:
        assert rows.warnings() == []
    with sae_rows.Rows(config(activations, eval_activations=(str(tmp_path / "link.h5"),))) as rows:
        assert "tokens are measured that are trained on" in " ".join(rows.warnings())


def test_every_prefix_has_its_fvu(activations, tmp_path):
    results = sae.run(config(activations, prefixes=(16, 32)), tmp_path / "run").results
    assert results["fvu_16"] > results["fvu_32"] > results["fvu"] > 0
    assert "FVU of the first 16 latents" in sae.table(results, config(activations))


# -- units and outliers ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_a_factor_of_the_data_set_is_folded_into_the_weights(tmp_path, activation):
    torch.manual_seed(0)
    x = 250 * (torch.randn(6000, 8) @ torch.randn(8, 16)) + 900
    np.save(tmp_path / "x.npy", x.numpy())
    settings = config(tmp_path / "x.npy", activation=activation, normalize="dataset")
    results = sae.run(settings, tmp_path / "run").results
    assert results["scale"] * x.norm(dim=1).mean().item() == pytest.approx(4, rel=0.02)
    assert results["fvu"] == pytest.approx(results["fvu_unnormalized"], rel=1e-3)
    model = sae.load_run(tmp_path / "run").model
    fvu = (x - model(x).reconstruction).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu.item() == pytest.approx(results["fvu"], rel=0.2)
    measured = sae.evaluate_run(tmp_path / "run")
    for name in ("fvu", "l0"):
        assert measured[name] == pytest.approx(results[name], rel=1e-3)


LAYERS = {
    "TopK": lambda: sparsekern.TopK(4),
    "BatchTopK": lambda: sparsekern.BatchTopK(4),
    "JumpReLU": lambda: sparsekern.JumpReLU(40, threshold=0.7),
    "ReLU": nn.ReLU,
}


@pytest.mark.parametrize("scale_scores", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_folding_is_exact(name, scale_scores):
    torch.manual_seed(0)
    x, scale = torch.randn(64, 6).double(), 0.125
    model = SparseAutoencoder(6, 40, activation=LAYERS[name](), scale_scores=scale_scores).double()
    for bias in (model.encoder_bias, model.decoder_bias):
        nn.init.normal_(bias)
    model(scale * x)  # sets the threshold of BatchTopK
    before = model.eval()(scale * x)
    model.fold_normalization(scale)
    after = model(x)
    torch.testing.assert_close(after.reconstruction, before.reconstruction / scale)
    torch.testing.assert_close(after.values.sum(1), before.values.sum(1) / scale)
    with pytest.raises(ValueError, match="scale must be above 0"):
        model.fold_normalization(0.0)


def test_tokens_are_normalised_by_their_own_norm(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3000, 16) * torch.rand(3000, 1).mul(4).exp()
    x[7] = 0
    np.save(tmp_path / "x.npy", x.numpy())
    settings = config(tmp_path / "x.npy", normalize="token")
    with sae_rows.Rows(settings) as rows:
        batch = torch.cat(list(rows.batches(0, 0, torch.device("cpu"))))
        norms = batch.norm(dim=1)
        torch.testing.assert_close(norms[norms > 0], torch.full_like(norms[norms > 0], 4.0))
        assert batch.isfinite().all()
    results = sae.run(settings, tmp_path / "run").results
    assert 0 < results["fvu_unnormalized"] != results["fvu"]


def test_outliers_are_named_and_left_out(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4000, 16)
    x[::1000] *= 1000
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.warns(UserWarning, match=r"longest of .* --outlier-filter leaves them out"):
        results = sae.run(config(tmp_path / "x.npy"), tmp_path / "run").results
    assert results["outliers"] == 0 and "longest" in results["warnings"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = config(tmp_path / "x.npy", outlier_filter=10.0)
        results = sae.run(settings, tmp_path / "other").results
    assert results["outliers"] == 4 and results["warnings"] == [] and results["tokens"] == 3597


def test_what_dominates_the_variance_is_named(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2000, 16)
    x[:, 5] *= 1000
    np.save(tmp_path / "feature.npy", x.numpy())
    np.save(tmp_path / "mean.npy", (torch.randn(2000, 16) + 1000).numpy())
    for name, text in (
        ("feature", "feature 5 holds 100.0% of the variance"),
        ("mean", "the mean of"),
    ):
        with sae_rows.Rows(config(tmp_path / f"{name}.npy")) as rows:
            assert text in " ".join(rows.warnings())


@pytest.mark.parametrize("scale", [1e-25, 1e18])
def test_rows_whose_squares_are_no_numbers_are_refused(scale, tmp_path):
    np.save(tmp_path / "x.npy", scale * torch.randn(500, 16).numpy())
    with pytest.raises(DataError, match=r"must have norms of 1e-15 to 1e\+16 .*, got up to"):
        sae_rows.Rows(config(tmp_path / "x.npy"))


def test_rows_of_zeros_have_no_outliers(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((500, 16), np.float32))
    flags = ["--outlier-filter", "3", "--no-progress", "--out", str(tmp_path / "run")]
    assert main(["train", "sae", "--activations", str(tmp_path / "x.npy"), *flags]) == 2
    assert "--outlier-filter must be 0 for these activations" in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "eval_tokens"), [(15, 2000), (500, 1)])
def test_a_single_token_that_is_measured_is_named(tokens, eval_tokens, tmp_path):
    np.save(tmp_path / "x.npy", torch.randn(tokens, 16).numpy())
    for measured, named in ((eval_tokens, True), (2, tokens == 15)):
        with sae_rows.Rows(config(tmp_path / "x.npy", eval_tokens=measured)) as rows:
            assert ("one token is measured" in " ".join(rows.warnings())) is named
