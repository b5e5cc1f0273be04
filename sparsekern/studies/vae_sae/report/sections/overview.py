"""The sections of a report on what was run, the main table, units, pictures, and what follows."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .....data import DataError
from .....training.checkpoints import CheckpointError
from ....reproduction import calls_of, cell_folder
from ....reproduction.document import Code, Document, Heading, Items, Paragraph, Table
from ...grid import STUDY, Cell
from ...published import DEAD_UNITS
from .. import figures, pictures
from ..conclusions import conclusions
from ..conclusions.limits import changed_settings, is_rendered, limits
from ..measurements import (
    Measured,
    alive_factors,
    at_end_of_schedule,
    draws_matter,
    median_of,
    never_active_drawn,
)
from ..names import SETS, definition, named
from ..raw_results import FACTORS, protocol_rows
from ..statistics import Spread, counted, spread


def command(asked: Mapping[str, Any], call: Mapping[str, Any] | None = None) -> str:
    """Write the command line that asks for a reproduction again, or for one of its calls."""
    call = asked if call is None else call
    words = ["sparsekern", "reproduce", "vae-sae", "--preset", asked["preset"]]
    words += ["--datasets", *call["datasets"], "--arms", *call["arms"]]
    words += ["--seeds", str(call["seeds"])]
    if asked["data"]:
        words += ["--data", *(f"{name}={path}" for name, path in asked["data"].items())]
    if asked["overrides"]:
        words += ["--set", *(f"{name}={value}" for name, value in asked["overrides"].items())]
    return shlex.join([*words, "--out", "FOLDER"])


def what_was_run(
    document: Document, measured: Measured, asked: Mapping[str, Any], facts: Mapping[str, str]
) -> None:
    """Add the paragraph on the runs and the command; facts: versions and date, by name."""
    results = [content["results"] for content in measured.cells.values()]
    data = []
    for dataset in measured.datasets:
        cells = [c for cell, c in measured.cells.items() if cell.dataset == dataset]
        for source in dict.fromkeys(content["results"]["data"] for content in cells):
            data.append(f"{SETS[dataset]}: {source}")
    drawn = [SETS[dataset] for dataset in measured.datasets if is_rendered(measured, dataset)]
    rendered = (
        f" The images of {' and '.join(drawn)} are rendered, compatible with the published files, "
        "not those files themselves."
        if drawn
        else ""
    )
    devices = sorted({result["device"] for result in results})
    backends = sorted({backend for result in results for backend in result["backends"].values()})
    tests = sorted({result["test_images"] for result in results})
    document.add(
        Paragraph(
            f"Preset {asked['preset']}: {counted(len(measured.cells), 'cell')} "
            f"({', '.join(map(named, measured.arms))}; up to {counted(asked['seeds'], 'seed')}). "
            f"Data: {'; '.join(data)}.{rendered} Measured on {' or '.join(map(str, tests))} test "
            f"images, on {' and '.join(devices)}, sparse operations by {' and '.join(backends)}; "
            f"{sum(result['seconds'] for result in results):.0f} seconds of training in all. "
            + ", ".join(f"{name} {value}" for name, value in facts.items())
            + ". In tables, ± is the standard deviation over seeds; it is absent for 1 seed."
        ),
        *(Code(command(asked, call)) for call in calls_of(asked)),
    )


def main_table(document: Document, measured: Measured) -> None:
    """Add the published rates beside ours, and the panel."""
    document.add(Heading("Dead units: the study's numbers and ours"))
    columns = measured.columns(STUDY)
    if columns:
        shares = {column: measured.panel(column[1], column[0]) for column in columns}
        contents = {column: list(measured.of(column[1], column[0]).values()) for column in columns}

        def row(name: str, get: Callable[[tuple[str, str]], str]) -> list[str]:
            return [name, *(get(column) for column in columns)]

        def ours(get: Callable[[Any], float], text: Callable[[Spread], str]) -> Any:
            return lambda column: text(spread(map(get, contents[column])))

        def of_panel(name: str) -> Callable[[tuple[str, str]], str]:
            return lambda column: shares[column][name].percent()

        names = list(next(iter(shares.values())))
        drawn = [row("never active, z drawn (%)", ours(never_active_drawn, Spread.percent))]
        if not draws_matter(measured):
            drawn = []
        rows = [
            row("the study (%)", lambda c: "{} ± {}".format(*DEAD_UNITS[c])),
            *(row(f"{definition(n)} (%)", of_panel(n)) for n in names),
            *drawn,
            row(
                "never active after the further epochs (%)",
                ours(lambda c: c["results"]["dead"]["never"], Spread.percent),
            ),
            row("L0 (units per image)", ours(at_end_of_schedule("l0"), Spread.text)),
            row("k", ours(at_end_of_schedule("k"), lambda s: s.text(0))),
            row("seeds", lambda c: str(len(contents[c]))),
        ]  # fmt: skip
        head = ["", *(f"{named(arm)}, {SETS[dataset]}" for arm, dataset in columns)]
        document.add(
            Table(
                head, rows,
                "Share of dead units at the end of the schedule by definition, on the test images "
                "with z at its posterior mean. Mean activations are in the units of the "
                "activation. The study's definition is not public.",
            )
        )  # fmt: skip
    _add_missing(document, measured, STUDY)
    for dataset in measured.datasets:
        document.picture(
            f"panel_{dataset}",
            figures.panel_map(measured, dataset),
            f"{SETS[dataset]}: dead units (%, mean over seeds) of each arm under each definition, "
            "at the end of the schedule.",
        )


def _add_missing(document: Document, measured: Measured, arms: tuple[str, ...]) -> None:
    """Say which arms were not run."""
    absent = [named(arm) for arm in arms if arm not in measured.arms]
    if absent:
        document.add(Paragraph(f"Left out, since not run: {', '.join(absent)}."))


def local_interpretability(document: Document, measured: Measured) -> None:
    """Add selectivity and factors of living units."""
    document.add(Heading("What living units stand for"))
    document.picture(
        "selectivity",
        figures.selectivity(measured),
        "Selectivity of a unit: the largest share of a factor's entropy that it tells, by "
        "histograms of its activations on the test images. Units of all seeds that are active at "
        "all; dots are medians of these. A unit tells at most the entropy of its own activity, "
        "which is small for a rare one: part of any fall is that units get rarer.",
    )
    for dataset in measured.datasets:
        names = FACTORS[dataset]
        rows = []
        for label, _, _, units in figures.unit_sets(measured, dataset):
            counts = [alive_factors(unit, len(names)) for unit in units]
            means = [spread(values).text(0) for values in zip(*counts, strict=True)]
            alive = any(frequency > 0 for unit in units for frequency in unit["frequency"])
            middle = spread(median_of(unit) for unit in units).text(3) if alive else "none alive"
            rows.append([label, middle, *means])
        document.add(
            Table(
                ["", "median", *names],
                rows,
                f"{SETS[dataset]}: median selectivity of living units (mean over seeds), and how "
                "many of them stand for each factor (mean over seeds).",
            )
        )


def reconstructions(document: Document, measured: Measured, folder: Path) -> None:
    """Add reconstructions and traversals of one Top-k cell of each data set."""
    document.add(Heading("Reconstructions and traversals"))
    for dataset in measured.datasets:
        cells = measured.of(dataset, "topk")
        if not cells:
            document.add(Paragraph(f"{SETS[dataset]}: left out, since Top-k was not run."))
            continue
        seed, content = next(iter(cells.items()))
        run_path = cell_folder(folder, Cell(dataset, "topk", seed))
        try:
            shown = pictures.picture_run(content, run_path)
        except (CheckpointError, DataError) as error:
            document.add(Paragraph(f"{SETS[dataset]}: left out: {error}."))
            continue
        of = f"{SETS[dataset]}, Top-k, seed {seed}, after all epochs"
        document.picture(
            f"reconstructions_{dataset}",
            pictures.reconstructions(shown, dataset),
            f"{of}: test images and what the model makes of their mean code.",
        )
        document.picture(
            f"traversals_{dataset}",
            pictures.traversals(shown, dataset),
            f"{of}: the first image's code with one latent from -2 to 2 (standard deviations of "
            "the prior); the latents with the largest mean KL, in nats per image.",
        )


def what_follows(document: Document, measured: Measured, asked: Mapping[str, Any]) -> None:
    """Add what follows, and what does not."""
    document.add(
        Heading("What can be concluded, and what cannot"),
        Paragraph(
            "These sentences are chosen by the numbers. A difference between arms is given with "
            "its 95 % interval by Welch's t over the seeds, a change within runs with Student's, "
            "and called one where the interval lies on one side of 0. Both take the seeds' values "
            "as normal, which so few cannot show, and no interval allows for the number of "
            'comparisons: about 1 in 20 of them shows a difference where there is none. "No '
            'difference shown" is not "no difference".'
        ),
    )
    for title, texts in conclusions(measured).items():
        document.add(Heading(title, 3), Items(texts))
    document.add(
        Heading("What cannot be concluded", 3), Items(limits(measured, changed_settings(asked)))
    )


def protocol(document: Document, measured: Measured, asked: Mapping[str, Any]) -> None:
    """Add every field of the config."""
    first = "topk" if "topk" in measured.arms else measured.arms[0]
    configs = [c["config"] for cell, c in measured.cells.items() if cell.arm == first]
    changed = changed_settings(asked)
    rows = [
        (name, value + (f" (preset: {changed[name]})" if name in changed else ""), text, source)
        for name, value, text, source in protocol_rows(configs, first)
    ]
    document.add(
        Heading("Protocol"),
        Table(
            ["field", "value", "what it is", "source"],
            rows,
            f"The settings of the arm {named(first)}; the settings in which other arms differ are "
            "in cells.csv. A source names where the value comes from; a value that the preset or "
            "the command changed is ours.",
        ),
    )
