"""Figures and pictures of a report show the numbers and the images of the cells."""

from dataclasses import asdict

import pytest
import torch
from made_up_cells import EPOCHS, EXTRA, SETS, UNITS, grid

from sparsekern.studies.reproduction import cell_folder
from sparsekern.studies.vae_sae.config import VAESAEConfig
from sparsekern.studies.vae_sae.grid import Cell
from sparsekern.studies.vae_sae.images import read
from sparsekern.studies.vae_sae.report import figures as report_figures
from sparsekern.studies.vae_sae.report import pictures as report_pictures
from sparsekern.studies.vae_sae.report.measurements import Measured
from sparsekern.studies.vae_sae.task import CheckpointedModel, make_model
from sparsekern.training.checkpoints import model_tensors, write_checkpoint


@pytest.fixture
def figures(monkeypatch):
    """The module of figures, whose functions give them undrawn."""
    monkeypatch.setattr(report_figures, "as_png", lambda figure: figure)
    return report_figures


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
    cells = grid(("topk", "dense"), mig=0.2)
    for made in cells.values():
        for record in made["epochs"]:
            record |= {"mig_low": 0.12, "mig_high": 0.13}  # above the estimates of 0.1
    measured = Measured(cells)
    found = figures.mig_by_k(measured).axes[0]
    lines = lines_of(found)
    # The mean, its bars, and a line for each of two seeds.
    (bars,) = found.collections
    ends = {tuple(y for _, y in segment) for segment in bars.get_segments()}
    assert ends == {(0.12, 0.13)} and list(lines["Top-k"].get_ydata()) == [0.1] * 5
    drawn = [line for line in found.get_lines() if list(line.get_xdata()) == [4, 8, 12, 16, 20]]
    assert len(drawn) == 3 and drawn[1].get_linewidth() < drawn[0].get_linewidth()
    names = ("dense, last epoch", "untrained", "random code")
    levels = {name: lines[name].get_ydata()[0] for name in names}
    assert levels == pytest.approx(
        {"dense, last epoch": 0.2, "untrained": 0.01, "random code": 0.001}
    )


def test_the_heat_map_has_a_row_for_each_arm(figures):
    figure = figures.panel_map(Measured(grid(("topk", "auxk"), dead=4)), "dsprites")
    shown = figure.axes[0].get_images()[0].get_array()
    assert shown.shape == (2, 7)
    assert shown[0].tolist() == pytest.approx([22.5] * 6 + [32.5])
    # Where z lies before a sparse layer, drawing it makes a column.
    figure = figures.panel_map(Measured(grid(("topk", "code"), dead=4)), "dsprites")
    assert figure.axes[0].get_images()[0].get_array()[0, -1] == pytest.approx(11.25)


def test_deaths_are_stacked_by_epoch(figures):
    death = [-1, -1, 0, 8] + [None] * (UNITS - 4)
    figure = report_figures.deaths(Measured(grid(("topk",), ("dsprites",), death=death)))
    panel = figure.axes[0]
    bars = {
        (round(bar.get_x() + bar.get_width() / 2), phase.get_label()): bar.get_height()
        for phase in panel.containers
        for bar in phase
        if bar.get_height()
    }
    # Last active after epochs 1 and 9 (from 1): without activity from 2 and 10 on.
    assert bars == {(1, "never alive"): 2, (2, "before k cut"): 1, (10, "while k cut"): 1}
    # The schedule only, and a line before the epoch in which k begins to cut.
    assert panel.get_xlim() == (0.5, EPOCHS + 0.5)
    assert [line.get_xdata()[0] for line in panel.get_lines()] == [5.5]


def test_active_units_and_the_strength_lie_above_each_other(figures):
    found = grid(("topk", "l1", "dense"))
    figure = report_figures.active_units(Measured(found))
    above, below = figure.axes[0], figure.axes[2]
    lines = lines_of(above)
    assert list(lines["Top-k"].get_ydata())[:6] == [11, 11, 11, 11, 11, 10]
    assert list(lines["k"].get_ydata())[:2] == [20, 18] and len(lines["dense"].get_xdata()) == 10
    assert list(below.get_lines()[0].get_ydata()) == [0.5] * (EPOCHS + EXTRA)
    assert below.get_yscale() == "log"
    only = {cell: made for cell, made in found.items() if cell.arm != "l1"}
    assert len(report_figures.active_units(Measured(only)).axes) == 2


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
    model = CheckpointedModel(make_model(config, channels, 0.5), config)
    with torch.no_grad():
        model.vae.decoder[-1].bias += 0.25  # unlike what make_model gives
    place = cell_folder(tmp_path, Cell(dataset, "topk", 0))
    place.mkdir(parents=True)
    write_checkpoint(place, 1, model_tensors(model), {})
    seen = report_pictures.picture_run({"config": asdict(config), "results": {"k": 4}}, place)
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
