"""Reports on made-up cells: text, page, tables."""

import csv
import io
import shlex
from html.parser import HTMLParser

import pytest
from made_up_cells import EPOCHS, SETS, UNITS, asked, content, grid, written

from sparsekern.cli.command import _parser
from sparsekern.studies.reproduction import cell_folder
from sparsekern.studies.reproduction import document as report_document
from sparsekern.studies.vae_sae.grid import Cell, cells
from sparsekern.studies.vae_sae.report import figures as report_figures
from sparsekern.studies.vae_sae.report import pictures as report_pictures
from sparsekern.studies.vae_sae.report.sections.overview import command
from sparsekern.training import RunError


@pytest.fixture
def quick(monkeypatch):
    """No drawing: figures are drawn elsewhere."""
    monkeypatch.setattr(report_figures, "as_png", lambda figure: b"a figure")
    monkeypatch.setattr(report_pictures, "as_png", lambda figure: b"a picture")


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


def rows_of(markdown, first, after=""):
    """The cells of the table row that starts with this text, the first after some text."""
    markdown = markdown[markdown.index(after) :]
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


def test_every_arm_is_in_one_table(complete):
    text = (complete[0] / "report.md").read_text()
    for arm in ("Top-k", "L1", "fixed k", "auxk", "tied"):
        found = rows_of(text, arm, "## Every arm")
        assert found[:3] == ["dSprites", "22.5 ± 3.5", "30.0 ± 0.0"]
        assert found[3:] == ["0.100 ± 0.000", "7.50 ± 0.00", "2.0 ± 0.0", "2"]
    # k goes 20 18 16 14 12 10 and meets the 11 active units in epoch 6.
    row = rows_of(text, "Top-k", "L0 before the cut")
    assert row == ["dSprites", "11.0 ± 0.0", "6", "10", "11.0 ± 0.0", "2.0 ± 0.0"]
    assert rows_of(text, "dense", "L0 before the cut")[2:4] == ["never", ""]


def test_when_units_died_adds_up_in_its_tables(complete):
    text = (complete[0] / "report.md").read_text()
    # 4 and 5 of 20 died before the cut in every arm; nothing is in excess of the control.
    row = rows_of(text, "Top-k", "Never alive: active")
    assert row[-4:] == ["22.5 ± 3.5", "0.0 ± 0.0", "22.5 ± 3.5", "0.0 ± 0.0"]
    row = rows_of(text, "Top-k", "The whole and its parts")
    assert row == ["dSprites", "22.5 ± 3.5", "22.5", "0.0", "+0.0 (-15.2 to +15.2)"]


def test_every_figure_is_there_and_shown(complete):
    folder, _ = complete
    text, html = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert names == {
        "panel_dsprites", "panel_shapes3d", "dead_by_epoch", "dead_by_k", "mig_by_k", "deaths",
        "selectivity", "pareto", "active_units",
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
    # A mean and its deviation stay on one line.
    assert "22.5\xa0±\xa03.5" in structure.text


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
    assert float(row["died_before_k_cut"]) == 0.25 and row["cut_epoch"] == "6"
    row = by_name["shapes3d", "tied", "0"]
    assert "placement=code tied=True" in row["settings"] and "epochs=0" in row["settings"]


def test_units_and_epochs_as_csv(complete):
    folder, found = complete
    with open(folder / "units.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found) * UNITS
    first, last = rows[0], rows[UNITS - 1]
    assert (first["frequency"], first["last_active_epoch"], first["phase"]) == (
        "0.0", "4", "before k cut",
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
    rows = {arm: rows_of(text, arm, "verdicts by the rule") for arm in ("auxk", "resample")}
    # t(2) = 4.303 with s = 0.7071, that of either arm / sqrt(2) * sqrt(2).
    same, worse = "+0.0 (-3.0 to +3.0)", "+5.0 (+2.0 to +8.0)"
    zero = "+0.000 (+0.000 to +0.000)"
    assert rows["auxk"] == ["yes", same, "yes", zero, "yes"]
    assert rows["resample"] == ["yes", worse, "no", zero, "yes"]
    shares = rows_of(text, "Top-k, uncured", "with other definitions")
    assert shares[:3] == ["22.5 ± 3.5"] * 3 and "0.100 ± 0.000" in shares
    assert "worse than its means, on dSprites: auxk." in text


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
    assert rows_of(text, "Top-k | dSprites", "Monte Carlo")[1] == "0.100 ± 0.000"


def test_many_missing_cells_are_counted_by_arm(tmp_path, quick):
    arms = ("topk", "l1", "dense", "fixed")
    text = written(tmp_path, grid(("topk",)), asked(arms, seeds=3), total=24)
    # Of 3 seeds on 2 sets, Top-k has 2 seeds.
    assert text.splitlines()[2].endswith(
        "Not finished: 2 of topk, 6 of l1, 6 of dense, 6 of fixed."
    )


def test_a_revival_that_cannot_begin_is_named(tmp_path, quick):
    found = grid(("topk", "auxk"), ("dsprites",))
    request = asked(("topk", "auxk"), ("dsprites",))
    assert "It did nothing" not in written(tmp_path, found, request)
    for made in found.values():
        images = made["config"]["images"]
        made["config"]["dead_after"] = 10 * images
    assert f"after {10 * images} images without activity" in written(tmp_path, found, request)


def test_one_seed_has_no_spread(tmp_path, quick):
    found = grid(("topk", "dense", "auxk"), seeds=1)
    text = written(tmp_path, found, asked(("topk", "dense", "auxk"), seeds=1))
    plain = "\n".join(line for line in text.splitlines() if "the study (%)" not in line)
    assert plain.count("±") == 1  # where the sign is explained
    assert "fewer than 2 seeds, so no verdict" in text and "no difference shown" not in text
    undecided = "not decided (1 seed)"
    found = rows_of(text, "auxk", "verdicts by the rule")
    assert found == ["no", "+0.0", undecided, "+0.000", undecided]


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
    words = (
        "no unit was dead after the schedule" if dead == 0 else "none of 40 dead units came back"
    )
    assert words in text
    assert ("none alive" in text) == (dead == UNITS)


def test_a_run_of_one_epoch_and_one_more(tmp_path, quick):
    cell = Cell("dsprites", "topk", 0)
    made = content(cell)
    made["config"] |= {"epochs": 1, "extra_epochs": 1}
    made["epochs"] = made["epochs"][EPOCHS - 1 :][:2]
    made["results"]["death_epoch"] = [-1] * 4 + [None] * (UNITS - 4)
    made["epochs"][0]["eval_dead"] = 0.2
    text = written(tmp_path, {cell: made}, asked(("topk",), ("dsprites",), seeds=1))
    assert text.splitlines()[2] == "Complete: 1 cell." and "Preset small: 1 cell (" in text
    assert "## 1 more epoch\n" in text and "In 1 more epoch under Top-k" in text
    # k is the final one from the first epoch on.
    assert "k cuts from the first epoch on" in text
    row = rows_of(text, "Top-k", "Never alive: active")
    assert row == ["dSprites", "20.0", "k cuts at once", "20.0", "20.0", "0.0", "0.0"]


def test_drawing_z_has_no_row_where_the_sparse_layer_lies_before_it(tmp_path, quick):
    found = grid(("topk",), ("dsprites",))
    request = asked(("topk",), ("dsprites",))
    assert "z drawn" not in written(tmp_path, found, request)
    for made in found.values():
        made["config"]["placement"] = "decoder"
    text = written(tmp_path, found, request)
    assert rows_of(text, "never active, z drawn (%)") == ["11.2 ± 1.8"]


def test_controls_alone(tmp_path, quick):
    text = written(tmp_path, grid(("cosine",), ("dsprites",)), asked(("cosine",), ("dsprites",)))
    assert "neither an arm of the study nor a control was run" in text
    assert rows_of(text, "cosine", "Sensitivity")[0] == "schedule cosine"


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


@pytest.mark.parametrize("place", ["death_epoch", "death_epoch_after", "schedule", "untrained"])
def test_a_cell_of_another_version_is_named(tmp_path, place):
    found = grid(("topk",))
    del found[Cell("shapes3d", "topk", 1)]["results"][place]
    words = f"cell shapes3d-topk-1 lacks '{place}' in its results: .* remove its results.json"
    with pytest.raises(RunError, match=words):
        written(tmp_path, found, asked(("topk",)))


def test_a_cell_with_lost_epochs_is_named(tmp_path):
    found = grid(("topk",))
    found[Cell("dsprites", "topk", 0)]["epochs"].pop()
    with pytest.raises(RunError, match="cell dsprites-topk-0 has 14 epoch records, not 15"):
        written(tmp_path, found, asked(("topk",)))


def test_a_damaged_checkpoint_is_told_in_the_report(tmp_path, quick):
    found = grid(("topk",), ("dsprites",))
    place = cell_folder(tmp_path, Cell("dsprites", "topk", 0))
    place.mkdir(parents=True)
    (place / "checkpoint.json").write_text("{")
    text = written(tmp_path, found, asked(("topk",), ("dsprites",)))
    assert f"dSprites: left out: checkpoint in {place} is damaged" in text


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
    from sparsekern.studies.reproduction import table_bytes

    found = list(csv.DictReader(io.StringIO(table_bytes(rows).decode(), newline="")))
    assert found == [{"a": 'x,"y"\nz', "b": "1", "c": ""}, {"a": "ä", "b": "", "c": ""}]
