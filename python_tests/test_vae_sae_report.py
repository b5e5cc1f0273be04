"""The report of a reproduction: statistics with known answers, and reports on made-up cells."""

import csv
import io
import shlex
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
import torch

from sparsekern.cli import _parser
from sparsekern.studies.vae_sae import report, report_document, report_figures, report_pictures
from sparsekern.studies.vae_sae.config import VAESAEConfig
from sparsekern.studies.vae_sae.grid import Cell, cell_config, cells
from sparsekern.studies.vae_sae.images import read
from sparsekern.studies.vae_sae.report_conclusions import conclusions
from sparsekern.studies.vae_sae.report_limits import changed_settings, limits
from sparsekern.studies.vae_sae.report_numbers import (
    PHASES,
    Measured,
    Returned,
    Spread,
    Verdict,
    compared,
    phase_of_units,
    phases,
    returned,
    spread,
    threshold_range,
    verdict,
)
from sparsekern.studies.vae_sae.report_sections import command
from sparsekern.studies.vae_sae.runner import cell_folder
from sparsekern.studies.vae_sae.task import Trained, make_model
from sparsekern.training import RunError, scheduled_k
from sparsekern.training.checkpoints import model_tensors, write_checkpoint

UNITS = 20
EPOCHS, EXTRA = 10, 5
OVERRIDES = {"epochs": EPOCHS, "extra_epochs": EXTRA, "units": UNITS, "k_start": UNITS, "k_end": 2}
SETS = ("dsprites", "shapes3d")


def asked(arms, datasets=SETS, seeds=2):
    return {
        "preset": "small",
        "datasets": list(datasets),
        "arms": list(arms),
        "seeds": seeds,
        "data": {},
        "overrides": OVERRIDES,
    }


def gap(score):
    return {"score": score, "low": score - 0.01, "high": score + 0.01, "factors": [None, score]}


def measurements(dead, mig, reconstruction, k, l0):
    """With the first `dead` units dead."""
    alive = [0.0] * dead + [0.25] * (UNITS - dead)
    share = dead / UNITS
    names = ("never", "frequency<1e-04", "frequency<1e-03", "frequency<1e-02")
    panel = dict.fromkeys(names, share) | {
        "mean<1e-04": share,
        "mean<1e-03": share,
        "mean<1e-02": min(1.0, share + 0.1),
    }
    return {
        "k": k,
        "reconstruction": reconstruction,
        "kl": 7.5,
        "l0": l0,
        "dead": panel,
        "dead_sampled": dict.fromkeys(panel, share / 2),
        "mig": gap(mig),
        "mig_code": gap(mig / 2),
        "mig_random": gap(0.001),
        "mig_monte_carlo": {"score": mig + 0.02, "factors": [None, mig]},
        "units": {
            "frequency": alive,
            "mean": [2 * f for f in alive],
            "selectivity": [0.01 * at for at in range(UNITS)],
            "factor": [at % 6 for at in range(UNITS)],
        },
    }


def content(cell, *, dead=4, after=3, mig=0.1, reconstruction=30.0, death=None, l0=None):
    config = cell_config(cell, "small", OVERRIDES, None)
    ks = [
        scheduled_k("linear", config.k_start, config.k_end, min(at, EPOCHS - 1), EPOCHS)
        for at in range(config.all_epochs)
    ]
    end = measurements(dead, mig, reconstruction, ks[EPOCHS - 1], l0 or ks[EPOCHS - 1])
    final = end if config.extra_epochs == 0 else measurements(after, mig, 29.0, ks[-1], 2.0)
    count = round(final["dead"]["never"] * UNITS)
    return {
        "config": asdict(config),
        "results": {
            **final,
            "data": f"rendered {cell.dataset} images",
            "test_images": 400,
            "schedule": end,
            "untrained": measurements(0, 0.01, 150.0, UNITS, 10.0),
            "death_epoch": death or [3] * count + [None] * (UNITS - count),
            "steps": 100,
            "images_per_second": 1000.0,
            "seconds": 1.5,
            "device": "cpu",
            "backends": {"topk": "native"},
        },
        "epochs": [
            {
                "kind": "epoch",
                "epoch": at,
                "k": k,
                "reconstruction": 40.0 - at,
                "eval_reconstruction": 41.0 - at,
                "eval_dead": dead / UNITS * at / config.all_epochs,
                "eval_l0": float(k),
                **({"mig": 0.1, "mig_low": 0.09, "mig_high": 0.11} if at % 2 == 0 else {}),
            }
            for at, k in enumerate(ks)
        ],
    }


def grid(arms, datasets=SETS, seeds=2, **changes):
    """Seed s has s more dead units."""
    dead = changes.pop("dead", 4)
    return {
        cell: content(cell, dead=dead + cell.seed, **changes)
        for cell in cells(datasets, arms, range(seeds))
    }


def written(folder, found, request, failed=None, total=None):
    report.write(
        folder, request, found, failed=failed or {}, total=len(found) if total is None else total
    )
    return (folder / "report.md").read_text()


@pytest.fixture
def quick(monkeypatch):
    """No drawing: figures are drawn elsewhere."""
    monkeypatch.setattr(report_figures, "as_png", lambda figure: b"a figure")
    monkeypatch.setattr(report_pictures, "as_png", lambda figure: b"a picture")


@pytest.fixture
def figures(monkeypatch):
    """The module of figures, whose functions give them undrawn."""
    monkeypatch.setattr(report_figures, "as_png", lambda figure: figure)
    return report_figures


class Structure(HTMLParser):
    """Raises where tags do not match; notes pictures and links."""

    EMPTY = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        names = dict(attributes)
        self.sources += [names[n] for n in ("src", "href", "srcset", "data") if n in names]
        assert tag not in ("link", "script", "iframe", "object")
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(html):
    structure = Structure()
    structure.feed(html)
    structure.close()
    assert structure.open == []
    return structure


# -- statistics ------------------------------------------------------------------------------------


def test_spread_is_mean_and_sample_deviation():
    found = spread([0.1, 0.2, 0.3])
    assert found.n == 3 and found.mean == pytest.approx(0.2) and found.sd == pytest.approx(0.1)
    assert found.percent() == "20.0 ± 10.0" and found.text(2) == "0.20 ± 0.10"
    one = spread([0.25])
    assert one == Spread(0.25, None, 1) and one.percent() == "25.0"


def test_units_die_in_the_phase_of_the_k_at_their_death():
    cell = Cell("dsprites", "topk", 0)
    #      last active after epoch: -1 with and without life before, then 0, 1, 8, 9, 13
    death = [-1, -1, 0, 1, 8, 9, 13] + [None] * (UNITS - 7)
    made = content(cell, death=death)
    # k: 20 18 16 14 12 10 8 6 4 2, then 2; at least 18 is early
    assert [r["k"] for r in made["epochs"]][:3] == [20, 18, 16]
    made["results"]["untrained"]["units"]["frequency"][0] = 0.0
    found = phase_of_units(made)
    never_alive, early, fell, final = PHASES
    assert found[:7] == [never_alive, early, early, fell, final, final, final]
    assert found[7:] == [None] * (UNITS - 7)
    assert phases(made) == {never_alive: 1 / 20, early: 2 / 20, fell: 1 / 20, final: 3 / 20}


def test_where_k_is_constant_early_is_the_first_tenth():
    made = content(Cell("dsprites", "fixed", 0), death=[-1, 0, 1] + [None] * (UNITS - 3))
    assert {r["k"] for r in made["epochs"]} == {2}
    assert phase_of_units(made)[:3] == [PHASES[1], PHASES[3], PHASES[3]]


def test_a_gated_schedule_need_not_fall_in_every_epoch():
    made = content(Cell("dsprites", "gated", 0), death=[0, 3, 6] + [None] * (UNITS - 3))
    for record, k in zip(made["epochs"], [20, 20, 16, 16, 12, 12, 12, 8, 8, 8], strict=True):
        record["k"] = k
    # Dead from the epochs with k = 20, 12 and 8 on; 8 is the last k although not k_end.
    assert phase_of_units(made)[:3] == [PHASES[1], PHASES[2], PHASES[3]]


def test_returned_units_are_counted_one_by_one():
    made = content(Cell("dsprites", "topk", 0))
    made["results"]["schedule"]["units"]["frequency"] = [0, 0, 0, 0.1] + [0.1] * 16
    made["results"]["units"]["frequency"] = [0.1, 0.1, 0, 0] + [0.1] * 16
    assert returned(made) == Returned(dead_before=3, back=2, died=1, dead_after=2)


@pytest.mark.parametrize(
    ("dead", "reconstruction", "mig", "expected"),
    [
        (0.049, 31.0, 0.09, Verdict(True, True, True)),
        (0.05, 31.0, 0.09, Verdict(False, True, True)),
        (0.01, 31.1, 0.09, Verdict(True, False, True)),
        (0.01, 29.0, 0.08, Verdict(True, True, False)),
    ],
)
def test_the_verdict_allows_the_larger_deviation(dead, reconstruction, mig, expected):
    # Uncured 30 +- 1 and 0.10 +- 0.001; cured +- 0.5 and +- 0.011.
    found = verdict(
        Spread(dead, 0.0, 3),
        (Spread(reconstruction, 0.5, 3), Spread(30.0, 1.0, 3)),
        (Spread(mig, 0.011, 3), Spread(0.1, 0.001, 3)),
    )
    assert found == expected and found.all == all(expected)


def test_one_seed_decides_no_verdict_on_reconstruction_and_mig():
    one, two = (Spread(1.0, None, 1), Spread(1.0, None, 1)), (Spread(1, None, 1), Spread(1, 0.1, 2))
    assert verdict(Spread(0.0, None, 1), one, two) == Verdict(True, None, True)
    assert not verdict(Spread(0.0, None, 1), one, two).all


def test_a_difference_counts_beyond_its_deviation():
    assert compared(spread([0.3, 0.4])) == 1
    assert compared(spread([-0.3, -0.4])) == -1
    assert compared(spread([-0.3, 0.4])) == 0
    assert compared(spread([0.4])) is None


def test_threshold_range_names_the_ends():
    shares = {"a": Spread(0.2, None, 1), "b": Spread(0.7, 0.1, 2), "c": Spread(0.1, None, 1)}
    assert threshold_range(shares) == (("c", 0.1), ("b", 0.7))


def test_differences_pair_seeds():
    found = grid(("topk", "dense"), seeds=3)
    del found[Cell("dsprites", "dense", 1)]
    for seed, share in ((0, 0.1), (1, 0.9), (2, 0.3)):
        found[Cell("dsprites", "topk", seed)]["results"]["schedule"]["dead"]["never"] = share
    difference = Measured(found).difference(
        "dsprites", "topk", "dense", lambda c: c["results"]["schedule"]["dead"]["never"]
    )
    # dense: 4/20 and 6/20 with seeds 0 and 2
    assert difference.n == 2 and difference.mean == pytest.approx((-0.1 + 0.0) / 2)


def test_a_cure_without_the_uncured_arm_has_no_verdict():
    found = grid(("topk", "auxk"))
    assert Measured(found).verdict("shapes3d", "auxk") == Verdict(False, True, True)
    for seed in (0, 1):
        del found[Cell("shapes3d", "topk", seed)]
    assert Measured(found).verdict("shapes3d", "auxk") is None


# -- conclusions -----------------------------------------------------------------------------------


def said(found):
    return "\n".join(text for texts in conclusions(Measured(found)).values() for text in texts)


def test_conclusions_follow_the_numbers():
    found = grid(("topk", "l1", "dense", "fixed"), dead=10)
    for cell, made in found.items():
        if cell.arm == "dense":
            made["results"]["schedule"]["dead"]["never"] = 0.1
    text = said(found)
    # 10/20 and 11/20 minus 0.1
    assert "Top-k minus dense is +42.5 ± 3.5 percentage points" in text
    assert "this part, 81 % of the dead units, is due to sparsification" in text
    assert "L0 under L1 ended within 10 % of k: 2.0" in text
    assert "Shapes3D has more dead units than dSprites under Top-k is neither seen" in text
    assert "no difference beyond the spread" in text
    assert "MIG under Top-k stays within the spread" in text
    # Before: units 0-9; after: units 0-2, in both seeds.
    assert "5 more epochs under Top-k brought 15 (71 %) of 21 dead units back" in text


def test_conclusions_turn_with_the_numbers():
    found = grid(("topk", "l1", "dense"), dead=4, l0=2.3)
    for cell, made in found.items():
        schedule = made["results"]["schedule"]
        if cell.arm == "dense":
            schedule["dead"]["never"] = 0.9 + 0.01 * cell.seed
            schedule["mig"]["score"] = 0.3
        elif cell.dataset == "shapes3d":
            schedule["dead"]["never"] = 0.8 if cell.arm == "topk" else 0.05
    text = said(found)
    assert "sparsification left fewer units dead" in text
    assert "ended more than 10 % away from k (seed 0: 2.3 for k = 2" in text
    assert "dSprites under Top-k is seen here: 80.0 ± 0.0 against 22.5 ± 3.5 %" in text
    assert "dSprites under L1 is reversed here: 5.0 ± 0.0 against 22.5 ± 3.5 %" in text
    assert "MIG under Top-k falls beyond the spread" in text
    assert "due to sparsification" not in text


def test_selectivity_is_compared_with_the_dense_control():
    found = grid(("topk", "dense"), dead=10, seeds=3)
    for cell, made in found.items():
        units = made["results"]["schedule"]["units"]
        if cell.arm == "dense":
            units["frequency"] = [0.5] * UNITS
    # Alive: 10, 9 and 8 units with the largest of 0, 0.01, ..., 0.19; all 20 in the control.
    words = "is 0.150 ± 0.005 under Top-k and 0.095 ± 0.000 in the dense control: higher"
    assert words in said(found)


def test_without_the_dense_control_nothing_is_put_down_to_sparsification():
    text = said(grid(("topk",)))
    assert "the part of the dead units that needs no sparsification is unknown" in text
    assert "minus dense" not in text and "L1" not in text


def test_early_deaths_are_named_when_they_are_most():
    death = [-1, 0, 0, 5] + [None] * (UNITS - 4)
    text = said(grid(("topk",), death=death))
    assert "So most of the deaths (75 %) came early" in text


def test_limits_name_what_was_changed():
    measured = Measured(grid(("topk",)))
    texts = " ".join(limits(measured, changed_settings(asked(["topk"]))))
    assert "epochs (the preset has 50)" in texts and "2 seeds" in texts
    assert "On 400 test images, a frequency below 0.0001 is the same as never" in texts


# -- reports ---------------------------------------------------------------------------------------


SOME = ("topk", "l1", "dense", "fixed", "auxk", "cosine", "code", "tied")


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    found = grid(SOME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_figures, "DOTS_PER_INCH", 30)
        written(folder, found, asked(SOME))
    return folder, found


def rows_of(markdown, first):
    """The cells of the table row that starts with this text."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_main_table_has_their_numbers_and_ours(complete):
    text = (complete[0] / "report.md").read_text()
    assert text.splitlines()[2] == "Complete: 32 cells."
    assert rows_of(text, "the study (%)") == [
        "34.4 ± 0.9", "62.7 ± 1.3", "41.7 ± 4.4", "90.6 ± 0.5",
    ]  # fmt: skip
    # 4/20 and 5/20; twice as much apart would be sd 7.1
    assert rows_of(text, "never active (%)") == ["22.5 ± 3.5"] * 4
    assert rows_of(text, "mean < 0.01 (%)") == ["32.5 ± 3.5"] * 4
    assert rows_of(text, "never active, z drawn (%)") == ["11.2 ± 1.8"] * 4
    assert rows_of(text, "never active after the further epochs (%)") == ["15.0 ± 0.0"] * 4
    assert rows_of(text, "seeds") == ["2"] * 4


def test_every_figure_is_there_and_shown(complete):
    folder, _ = complete
    text, html = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert names == {
        "panel_dsprites", "panel_shapes3d", "dead_by_epoch", "dead_by_k", "mig_by_k", "deaths",
        "selectivity", "pareto",
    }  # fmt: skip
    for name in names:
        assert f"(figures/{name}.png)" in text
        data = (folder / "figures" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG\r\n") and b"IEND" in data[-12:]
    assert html.count("data:image/png;base64,") == len(names)
    # The made-up cells have no checkpoints.
    assert text.count("left out: no checkpoint in") == 2


def test_the_page_is_whole_and_needs_no_other(complete):
    structure = parsed((complete[0] / "report.html").read_text())
    assert all(source.startswith("data:image/png;base64,") for source in structure.sources)
    for heading in ("Cures", "Protocol", "When units died", "5 more epochs"):
        assert heading in structure.text
    assert "prefers-color-scheme: dark" in structure.text


def test_the_command_asks_for_the_same_again():
    request = {**asked(["topk", "l1"]), "data": {"dsprites": "/a b/c.npz"}}
    options = _parser().parse_args(shlex.split(command(request))[1:])
    assert options.preset == "small" and options.seeds == 2
    assert options.arms == ["topk", "l1"] and options.datasets == list(SETS)
    assert options.data == ["dsprites=/a b/c.npz"] and "k_end=2" in options.settings


def test_cells_as_csv(complete):
    folder, found = complete
    with open(folder / "cells.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["dataset"], r["arm"], int(r["seed"])) for r in rows] == [
        (c.dataset, c.arm, c.seed) for c in found
    ]
    by_name = {(r["dataset"], r["arm"], r["seed"]): r for r in rows}
    row = by_name["dsprites", "topk", "1"]
    assert float(row["dead_never"]) == 0.25 and float(row["after_dead_never"]) == 0.15
    assert float(row["dead_sampled_never"]) == 0.125
    assert float(row["mig_low"]) == pytest.approx(0.09)
    assert float(row["untrained_mig"]) == 0.01 and float(row["mig_random"]) == 0.001
    assert float(row["mig_monte_carlo"]) == pytest.approx(0.12) and row["back"] == "2"
    assert row["settings"] == "" and row["backends"] == "topk=native"
    assert float(row["died_while_k_fell"]) == 0.15
    row = by_name["shapes3d", "tied", "0"]
    assert "placement=code tied=True" in row["settings"] and "epochs=0" in row["settings"]


def test_units_and_epochs_as_csv(complete):
    folder, found = complete
    with open(folder / "units.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found) * UNITS
    first, last = rows[0], rows[UNITS - 1]
    assert (first["frequency"], first["last_active_epoch"], first["phase"]) == (
        "0.0", "4", "while k fell",
    )  # fmt: skip
    assert (last["frequency"], last["last_active_epoch"], last["phase"]) == ("0.25", "", "")
    assert last["factor"] == "shape" and float(last["selectivity"]) == pytest.approx(0.19)
    with open(folder / "epochs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(made["epochs"]) for made in found.values())
    assert rows[0]["epoch"] == "1" and rows[0]["mig"] == "0.1" and rows[1]["mig"] == ""


def test_cures_have_verdicts(tmp_path, quick):
    found = grid(("topk", "auxk", "resample"), datasets=("dsprites",))
    for cell, made in found.items():
        schedule = made["results"]["schedule"]
        schedule["reconstruction"] += cell.seed
        if cell.arm == "auxk":
            schedule["dead"]["never"] = 0.02
        if cell.arm == "resample":
            schedule["dead"]["never"] = 0.02
            schedule["reconstruction"] += 5
    text = written(tmp_path, found, asked(("topk", "auxk", "resample"), ("dsprites",)))
    assert rows_of(text, "auxk")[-3:] == ["yes", "yes", "yes"]
    assert rows_of(text, "resample")[-3:] == ["yes", "no", "yes"]
    assert "no worse than uncured on dSprites: auxk." in text


def test_an_incomplete_report_says_so_first(tmp_path, quick):
    found = grid(("topk", "dense"))
    del found[Cell("shapes3d", "dense", 1)], found[Cell("dsprites", "dense", 0)]
    why = "<b>out of</b> memory | `x`\n*and* [more](http://a.b)"
    text = written(tmp_path, found, asked(("topk", "dense")), {"dsprites-dense-0": why}, total=8)
    assert text.splitlines()[2] == ("> Incomplete: 6 of 8 cells. Not finished: shapes3d-dense-1.")
    assert r"dsprites-dense-0 failed: \<b>out of\</b> memory \| \`x\` \*and\* \[more\]" in text
    html = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;out of&lt;/b&gt;" in html and "<b>" not in html
    assert parsed(html).sources and "http://a.b" in parsed(html).text


def test_without_estimates_during_training_there_is_no_curve_of_mig(tmp_path, quick):
    found = grid(("topk",), ("dsprites",))
    for made in found.values():
        for record in made["epochs"]:
            record.pop("mig", None)
    text = written(tmp_path, found, asked(("topk",), ("dsprites",)))
    assert "mig_by_k" not in text and "MIG was not estimated during training" in text
    assert rows_of(text, "Top-k | dSprites")[1] == "0.100 ± 0.000"


def test_many_missing_cells_are_counted_by_arm(tmp_path, quick):
    arms = ("topk", "l1", "dense", "fixed")
    text = written(tmp_path, grid(("topk",)), asked(arms, seeds=3), total=24)
    # Of 3 seeds on 2 sets, Top-k has 2 seeds.
    assert text.splitlines()[2].endswith(
        "Not finished: topk (2 cells), l1 (6 cells), dense (6 cells), fixed (6 cells)."
    )


def test_a_revival_that_cannot_begin_is_named(tmp_path, quick):
    found = grid(("topk", "auxk"), ("dsprites",))
    request = asked(("topk", "auxk"), ("dsprites",))
    assert "It did nothing" not in written(tmp_path, found, request)
    for made in found.values():
        made["config"]["dead_after"] = 10 * made["config"]["images"]
    assert "after 30720 images without activity" in written(tmp_path, found, request)


def test_one_seed_has_no_spread(tmp_path, quick):
    found = grid(("topk", "dense", "auxk"), seeds=1)
    text = written(tmp_path, found, asked(("topk", "dense", "auxk"), seeds=1))
    plain = "\n".join(line for line in text.splitlines() if "the study (%)" not in line)
    assert plain.count("±") == 1  # where the sign is explained
    assert "with 1 seed there is no spread" in text
    assert rows_of(text, "auxk")[-3:] == ["no", "not decided (1 seed)", "not decided (1 seed)"]


def test_l1_alone_on_one_set(tmp_path, quick):
    text = written(tmp_path, grid(("l1",), ("shapes3d",)), asked(("l1",), ("shapes3d",)))
    assert "Left out, since not run: Top-k." in text
    assert "Shapes3D: left out, since Top-k was not run." in text
    assert "Left out: no cure was run." in text and "dSprites" not in text.split("Protocol")[0]
    assert rows_of(text, "the study (%)") == ["90.6 ± 0.5"]


@pytest.mark.parametrize(("dead", "share"), [(0, "0.0"), (UNITS, "100.0")])
def test_no_unit_and_every_unit_dead(tmp_path, quick, dead, share):
    found = {
        cell: content(cell, dead=dead, after=dead)
        for cell in cells(("dsprites",), ("topk", "dense"), range(2))
    }
    text = written(tmp_path, found, asked(("topk", "dense"), ("dsprites",)))
    assert rows_of(text, "never active (%)") == [f"{share} ± 0.0"]
    words = "no unit was dead after the schedule" if dead == 0 else "brought none of 40 dead units"
    assert words in text
    assert ("none alive" in text) == (dead == UNITS)


def test_controls_alone(tmp_path, quick):
    text = written(tmp_path, grid(("cosine",), ("dsprites",)), asked(("cosine",), ("dsprites",)))
    assert "neither an arm of the study nor a control was run" in text
    assert rows_of(text, "cosine")[0] == "schedule cosine"


def test_only_rendered_images_are_called_rendered(tmp_path, quick):
    found = grid(("topk",))
    for cell, made in found.items():
        made["config"]["data"] = "/data/file" if cell.dataset == "shapes3d" else None
    text = written(tmp_path, found, asked(("topk",)))
    assert "The images of dSprites are rendered, compatible with the published files" in text
    assert "The images of dSprites are rendered, compatible ones" in text
    for made in found.values():
        made["config"]["data"] = "/data/file"
    assert "are rendered, comp" not in written(tmp_path, found, asked(("topk",)))


def test_a_second_report_replaces_the_first(tmp_path, quick):
    request = asked(("topk", "auxk"), ("dsprites",))
    written(tmp_path, grid(("topk", "auxk"), ("dsprites",)), request)
    assert (tmp_path / "figures" / "pareto.png").exists()
    text = written(tmp_path, grid(("topk",), ("dsprites",)), request, total=4)
    assert not (tmp_path / "figures" / "pareto.png").exists() and "pareto" not in text
    assert (tmp_path / "cells.csv").read_text().count("\n") == 3


def test_no_cell_at_all_is_an_empty_report(tmp_path):
    text = written(tmp_path, {}, asked(("topk",)), {"dsprites-topk-0": "broken"}, total=4)
    assert "Incomplete: 0 of 4 cells" in text and "dsprites-topk-0 failed: broken" in text


@pytest.mark.parametrize("place", ["death_epoch", "schedule", "untrained"])
def test_a_cell_of_another_version_is_named(tmp_path, place):
    found = grid(("topk",))
    del found[Cell("shapes3d", "topk", 1)]["results"][place]
    with pytest.raises(RunError, match=f"cell shapes3d-topk-1 lacks '{place}' in its results"):
        written(tmp_path, found, asked(("topk",)))


def test_a_cell_with_lost_epochs_is_named(tmp_path):
    found = grid(("topk",))
    found[Cell("dsprites", "topk", 0)]["epochs"].pop()
    with pytest.raises(RunError, match="cell dsprites-topk-0 has 14 epoch records, not 15"):
        written(tmp_path, found, asked(("topk",)))


# -- figures ---------------------------------------------------------------------------------------


def lines_of(panel):
    return {line.get_label(): line for line in panel.get_lines()}


def test_dead_units_by_epoch_and_by_k_are_means_in_percent(figures):
    measured = Measured(grid(("topk", "dense")))
    panel = figures.dead_by_epoch(measured).axes[0]
    line = lines_of(panel)["Top-k"]
    assert list(line.get_xdata()) == list(range(1, EPOCHS + EXTRA + 1))
    # Seeds 0 and 1 have 4 and 5 of 20 units dead, in proportion to the epoch.
    assert line.get_ydata()[-1] == pytest.approx(22.5 * 14 / 15)
    panel = figures.dead_by_k(measured).axes[1]
    line = lines_of(panel)["Top-k"]
    assert list(line.get_xdata()) == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert line.get_ydata()[0] == pytest.approx(22.5 * 9 / 15)
    assert panel.get_xlim()[0] > panel.get_xlim()[1]
    control = lines_of(panel)["dense, last epoch"]
    assert control.get_ydata()[0] == pytest.approx(22.5 * 9 / 10)


def test_mig_by_k_has_the_levels_of_the_controls(figures):
    measured = Measured(grid(("topk", "dense"), mig=0.2))
    lines = lines_of(figures.mig_by_k(measured).axes[0])
    assert list(lines["Top-k"].get_xdata()) == [4, 8, 12, 16, 20]
    levels = {name: line.get_ydata()[0] for name, line in lines.items() if name != "Top-k"}
    assert levels == pytest.approx(
        {"dense, last epoch": 0.2, "untrained": 0.01, "random code": 0.001}
    )


def test_the_heat_map_has_a_row_for_each_arm(figures):
    figure = figures.panel_map(Measured(grid(("topk", "auxk"), dead=4)), "dsprites")
    shown = figure.axes[0].get_images()[0].get_array()
    assert shown.shape == (2, 8)
    assert shown[0].tolist() == pytest.approx([22.5] * 6 + [32.5, 11.25])


def test_deaths_are_stacked_by_epoch(figures):
    death = [-1, -1, 0, 8] + [None] * (UNITS - 4)
    figure = figures.deaths(Measured(grid(("topk",), ("dsprites",), death=death)))
    bars = {
        (round(bar.get_x() + bar.get_width() / 2), phase.get_label()): bar.get_height()
        for phase in figure.axes[0].containers
        for bar in phase
        if bar.get_height()
    }
    # Last active after epochs 1 and 9 (from 1): without activity from 2 and 10 on.
    assert bars == {(1, "early"): 2, (2, "early"): 1, (10, "at the final k"): 1}


def test_every_arm_lies_inside_the_pareto_plot(figures):
    found = grid(("topk", "dense", "auxk"))
    for cell, made in found.items():
        schedule = made["results"]["schedule"]
        schedule["reconstruction"] += cell.seed
        schedule["dead"]["never"] = 0.1 if cell.dataset == "dsprites" else 0.9
    figure = figures.pareto(Measured(found))
    assert len(figure.axes) == 2
    for panel in figure.axes:
        low, high = panel.get_ylim()
        points = [container[0] for container in panel.containers]
        assert len(points) == 3
        for point in points:
            assert low < point.get_ydata()[0] < high and point.get_xdata()[0] == 30.5


# -- documents and tables --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b _c_ 2 < 3 & 4 <i>", r"a_b \_c\_ 2 < 3 & 4 \<i>"),
        ("1. no list", r"1\. no list"),
        ("2.0 ± 1", "2.0 ± 1"),
        ("# no heading", r"\# no heading"),
        ("two\nlines &amp; more", r"two lines \&amp; more"),
    ],
)
def test_markdown_shows_text_as_it_is(text, expected):
    document = report_document.Document([report_document.Paragraph(text)])
    assert report_document.markdown(document) == expected + "\n"


def test_csv_fields_survive(tmp_path):
    rows = [{"a": 'x,"y"\nz', "b": 1}, {"a": "ä", "c": None}]
    from sparsekern.studies.vae_sae.report_csv import table_bytes

    found = list(csv.DictReader(io.StringIO(table_bytes(rows).decode(), newline="")))
    assert found == [{"a": 'x,"y"\nz', "b": "1", "c": ""}, {"a": "ä", "b": "", "c": ""}]


# -- pictures --------------------------------------------------------------------------------------


def tiny(dataset):
    return VAESAEConfig(
        dataset=dataset, images=5, eval_images=3, test_images=9, side=32, epochs=1, units=12,
        k_start=12, k_end=4, width=1, device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("dataset", SETS)
def test_pictures_show_the_test_images_of_the_run(dataset, tmp_path):
    config = tiny(dataset)
    expected = read(config, torch.device("cpu")).test.images
    images = report_pictures.test_images(config, 9)
    assert torch.equal(images, expected)
    channels = images.shape[1]
    model = Trained(make_model(config, channels, 0.5), config)
    with torch.no_grad():
        model.vae.decoder[-1].bias += 0.25  # unlike what make_model gives
    place = cell_folder(tmp_path, Cell(dataset, "topk", 0))
    place.mkdir(parents=True)
    write_checkpoint(place, 1, model_tensors(model), {})
    seen = report_pictures.seen_by({"config": asdict(config), "results": {"k": 4}}, place)
    assert seen.images.shape == (6, channels, 32, 32) == seen.reconstructions.shape
    assert seen.traversals.shape == (5, 7, channels, 32, 32)
    assert seen.divergences == sorted(seen.divergences, reverse=True)
    model.vae.eval().k = 4
    with torch.no_grad():
        output = model.vae(images.float() / 255, sample=False)
    # Another batch size may sum in another order.
    assert torch.allclose(seen.reconstructions, output.logits[:6].sigmoid(), atol=1e-6)
    for draw in (report_pictures.reconstructions, report_pictures.traversals):
        assert draw(seen, dataset).startswith(b"\x89PNG")


def test_a_damaged_checkpoint_is_told_in_the_report(tmp_path, quick):
    found = grid(("topk",), ("dsprites",))
    place = cell_folder(tmp_path, Cell("dsprites", "topk", 0))
    place.mkdir(parents=True)
    (place / "checkpoint.json").write_text("{")
    text = written(tmp_path, found, asked(("topk",), ("dsprites",)))
    assert f"dSprites: left out: checkpoint in {place} is damaged" in text
