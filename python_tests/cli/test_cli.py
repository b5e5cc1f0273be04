"""The command line: a whole small run, resuming, and one line for each bad input."""

import dataclasses
import json
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from one_thread import one_thread
from processes import Forked, run_command, spawn

import sparsekern
from sparsekern.cli.command import main
from sparsekern.data import rendered

TINY = [
    "--images", "48", "--epochs", "3", "--batch-size", "16", "--eval-images", "16",
    "--test-images", "20", "--units", "40", "--k-start", "40", "--k-end", "4", "--width", "2",
    "--log-every", "1",
]  # fmt: skip

__all__ = ["one_thread"]  # fixtures


def train(*flags):
    return main(["train", "vae-sae", "--no-progress", *map(str, flags)])


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.rstrip().endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "complete"
    assert train(*TINY, "--out", folder) == 0
    return folder


def test_a_small_run_fills_its_folder(complete):
    names = {path.name for path in complete.iterdir()}
    assert names == {
        "checkpoint-9.safetensors", "checkpoint.json", "config.json", "history.png", "lock",
        "metrics.jsonl", "reconstructions.png", "results.json",
    }  # fmt: skip
    config = json.loads((complete / "config.json").read_text())
    assert config["study"] == "vae-sae"
    assert config["config"]["k_start"] == 40 and config["config"]["learning_rate"] == 1e-3
    assert [r["step"] for r in records(complete, "step")] == list(range(1, 10))
    epochs = records(complete, "epoch")
    assert [r["k"] for r in epochs] == [40, 22, 4]
    assert epochs[-1]["eval_l0"] <= 4
    assert epochs[-1]["loss"] == pytest.approx(epochs[-1]["reconstruction"] + epochs[-1]["kl"])
    assert all(0 <= r["eval_dead"] <= 1 and 0 <= r["train_dead"] <= 1 for r in epochs)
    for name in ("history.png", "reconstructions.png"):
        width, height = png_size(complete / name)
        assert width > 400 and height > 200
        assert (complete / name).stat().st_size > 5000


def test_the_results_name_what_was_measured_and_by_which_backend(complete):
    results = json.loads((complete / "results.json").read_text())
    assert results["k"] == 4 and results["test_images"] == 20 and results["l0"] <= 4
    assert results["reconstruction"] > 0 and results["images_per_second"] > 0
    assert set(results["dead"]) == set(results["dead_sampled"]) and len(results["dead"]) == 7
    assert {"topk", "sparse_matmul"} <= set(results["backends"])


def test_the_table_ends_the_run(tmp_path, capsys):
    flags = [*TINY, "--epochs", "1", "--backend", "reference"]
    assert train(*flags, "--out", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    for text in (
        "reconstruction loss", "KL", "dead units, never active", "L0", "images per second",
        "topk by", "sparse_matmul by", str(tmp_path / "run"),
    ):  # fmt: skip
        assert text in printed
    line = next(line for line in printed.splitlines() if "topk by" in line)
    assert line.split()[-1] == "reference"


def test_the_same_seed_gives_the_same_run_and_another_another(complete, tmp_path):
    assert train(*TINY, "--out", tmp_path / "same") == 0
    assert records(tmp_path / "same", "step") == records(complete, "step")
    assert train(*TINY, "--seed", 1, "--epochs", 1, "--out", tmp_path / "other") == 0
    assert records(tmp_path / "other", "step")[0] != records(complete, "step")[0]


def test_started_processes_import_the_package_under_test():
    for process in (
        spawn("-c", "import sparsekern; print(sparsekern.__file__)"),
        Forked(_print_place),
    ):
        out, err = process.communicate()
        assert out.strip() == str(Path(sparsekern.__file__).resolve()), err


def _print_place():
    print(sparsekern.__file__, flush=True)


def test_a_process_interrupted_by_the_user_resumes_to_the_same_metrics(complete, tmp_path, capsys):
    folder = tmp_path / "run"
    process = Forked(run_command, ["train", "vae-sae", *TINY, "--out", str(folder)])
    while not (folder / "checkpoint.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=180)
    # A fast machine may be through before the signal lands.
    assert process.returncode in (130, 0), err
    if process.returncode == 130:
        assert f"sparsekern train vae-sae --resume {folder}" in out
        assert not (folder / "results.json").exists()
    assert "Traceback" not in err
    assert train("--resume", folder) == 0
    for kind in ("step", "epoch"):
        ours, theirs = records(folder, kind), records(complete, kind)
        for record in ours + theirs:
            record.pop("examples_per_second", None)
        assert ours == theirs
    ours, theirs = (json.loads((f / "results.json").read_text()) for f in (folder, complete))
    for name in ("images_per_second", "seconds"):
        assert ours.pop(name) > 0 and theirs.pop(name) > 0
    assert ours == theirs


def test_resuming_a_complete_run_gives_its_results_again(complete, tmp_path):
    # As after a kill in the final evaluation: trained to the end, but nothing made of it.
    folder = tmp_path / "run"
    folder.mkdir()
    made = ("results.json", "history.png", "reconstructions.png")
    for path in complete.iterdir():
        if path.name not in made:
            (folder / path.name).write_bytes(path.read_bytes())
    assert train("--resume", folder) == 0
    for name in made:
        assert (folder / name).read_bytes() == (complete / name).read_bytes(), name


@pytest.fixture
def npz(tmp_path):
    rendered(90, seed=4).save(tmp_path / "sprites.npz")
    return tmp_path / "sprites.npz"


def test_data_from_a_file_which_may_move_but_not_change(npz, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(*TINY, "--epochs", 1, "--data", npz, "--out", folder) == 0
    assert str(npz) in capsys.readouterr().out
    moved = npz.rename(tmp_path / "moved.npz")
    assert failure(capsys, "--resume", folder) == f"data file not found: {npz}"
    assert train("--resume", folder, "--data", moved) == 0
    rendered(90, seed=5).save(moved)
    message = failure(capsys, "--resume", folder, "--data", moved)
    assert "checkpoint" in message and "of another config: images' digest is" in message


def failure(capsys, *flags):
    """The message of a run that must fail, in one line and with exit code 2."""
    capsys.readouterr()
    try:
        assert train(*flags) == 2
    except SystemExit as stop:
        assert stop.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    prefix = "sparsekern: error: train vae-sae: "
    assert printed.err.startswith(prefix)
    return printed.err[len(prefix) : -1]


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bad_data_files_write_nothing(npz, tmp_path, capsys):
    out = tmp_path / "run"
    damaged, other, text = tmp_path / "damaged.npz", tmp_path / "other.npz", tmp_path / "text.npz"
    damaged.write_bytes(npz.read_bytes()[:1000])
    np.savez(other, images=np.zeros(3))
    text.write_text("hello")
    for file, message in (
        (tmp_path / "no.npz", "data file not found: "),
        (damaged, "data file is truncated or damaged: "),
        (other, "data file has another layout: "),
        (text, "data file has another layout: "),
        (npz, "got 36048 (--images 25024 + --eval-images 1024 + --test-images 10000)"),
        (npz, "count must lie in 1..90 (the number of images)"),
    ):
        flags = ["--data", file, "--images", 25024] if file == npz else ["--data", file]
        assert message in failure(capsys, *flags, "--out", out)
        assert not out.exists()


def test_more_images_than_there_are_to_render(tmp_path, capsys):
    message = failure(capsys, "--images", 737280, "--out", tmp_path / "run")
    assert message == (
        "rendered: count must lie in 1..737280 (the number of images), got 748304 "
        "(--images 737280 + --eval-images 1024 + --test-images 10000)"
    )
    assert list(tmp_path.iterdir()) == []


def test_images_that_no_model_can_start_from_write_nothing(tmp_path, capsys):
    data = rendered(90)
    dataclasses.replace(data, images=np.zeros_like(data.images)).save(tmp_path / "empty.npz")
    flags = [*TINY, "--data", tmp_path / "empty.npz", "--out", tmp_path / "run"]
    assert "mean_pixel must lie inside 0..1, got 0.0" in failure(capsys, *flags)
    assert not (tmp_path / "run").exists()


def test_the_largest_seed(tmp_path):
    flags = [*TINY, "--epochs", 1, "--seed", 2**64 - 1]
    assert train(*flags, "--out", tmp_path / "run") == 0


def test_bad_folders(complete, tmp_path, capsys):
    before = snapshot(complete)
    assert "folder already holds a run" in failure(capsys, *TINY, "--out", complete)
    assert "no run in" in failure(capsys, "--resume", tmp_path)
    (tmp_path / "file").write_text("")
    message = failure(capsys, *TINY, "--out", tmp_path / "file" / "run")
    assert message.startswith("cannot write to the run folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "not allowed with argument" in failure(capsys, "--out", "a", "--resume", "b")
    assert snapshot(complete) == before


def test_resuming_with_another_config_names_the_flag(complete, capsys):
    before = snapshot(complete)
    message = failure(capsys, "--resume", complete, "--batch-size", 32)
    assert message == f"{complete} was started with --batch-size 16, it cannot be resumed with 32"
    assert "--epochs 3" in failure(capsys, "--resume", complete, "--epochs", 4)
    assert snapshot(complete) == before
    assert train("--resume", complete, "--epochs", 3) == 0, "an equal flag is no difference"


def test_a_config_that_does_not_fit_its_checkpoint(complete, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for path in complete.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"beta": 1.0', '"beta": 4.0'))
    before = snapshot(folder)
    message = failure(capsys, "--resume", folder)
    assert message.endswith("is of another config: beta is 1.0 there and 4.0 here")
    assert snapshot(folder) == before
    config.write_text(config.read_text().replace('"vae-sae"', '"other"'))
    assert "holds a run of 'other', not of 'vae-sae'" in failure(capsys, "--resume", folder)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--k-end", "0"], "--k-end must lie in 1..500 (the number of units), got 0"),
        (["--k-start", "many"], "argument --k-start: invalid int value: 'many'"),
        (["--seed", "9" * 23], f"--seed must lie in 0..{2**64 - 1}, got {'9' * 23}"),
        (["--learning-rate", "inf"], "--learning-rate must be above 0 and finite, got inf"),
        (["--backend", "magic"], "argument --backend: invalid choice: 'magic'"),
        (["--device", "nowhere"], "--device 'nowhere' cannot be used"),
        (["--speed", "9"], "unknown arguments: --speed 9"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys):
    assert message in failure(capsys, "--out", tmp_path / "run", *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_cannot_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    flags = ["--device", "cpu", "--backend", "triton", "--out", tmp_path / "run"]
    assert "backend 'triton' was asked for but cannot run on cpu" in failure(capsys, *flags)
    assert list(tmp_path.iterdir()) == []


def test_info_lists_versions_and_implementations(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for text in ("python", "torch", "threads", "GPU", "topk", "sparse_matmul", "count_active"):
        assert text in printed
    for text in ("h5py", "matplotlib", "safetensors", "tqdm"):
        assert text in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_help_documents_every_field_of_the_config(capsys):
    from dataclasses import fields

    from sparsekern.studies.vae_sae import VAESAEConfig

    with pytest.raises(SystemExit) as stop:
        main(["train", "vae-sae", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for item in fields(VAESAEConfig):
        assert "--" + item.name.replace("_", "-") in printed
        assert item.metadata["help"].split()[0] in printed
