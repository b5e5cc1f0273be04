"""`sparsekern reproduce vae-sae`: the grid, its processes, and what killing them does."""

import json
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from processes import Forked, run_command
from reproductions import command_of, results

from sparsekern._system import lock_file
from sparsekern.cli.command import main
from sparsekern.data.images import dsprites
from sparsekern.studies import vae_sae
from sparsekern.studies.reproduction import epochs_done, merged_request
from sparsekern.studies.vae_sae import VAESAEConfig, grid
from sparsekern.studies.vae_sae.grid import ARMS, Cell, cell_config, cells, parsed_overrides
from sparsekern.studies.vae_sae.reproduce import Request
from sparsekern.training import RunError

TINY = (
    "images=48", "epochs=3", "extra_epochs=1", "batch_size=16", "eval_images=16", "test_images=40",
    "units=20", "k_start=20", "k_end=4", "width=2", "mig_every=0",
)  # fmt: skip


def command(folder, *flags, settings=TINY):
    return command_of("vae-sae", folder, *flags, settings=settings)


# -- the grid --------------------------------------------------------------------------------------


def test_the_study_comes_first_and_every_cell_once():
    found = cells(("dsprites", "shapes3d"), ("dense", "l1", "topk"), range(2))
    assert found[0] == Cell("dsprites", "topk", 0)
    assert len(set(found)) == len(found) == 12
    assert [cell.arm for cell in found] == ["topk"] * 4 + ["l1"] * 4 + ["dense"] * 4


@pytest.mark.parametrize("preset", grid.PRESETS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_of_every_preset_is_a_config(preset, arm):
    for dataset, available in (("dsprites", 737_280), ("shapes3d", 480_000)):
        config = cell_config(Cell(dataset, arm, 3), preset, {}, "some.h5")
        assert (config.dataset, config.seed, config.data) == (dataset, 3, "some.h5")
        assert config.images + config.eval_images + config.test_images <= available
        assert config.epochs == 50 and config.units == 500
        assert config.extra_epochs == (100 if arm in ("topk", "l1") else 0)
        ends = {"dense": (500, 500), "fixed": (50, 50)}.get(arm, (500, 50))
        assert (config.k_start, config.k_end) == ends


def test_the_command_without_arguments_trains_a_cell_of_the_study():
    cell = cell_config(Cell("dsprites", "topk", 0), "small", {"extra_epochs": 0}, None)
    assert replace(VAESAEConfig(), mig_every=cell.mig_every, progress=False) == cell


def test_a_run_is_shown_beside_the_published_rate_with_the_cure():
    shares = {"never": 0.376, "frequency<1e-04": 0.376}
    results = {
        "data": "images", "steps": 1, "reconstruction": 1.0, "kl": 1.0, "mig": {"score": 0.1},
        "dead": shares, "dead_sampled": shares, "l0": 50.0, "images_per_second": 1.0,
        "backends": {}, "test_images": 9, "device": "cpu",
    }  # fmt: skip
    text = vae_sae.table(results, VAESAEConfig())
    assert "never active     37.6%" in text and "the study        34.4 % ± 0.9 %" in text
    assert "add --standardize" in text
    cured = vae_sae.table(results, VAESAEConfig(standardize=True))
    assert "the study" in cured and "add --standardize" not in cured
    assert "the study" not in vae_sae.table(results, VAESAEConfig(k_end=20))


def test_arms_differ_from_the_study_in_what_they_say():
    study = cell_config(Cell("dsprites", "topk", 0), "small", {"extra_epochs": 0}, None)
    for name, arm in ARMS.items():
        config = cell_config(Cell("dsprites", name, 0), "small", {"extra_epochs": 0}, None)
        same = config == study
        assert same == (name == "topk" or arm.changes == {"placement": study.placement})


def test_overrides_reach_every_cell_but_do_not_undo_an_arm():
    overrides = parsed_overrides(["learning-rate=3e-4", "k_end=20", "standardize=True"])
    assert overrides == {"learning_rate": 3e-4, "k_end": 20, "standardize": True}
    config = cell_config(Cell("shapes3d", "fixed", 0), "small", overrides, None)
    assert (config.learning_rate, config.k_start, config.k_end) == (3e-4, 20, 20)
    config = cell_config(Cell("shapes3d", "auxk", 0), "small", {"images": 300}, None)
    assert config.dead_after == 300, "an epoch, whatever its length"
    config = cell_config(Cell("shapes3d", "dense", 0), "small", {"units": 700, "k_start": 9}, None)
    assert (config.k_start, config.k_end) == (700, 700), "never sparsified"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--arms", "topk", "best"], "--arms must be among topk, l1, dense"),
        (["--datasets", "faces"], "--datasets must be among dsprites, shapes3d, got 'faces'"),
        (["--data", "faces=x.h5"], "--data must be SET=FILE with SET one of dsprites, shapes3d"),
        (["--data", "x.h5"], "--data must be SET=FILE"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys):
    try:
        code = main(command(tmp_path / "report", *flags))
    except SystemExit as error:  # how argparse ends
        code = error.code
    assert code == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "setting, message",
    [
        ("epochs", "--set must be NAME=VALUE with NAME one of backend, batch_size"),
        ("epoch=3", "--set must be NAME=VALUE"),
        ("seed=3", "--set must be NAME=VALUE"),
        ("sparsifier=l1", "--set must be NAME=VALUE"),
        ("revival=auxk", "--set must be NAME=VALUE"),
        ("epochs=many", "--set epochs must be int, got 'many'"),
        ("standardize=maybe", "--set standardize must be bool, got 'maybe'"),
        ("epochs=0", "epochs must be at least 1, got 0"),
        ("k_start=501", "k_start must lie in 1..500"),
        ("placement=middle", "placement must be one of decoder, code, encoder, got middle"),
    ],
)
def test_bad_settings(setting, message, tmp_path, capsys):
    assert main(command(tmp_path / "report", settings=[setting])) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_bad_folders(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out, message in (
        ("", "--out must name a folder, got an empty name"),
        (tmp_path / "file", "--out must be a folder, got the file"),
    ):
        assert main(command(out)) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_groups_of_arms():
    request = Request.from_options("small", ["dsprites"], ["controls", "topk"], None, [], [])
    assert request.arms == ("dense", "fixed", "topk") and request.seeds == 2
    assert set(Request.from_options("full", ["dsprites"], ["all"], 1, [], []).arms) == set(ARMS)


# -- processes -------------------------------------------------------------------------------------

SMALL = ("--datasets", "shapes3d", "--arms", "topk", "fixed", "--seeds", "1", "--jobs", "2")


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce") / "complete"
    assert main(command(folder, *SMALL)) == 0
    return folder


@pytest.mark.slow
@pytest.mark.study
def test_a_reproduction_has_its_cells_and_a_report(complete):
    assert set(results(complete)) == {"shapes3d-topk-0", "shapes3d-fixed-0"}
    for name in ("report.md", "report.html"):
        assert (complete / name).stat().st_size > 0
    topk = results(complete)["shapes3d-topk-0"]
    assert topk["k"] == topk["schedule"]["k"] == 4 and len(topk["death_epoch"]) == 20
    assert topk["steps"] == 4 * 3 and topk["l0"] <= 4
    assert topk["untrained"]["l0"] > 4


@pytest.mark.slow
@pytest.mark.study
def test_finished_cells_are_kept_and_arms_can_be_added(complete, capsys, tmp_path, monkeypatch):
    """From a folder in which another package of this name lies, which is not to be taken."""
    (tmp_path / "sparsekern.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    paths = list((complete / "cells").glob("*/results.json"))
    before = {path: path.stat().st_mtime_ns for path in paths}
    flags = ("--datasets", "shapes3d", "--arms", "dense", "--seeds", "1")
    assert main(command(complete, *flags)) == 0
    assert "1 cells, 0 failed" in capsys.readouterr().out
    assert set(results(complete)) == {f"shapes3d-{arm}-0" for arm in ("topk", "fixed", "dense")}
    assert before == {path: path.stat().st_mtime_ns for path in paths}
    assert json.loads((complete / "reproduction.json").read_text())["arms"] == [
        "topk", "fixed", "dense",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.study
def test_another_protocol_needs_another_folder(complete, capsys):
    assert main(command(complete, *SMALL, settings=[*TINY, "learning_rate=0.5"])) == 2
    err = capsys.readouterr().err
    assert "holds a reproduction with overrides" in err and "name another folder" in err


def test_a_data_file_may_move_but_not_change(tmp_path):
    first, moved, changed = (tmp_path / f"{name}.npz" for name in ("first", "moved", "changed"))
    first.write_bytes(b"images")
    moved.write_bytes(b"images")
    changed.write_bytes(b"other images")

    def asked(path):
        arguments = ["dsprites"], ["topk"], None, [f"dsprites={path}"], []
        return {"seeds": 1, "digests": Request.from_options("small", *arguments).digests()}

    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "reproduction.json").write_text(json.dumps(asked(first)))
    merged = merged_request(asked(moved), folder, fixed=("digests",), lists=())
    assert merged == asked(first)
    with pytest.raises(RunError, match="holds a reproduction with digests"):
        merged_request(asked(changed), folder, fixed=("digests",), lists=())


def test_data_files_are_looked_at_before_anything_starts(tmp_path, capsys):
    few = tmp_path / "few.npz"
    dsprites.rendered(103, seed=0).save(few)
    other = tmp_path / "other.npz"
    np.savez(other, imgs=np.zeros((200, 32, 32), np.uint8))
    enough = tmp_path / "enough.npz"
    dsprites.rendered(104, seed=0).save(enough)
    fields = dict(np.load(enough))
    unlabelled, wrong, outside = (tmp_path / f"{name}.npz" for name in ("none", "wrong", "outside"))
    np.savez(unlabelled, imgs=fields["imgs"])
    np.savez(wrong, **{**fields, "latents_classes": fields["latents_classes"][:, :5]})
    np.savez(outside, **{**fields, "latents_classes": fields["latents_classes"] + 40})
    cut = tmp_path / "cut.npz"
    cut.write_bytes(few.read_bytes()[:-200])
    for path, message in (
        (tmp_path / "gone.npz", "data file not found"),
        (few, "count must lie in 1..103 (the number of images), got 104"),
        (other, "imgs must be uint8 [n, 64, 64], got uint8 [200, 32, 32]"),
        (cut, "data file is truncated or damaged"),
        (unlabelled, "has no field 'latents_classes'"),
        (wrong, "latents_classes must be integers [104, 6], got int64 [104, 5]"),
        (outside, "latents_classes must lie below [1, 3, 6, 40, 32, 32]"),
    ):
        flags = ("--datasets", "dsprites", "--arms", "topk", "--data", f"dsprites={path}")
        assert main(command(tmp_path / "report", *flags)) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
        assert not (tmp_path / "report").exists()


@pytest.mark.slow
@pytest.mark.study
def test_a_folder_in_use(complete, capsys):
    unlock = lock_file(complete / "lock")
    assert main(command(complete, *SMALL)) == 2
    unlock()
    assert f"another process is writing the report in {complete}" in capsys.readouterr().err


def test_a_folder_with_something_else(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("months of work")
    assert main(command(tmp_path, *SMALL)) == 2
    assert f"folder is not empty: {tmp_path} holds thesis.tex" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.study
def test_a_damaged_request(complete, tmp_path, capsys):
    (tmp_path / "reproduction.json").write_text("{")
    assert main(command(tmp_path, *SMALL)) == 2
    assert "reproduction.json is damaged" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.study
def test_failed_cells_are_told_and_the_others_finish(tmp_path, capsys):
    """A data file whose images are not what its head promises."""
    sprites = dsprites.rendered(104, seed=0)
    broken = dsprites.DSprites(sprites.images + 1, sprites.classes, "")
    broken.save(tmp_path / "broken.npz")
    folder = tmp_path / "report"
    flags = ("--arms", "fixed", "--seeds", "1", "--data", f"dsprites={tmp_path}/broken.npz")
    assert main(command(folder, *flags)) == 2
    captured = capsys.readouterr()
    assert "cell dsprites-fixed-0 failed: data file has another layout" in captured.err
    assert "1 cells, 1 failed" in captured.out
    assert set(results(folder)) == {"shapes3d-fixed-0"}
    assert "dsprites-fixed-0" in (folder / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.study
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_and_started_again_it_ends_with_the_same_results(complete, tmp_path, number):
    folder = tmp_path / "report"
    words = command(folder, *SMALL)
    for epochs in (1, 3):  # once in the middle of the cells, once further on
        process = Forked(run_command, words)
        places = [folder / "cells" / f"shapes3d-{arm}-0" for arm in ("topk", "fixed")]
        while sum(map(epochs_done, places)) < epochs and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        out, err = process.communicate(timeout=180)
        # -SIGINT: the signal came before the command had begun.
        assert process.returncode in (0, 130, -number), err
        assert "Traceback" not in err
        if process.returncode == 130:
            assert f"--out {folder}" in out
    assert main(words) == 0
    ours, theirs = results(folder), results(complete)
    for name in ("shapes3d-topk-0", "shapes3d-fixed-0"):
        assert ours[name] == theirs[name]
