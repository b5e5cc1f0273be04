"""`sparsekern reproduce sparling`: the grid, the report's numbers, and what killing it does."""

import csv
import signal
import time

import pytest
from processes import Forked, run_command
from reproductions import command_of, results

from sparsekern.cli.command import main
from sparsekern.studies.reproduction import epochs_done
from sparsekern.studies.sparling import report
from sparsekern.studies.sparling.grid import ARMS, PRESETS, Cell, cell_config, cells
from sparsekern.studies.sparling.report import motif_total, select_run

SMALL = (
    "samples=384", "validate_every=128", "validation_samples=40", "test_samples=50",
    "density_start=0.5", "target_fall=0.01", "log_every=2",
)  # fmt: skip
WANTED = ("--arms", "sparling", "l1-3", "--seeds", "1", "--jobs", "2")


def command(folder, *flags, settings=SMALL):
    return command_of("sparling", folder, *flags, settings=settings)


# -- the grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_of_every_preset_is_a_config(preset, arm):
    config = cell_config(Cell(arm, 2), preset, {}, None)
    assert config.seed == 2 and (preset == "tiny" or config.domain == preset)
    group = ARMS[arm].group
    assert (config.bottleneck in ("l1", "kl")) == (group in ("l1", "kl"))
    assert (config.penalty > 0) == (group in ("l1", "kl"))


def test_no_annealing_starts_where_the_others_end():
    config = cell_config(Cell("no-annealing", 0), "tiny", {}, None)
    assert config.density_start == pytest.approx(1.1 * 9.566e-4, rel=1e-3)


def test_the_study_has_all_seeds_and_the_others_three():
    wanted = cells(("l1-1", "sparling"), 6)
    assert [c.seed for c in wanted if c.arm == "sparling"] == list(range(6))
    assert [c.seed for c in wanted if c.arm == "l1-1"] == [0, 1, 2]
    assert wanted[0].arm == "sparling"
    assert len(cells(("l1-1",), 2)) == 2


@pytest.mark.parametrize(
    "flags, settings, message",
    [
        (["--seeds", "0"], SMALL, "--seeds must be at least 1, got 0"),
        (["--jobs", "0"], SMALL, "--jobs must be at least 1, got 0"),
        (["--arms", "best"], SMALL, "--arms must be among sparling, l1-1"),
        ([], ["penalty=1"], "--set must be NAME=VALUE with NAME one of accumulate"),
        ([], ["samples=100"], "samples must be a multiple of 5000"),
        (["--preset", "audio", "--data", "nowhere"], ["samples=20000"], "nowhere"),
    ],
)
def test_bad_flags(flags, settings, message, tmp_path, capsys):
    assert main(command(tmp_path / "report", *flags, settings=settings)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "report").exists()


# -- the report ------------------------------------------------------------------------------------


def made_up(fpe, fne, ce, exact):
    shares = {"fpe": fpe, "fne": fne, "ce": ce}
    return {
        "results": {
            **{name: {"value": share} for name, share in shares.items()},
            "validation_exact": exact,
        }
    }


def test_the_run_is_selected_without_motif_labels():
    found = {
        Cell("sparling", 0): made_up(0.0, 0.0, 0.0, 0.97),
        Cell("sparling", 1): made_up(0.5, 0.5, 0.5, 0.99),
    }
    assert select_run(found) == Cell("sparling", 1)


def test_a_share_of_nothing_counts_in_full():
    assert motif_total(made_up(0.01, 0.02, 0.03, 1.0)["results"]) == pytest.approx(6)
    assert motif_total(made_up(None, 1.0, None, 1.0)["results"]) == 300


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparling") / "complete"
    assert main(command(folder, *WANTED)) == 0
    return folder


@pytest.mark.slow
@pytest.mark.study
def test_a_report_says_what_the_cells_measured(complete):
    found = results(complete)
    assert set(found) == {"sparling-0", "l1-3-0"}
    with open(complete / "cells.csv", newline="") as file:
        rows = {f"{row['arm']}-{row['seed']}": row for row in csv.DictReader(file)}
    for name, measured in found.items():
        for share in report.SHARES:
            assert float(rows[name][share]) == measured[share]["value"]
    text = (complete / "report.md").read_text()
    study = found["sparling-0"]
    assert f"{motif_total(study):.2f}" in text and "Complete: 2 of 2 cells" in text
    for name in ("annealing", "motifs", "l1"):
        assert (complete / "figures" / f"{name}.png").stat().st_size > 5000
        assert f"figures/{name}.png" in text
    page = (complete / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "<script" not in page
    with open(complete / "epochs.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 6


@pytest.mark.slow
@pytest.mark.study
def test_killed_and_started_again_it_ends_with_the_same_results(complete, tmp_path):
    """Interruptions by other signals are those of test_reproduce.py."""
    folder = tmp_path / "report"
    words = command(folder, *WANTED)
    process = Forked(run_command, words)
    places = [folder / "cells" / name for name in ("sparling-0", "l1-3-0")]
    while sum(map(epochs_done, places)) < 1 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=180)
    assert process.returncode in (0, -signal.SIGKILL), err
    assert main(words) == 0
    assert results(folder) == results(complete)


@pytest.mark.slow
@pytest.mark.study
def test_another_protocol_needs_another_folder(complete, capsys):
    assert main(command(complete, *WANTED, settings=[*SMALL, "learning_rate=0.5"])) == 2
    assert "holds a reproduction with overrides" in capsys.readouterr().err
