"""The contents of a report, section by section."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from ....data import DataError
from ....training.checkpoints import CheckpointError
from ...reproduction import cell_folder
from ..grid import STUDY, Cell
from . import figures, pictures
from .conclusions import conclusions, seeds
from .document import Code, Document, Heading, Items, Paragraph, Table
from .figures import SETS, definition, named
from .limits import changed_settings, is_rendered, limits
from .summary import (
    PHASES,
    PUBLISHED,
    Measured,
    Spread,
    alive_factors,
    alive_selectivity,
    never_sampled,
    phases,
    returned,
    scheduled,
    spread,
)
from .tables import FACTORS, protocol_rows


def command(asked: Mapping[str, Any]) -> str:
    """The command line that asks for a reproduction again."""
    words = ["sparsekern", "reproduce", "vae-sae", "--preset", asked["preset"]]
    words += ["--datasets", *asked["datasets"], "--arms", *asked["arms"]]
    words += ["--seeds", str(asked["seeds"])]
    if asked["data"]:
        words += ["--data", *(f"{name}={path}" for name, path in asked["data"].items())]
    if asked["overrides"]:
        words += ["--set", *(f"{name}={value}" for name, value in asked["overrides"].items())]
    return shlex.join([*words, "--out", "FOLDER"])


def what_was_run(
    document: Document, measured: Measured, asked: Mapping[str, Any], facts: Mapping[str, str]
) -> None:
    """The paragraph on the runs and the command; facts: versions and date, by name."""
    results = [content["results"] for content in measured.cells.values()]
    data = []
    for dataset in measured.datasets:
        cells = [c for cell, c in measured.cells.items() if cell.dataset == dataset]
        for source in dict.fromkeys(c["results"]["data"] for c in cells):
            data.append(f"{SETS[dataset]}: {source}")
    drawn = [SETS[d] for d in measured.datasets if is_rendered(measured, d)]
    rendered = (
        f" The images of {' and '.join(drawn)} are rendered, compatible with the published files, "
        "not those files themselves."
        if drawn
        else ""
    )
    devices = sorted({r["device"] for r in results})
    backends = sorted({b for r in results for b in r["backends"].values()})
    tests = sorted({r["test_images"] for r in results})
    document.add(
        Paragraph(
            f"Preset {asked['preset']}: {len(measured.cells)} cells "
            f"({', '.join(map(named, measured.arms))}; up to {seeds(asked['seeds'])}). "
            f"Data: {'; '.join(data)}.{rendered} Measured on {' or '.join(map(str, tests))} test "
            f"images, on {' and '.join(devices)}, sparse operations by {' and '.join(backends)}; "
            f"{sum(r['seconds'] for r in results):.0f} seconds of training in all. "
            + ", ".join(f"{name} {value}" for name, value in facts.items())
            + ". In tables, ± is the standard deviation over seeds; it is absent for 1 seed."
        ),
        Code(command(asked)),
    )


def _cells(measured: Measured, arms: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(arm, d) for arm in arms for d in measured.datasets if measured.has(d, arm)]


def main_table(document: Document, measured: Measured) -> None:
    """Published beside ours, and the panel."""
    document.add(Heading("Dead units: the study's numbers and ours"))
    columns = _cells(measured, STUDY)
    if columns:
        shares = {column: measured.panel(column[1], column[0]) for column in columns}
        contents = {c: list(measured.of(c[1], c[0]).values()) for c in columns}

        def row(name: str, get: Callable[[tuple[str, str]], str]) -> list[str]:
            return [name, *(get(column) for column in columns)]

        def ours(get: Callable[[Any], float], text: Callable[[Spread], str]) -> Any:
            return lambda column: text(spread(map(get, contents[column])))

        def of_panel(name: str) -> Callable[[tuple[str, str]], str]:
            return lambda column: shares[column][name].percent()

        names = list(next(iter(shares.values())))
        rows = [
            row("the study (%)", lambda c: "{} ± {}".format(*PUBLISHED[c])),
            *(row(f"{definition(n)} (%)", of_panel(n)) for n in names),
            row("never active, z drawn (%)", ours(never_sampled, Spread.percent)),
            row(
                "never active after the further epochs (%)",
                ours(lambda c: c["results"]["dead"]["never"], Spread.percent),
            ),
            row("L0 (units per image)", ours(scheduled("l0"), Spread.text)),
            row("k", ours(scheduled("k"), lambda s: s.text(0))),
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
    _missing(document, measured, STUDY)
    for dataset in measured.datasets:
        document.picture(
            f"panel_{dataset}",
            figures.panel_map(measured, dataset),
            f"{SETS[dataset]}: dead units (%, mean over seeds) of each arm under each definition, "
            "at the end of the schedule.",
        )


def _missing(document: Document, measured: Measured, arms: tuple[str, ...]) -> None:
    absent = [named(arm) for arm in arms if arm not in measured.arms]
    if absent:
        document.add(Paragraph(f"Left out, since not run: {', '.join(absent)}."))


def courses(document: Document, measured: Measured) -> None:
    """Dead share and MIG against epoch and k, and when units died."""
    document.add(Heading("Dead units during training"))
    if not any(arm in measured.arms for arm in figures.STUDY_AND_CONTROLS):
        document.add(Paragraph("Left out: neither an arm of the study nor a control was run."))
        return
    document.picture(
        "dead_by_epoch",
        figures.dead_by_epoch(measured),
        "Units that are active on no held-out image, after each epoch; mean and standard "
        "deviation over seeds.",
    )
    if set(STUDY) & set(measured.arms):
        document.picture(
            "dead_by_k",
            figures.dead_by_k(measured),
            "The same against k, during the schedule only. k falls as training goes on, so the "
            "curves alone do not tell one from the other; the horizontal controls do. For L1, k is "
            "what L0 is steered to.",
        )
    document.add(Heading("Mutual information gap"))
    if figures.has_mig_records(measured):
        document.picture(
            "mig_by_k",
            figures.mig_by_k(measured),
            "MIG of the mean code (20 bins) on the first test images during the schedule, mean "
            "over seeds; the band is the mean 95 % bootstrap interval of a run. Lines: MIG of all "
            "test images for the dense control, for the untrained model, and for random codes.",
        )
    elif set(STUDY) & set(measured.arms):
        document.add(Paragraph("No curves: MIG was not estimated during training (mig_every 0)."))
    _mig_table(document, measured)
    _deaths(document, measured)


def _mig_table(document: Document, measured: Measured) -> None:
    rows = []
    for arm, dataset in _cells(measured, figures.STUDY_AND_CONTROLS):
        cells = list(measured.of(dataset, arm).values())
        found = [spread(c["results"]["schedule"][n]["score"] for c in cells)
                 for n in ("mig", "mig_monte_carlo", "mig_code")]  # fmt: skip
        found.append(spread(c["results"]["untrained"]["mig"]["score"] for c in cells))
        found.append(spread(c["results"]["mig_random"]["score"] for c in cells))
        rows.append([named(arm), SETS[dataset], *(s.text(3) for s in found)])
    document.add(
        Table(
            ["arm", "data set", "mean code", "Monte Carlo", "sparse code", "untrained", "random"],
            rows,
            "MIG at the end of the schedule: of the mean code by histograms and by Monte Carlo, of "
            "the sparse code; of the mean code before training; of a random code.",
        )
    )


def _deaths(document: Document, measured: Measured) -> None:
    document.add(Heading("When units died"))
    document.picture(
        "deaths",
        figures.deaths(measured),
        "Units that were dead on the held-out images after the last epoch, by the first epoch "
        "without activity (mean over seeds), with k at that epoch above. A rare unit can miss the "
        "last held-out passes by chance, so the last bars are too high.",
    )
    rows = []
    for arm, dataset in _cells(measured, figures.STUDY_AND_CONTROLS):
        cells = measured.of(dataset, arm).values()
        found = [spread(phases(c)[phase] for c in cells) for phase in PHASES]
        rows.append([named(arm), SETS[dataset], *(s.percent() for s in found)])
    document.add(
        Table(
            ["arm", "data set", *PHASES],
            rows,
            "Share of all units (%) by the time of their death. Early: while k was at least 0.9 of "
            "its first value; where k is constant, in the first tenth of the epochs. Never alive: "
            "active on no image before and after any epoch.",
        )
    )


def further_epochs(document: Document, measured: Measured) -> None:
    """What the epochs after the schedule bring."""
    rows = []
    epochs = set()
    for arm, dataset in _cells(measured, STUDY):
        cells = [c for c in measured.of(dataset, arm).values() if c["config"]["extra_epochs"]]
        if cells:
            epochs |= {c["config"]["extra_epochs"] for c in cells}
            found = [returned(c) for c in cells]
            counts = [spread(values).text(1) for values in zip(*found, strict=True)]
            rows.append([named(arm), SETS[dataset], *counts, str(len(cells))])
    title = f"{'/'.join(map(str, sorted(epochs)))} more epochs" if epochs else "More epochs"
    document.add(Heading(title))
    if not rows:
        document.add(Paragraph("Left out: no run went on after its schedule."))
        return
    document.add(
        Table(
            ["arm", "data set", "dead before", "came back", "died", "dead after", "seeds"],
            rows,
            "Units, mean over seeds, never active on the test images at the end of the schedule "
            "and at the end of the run.",
        )
    )


def local_interpretability(document: Document, measured: Measured) -> None:
    """Selectivity and factors of living units."""
    document.add(Heading("What living units stand for"))
    document.picture(
        "selectivity",
        figures.selectivity(measured),
        "Selectivity of a unit: the largest share of a factor's entropy that it tells, by "
        "histograms of its activations on the test images. Units of all seeds that are active at "
        "all; dots are medians. Rare units have coarser histograms, so compare shapes with care.",
    )
    for dataset in measured.datasets:
        names = FACTORS[dataset]
        rows = []
        for label, _, _, units in figures.unit_sets(measured, dataset):
            counts = [alive_factors(u, len(names)) for u in units]
            means = [spread(values).text(0) for values in zip(*counts, strict=True)]
            values = [v for u in units for v in alive_selectivity(u)]
            middle = f"{median(values):.3f}" if values else "none alive"
            rows.append([label, middle, *means])
        document.add(
            Table(
                ["", "median", *names],
                rows,
                f"{SETS[dataset]}: median selectivity of living units, and how many of them stand "
                "for each factor (mean over seeds).",
            )
        )


def looks(document: Document, measured: Measured, folder: Path) -> None:
    """Reconstructions and traversals of one Top-k cell of each data set."""
    document.add(Heading("Reconstructions and traversals"))
    for dataset in measured.datasets:
        cells = measured.of(dataset, "topk")
        if not cells:
            document.add(Paragraph(f"{SETS[dataset]}: left out, since Top-k was not run."))
            continue
        seed, content = next(iter(cells.items()))
        place = cell_folder(folder, Cell(dataset, "topk", seed))
        try:
            seen = pictures.seen_by(content, place)
        except (CheckpointError, DataError) as error:
            document.add(Paragraph(f"{SETS[dataset]}: left out: {error}."))
            continue
        of = f"{SETS[dataset]}, Top-k, seed {seed}, after all epochs"
        document.picture(
            f"reconstructions_{dataset}",
            pictures.reconstructions(seen, dataset),
            f"{of}: test images and what the model makes of their mean code.",
        )
        document.picture(
            f"traversals_{dataset}",
            pictures.traversals(seen, dataset),
            f"{of}: the first image's code with one latent from -2 to 2 (standard deviations of "
            "the prior); the latents with the largest mean KL, in nats per image.",
        )


def reading(document: Document, measured: Measured, asked: Mapping[str, Any]) -> None:
    """What follows, and what does not."""
    document.add(
        Heading("What can be concluded, and what cannot"),
        Paragraph(
            "These sentences are chosen by the numbers. A difference counts when its mean exceeds "
            "its standard deviation over the seeds, which is a rule of reading, not a test of "
            "significance."
        ),
    )
    for title, texts in conclusions(measured).items():
        document.add(Heading(title, 3), Items(texts))
    document.add(
        Heading("What cannot be concluded", 3), Items(limits(measured, changed_settings(asked)))
    )


def protocol(document: Document, measured: Measured, asked: Mapping[str, Any]) -> None:
    """Every field of the config."""
    first = "topk" if "topk" in measured.arms else measured.arms[0]
    configs = [c["config"] for cell, c in measured.cells.items() if cell.arm == first]
    changed = changed_settings(asked)
    rows = [
        (name, value + (f" (preset: {changed[name]})" if name in changed else ""), text, source)
        for name, value, text, source in protocol_rows(configs)
    ]
    document.add(
        Heading("Protocol"),
        Table(
            ["field", "value", "what it is", "source"],
            rows,
            f"The settings of the arm {named(first)}; the settings in which other arms differ are "
            "in cells.csv. A source names where the preset's value comes from.",
        ),
    )
