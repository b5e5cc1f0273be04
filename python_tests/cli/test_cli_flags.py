"""No flag is accepted and ignored: it has an effect, or an error says why it has none."""

import pytest
import torch
from one_thread import one_thread

from sparsekern.cli.command import _parser, main
from sparsekern.data import write_activations
from sparsekern.studies import sae, sparling, vae_sae

__all__ = ["one_thread"]  # a fixture

WITHOUT_EFFECT = [
    ("sae", "--activation relu --sparsity-weight 1 --k 3", "--k has no effect with --activation"),
    ("sae", "--auxk 0 --auxk-weight 0.1", "--auxk-weight has no effect with --auxk 0"),
    ("sae", "--multi-weight 0.5", "--multi-weight has no effect with --multi-k 0"),
    ("sae", "--anneal 0.5", "--anneal has no effect without --k-start"),
    ("sae", "--sparsity-warmup 0.1", "--sparsity-warmup has no effect with --activation topk"),
    ("vae-sae", "--dead-after 5", "--dead-after has no effect with --revival none"),
    ("sparling", "--bottleneck l1 --momentum 0.1", "--momentum has no effect with --bottleneck l1"),
    ("sparling", "--no-normalize --affine", "--affine has no effect with --no-normalize"),
    ("sparling", "--final-share 0 --final-rate 0.1", "--final-rate has no effect with --final-sh"),
    ("sparling", "--bottleneck none --density-end 2", "--density-end has no effect with"),
    ("sparling", "--data somewhere", "--data needs domain audio"),
]


def failure(capsys, *words):
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("study, flags, message", WITHOUT_EFFECT)
def test_a_flag_without_effect_is_refused(study, flags, message, tmp_path, capsys):
    words = ["train", study, "--out", tmp_path / "run", *flags.split()]
    if study == "sae":
        write_activations(tmp_path / "a.h5", [torch.randn(64, 8)])
        words += ["--activations", tmp_path / "a.h5"]
    assert message in failure(capsys, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("study", [sae, vae_sae, sparling])
def test_what_may_have_no_effect_are_fields(study):
    configs = {
        sae: [{"activation": a} for a in ("topk", "batchtopk", "jumprelu")],
        vae_sae: [{}, {"revival": "auxk"}],
        sparling: [{"bottleneck": b} for b in ("sparsity", "l1", "kl", "none")],
    }[study]
    for changes in configs:
        more = {"activations": ("a",)} if study is sae else {}
        config = study.Config(**more, **changes)
        assert all(hasattr(config, name) for name in config.without_effect())
        # Nobody who trains with defaults is told of them: only flags that were typed are refused.
        assert "learning_rate" not in config.without_effect()


REPRODUCE = ["reproduce", "vae-sae", "--datasets", "dsprites", "--arms", "topk", "--seeds", "1"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "shapes3d=x.h5"], "--data must be of the data sets asked for, got one of sha"),
        (["--data", "dsprites=x", "dsprites=y"], "--data must name each data set once"),
        (["--set", "epochs=2", "--set", "epochs=3"], "--set must name each setting once, got epo"),
        (["--set", "dead_after=5"], "--set dead_after has no effect with --revival none"),
        (["--set", "batch_size=0"], "--set batch_size must be at least 1, got 0"),
        (["--out", ""], "--out must name a folder, got an empty name"),
    ],
)
def test_bad_requests_are_refused_in_the_words_of_the_command(
    flags, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in flags else ["--out", "report"]
    assert message in failure(capsys, *REPRODUCE, *out, *flags)


def test_a_repeated_flag_adds_to_itself():
    parsed = _parser().parse_args
    words = ["train", "sae", "--activations", "a", "b", "--activations", "c", "--prefixes", "1"]
    assert parsed(words).activations == ["a", "b", "c"]
    assert parsed(["eval", "r", "--activations", "a", "--activations", "b"]).activations == [
        "a",
        "b",
    ]
    words = [
        "reproduce",
        "vae-sae",
        "--arms",
        "topk",
        "--arms",
        "l1",
        "--set",
        "a=1",
        "--set",
        "b=2",
    ]
    assert parsed(words).arms == ["topk", "l1"] and parsed(words).settings == ["a=1", "b=2"]
    assert parsed(["reproduce", "vae-sae", "--arms", "dense"]).arms == ["dense"]


@pytest.mark.parametrize("study", ["sae", "vae-sae", "sparling"])
@pytest.mark.parametrize("flag", ["--out", "--resume"])
def test_an_empty_folder_is_no_folder(study, flag, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--activations", "a"] if study == "sae" and flag == "--out" else []
    assert f"{flag} must name a folder" in failure(capsys, "train", study, flag, "", *more)
