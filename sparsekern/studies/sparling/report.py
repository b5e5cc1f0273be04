"""The report of a reproduction: text, figures and raw results in one folder.

report.md, figures/*.png    the report as Markdown
report.html                 the same in one file
cells.csv, epochs.csv
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from ... import __version__
from ...data.motifs.domain import MotifDomain
from ...training.runs import write_atomically
from ..reproduction import calls_of, cell_folder, table_bytes, usable_processors
from ..reproduction.document import Code, Document, Heading, Items, Paragraph, Table, write_report
from . import figures
from .config import SparlingConfig, source_of
from .grid import ARMS, Cell
from .raw_results import SHARES, cell_rows, epoch_rows
from .task import NETWORKS

TITLE = "Sparling: motifs found by extreme activation sparsity"
# Percent, of arXiv 2302.01976: FPE, FNE, CE, E2EE, perturbation consistency; means over 9 seeds at
# the final density.
PUBLISHED = {
    "digit-circle": (1.480, 0.422, 1.156, 0.737, 99.3),
    "latex": (0.529, 14.199, 2.500, 0.980, 86.1),
    "audio": (0.000, 4.464, 5.471, 8.652, 93.4),
}
PUBLISHED_L1 = (
    ("0.1", 99.99, 0.00, 50.34, 0.68), ("1", 99.90, 0.00, 47.84, 2.85),
    ("2", 91.25, 58.09, 45.65, 70.31), ("5", 95.99, 73.12, 50.85, 75.00),
    ("10", 97.63, 84.51, 33.82, 73.20),
)  # fmt: skip
SHARE_NAMES = ("FPE", "FNE", "CE", "E2EE")
CONSISTENCY = (
    "Consistency: of inputs that are predicted exactly from the local maxima of their activations, "
    "one motif's are moved to the channel of another symbol; the share in which the prediction "
    "follows."
)
GOAL = 10.0  # percent, of FPE + FNE + CE

FinishedCells = Mapping[Cell, Mapping[str, Any]]


def write(
    folder: Path,
    asked: Mapping[str, Any],
    cells: FinishedCells,
    domain: MotifDomain,
    *,
    failed: Mapping[str, str],
    total: int,
) -> None:
    """Write report.md, report.html, figures and CSV files, each atomically; replaces older ones.

    Args:
        folder: of the reproduction, with its run folders.
        asked: the content of reproduction.json.
        cells: the finished cells, at least one; see reproduction.read_cells.
        domain: of all cells.
        failed: cell's name -> why, of this call.
        total: cells that were asked for.
    """
    document = Document()
    document.add(Heading(TITLE, 1))
    state = f"{'Complete' if len(cells) == total else 'Incomplete'}: {len(cells)} of {total} cells."
    document.add(Paragraph(state, notice=len(cells) < total))
    if failed:
        document.add(Items([f"{name} failed: {why}" for name, why in failed.items()]))
    _add_what_was_run(document, asked, cells, domain)
    study = {cell: content for cell, content in cells.items() if ARMS[cell.arm].group == "study"}
    if study:
        _add_study(document, folder, study, domain)
    _add_contrast(document, cells, "l1", "L1 at equal samples")
    _add_contrast(document, cells, "kl", "KL at equal samples")
    _add_contrast(document, cells, "ablation", "Ablations")
    _add_protocol(document, cells)
    write_atomically(folder / "cells.csv", table_bytes(cell_rows(cells)))
    write_atomically(folder / "epochs.csv", table_bytes(epoch_rows(cells)))
    write_report(document, folder, TITLE)


# -- numbers ---------------------------------------------------------------------------------------


def percent(results: Mapping[str, Any], name: str) -> float:
    """Return a measured share in percent; NaN where there was nothing to take a share of."""
    value = results[name]["value"]
    return math.nan if value is None else 100 * value


def motif_total(results: Mapping[str, Any]) -> float:
    """Sum FPE, FNE and CE in percent; a share of nothing counts as 100 %, since all was missed."""
    shares = (percent(results, name) for name in ("fpe", "fne", "ce"))
    return sum(100.0 if math.isnan(share) else share for share in shares)


def select_run(study: FinishedCells) -> Cell:
    """Choose the run with the best validation accuracy; no motif label takes part."""
    return max(study, key=lambda cell: study[cell]["results"]["validation_exact"])


def _spread(values: Sequence[float]) -> str:
    """Format percentages of several seeds: mean and deviation."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "none"
    return f"{mean(known):.2f} ± {stdev(known):.2f}" if len(known) > 1 else f"{known[0]:.2f}"


# -- sections --------------------------------------------------------------------------------------


def _add_what_was_run(
    document: Document, asked: Mapping[str, Any], cells: FinishedCells, domain: MotifDomain
) -> None:
    """Add what was run, and the commands that ask for it."""
    first = next(iter(cells.values()))
    results, config = first["results"], first["config"]
    seconds = sum(cell["results"]["seconds"] for cell in cells.values())
    used = {name for content in cells.values() for name in content["results"]["backends"].values()}
    backends = ", ".join(sorted(used)) or "torch"
    document.add(
        Paragraph(
            f"Domain {domain.name} ({domain.origin}): inputs {' x '.join(map(str, domain.space))}, "
            f"{len(domain.symbols)} kinds of motifs, {domain.mean_motifs():.2f} of them in an "
            f"input on average. Each cell saw {config['samples']} training samples, each once. "
            f"Measured on {results['test_samples']} test samples, on {results['device']}, "
            f"the bottleneck's operations by {backends}; {seconds:.0f} seconds of training in "
            f"all. sparsekern {__version__}, torch {torch.__version__}, usable processors: "
            f"{usable_processors()}. "
            "In tables, ± is the standard deviation over seeds; all errors are percentages."
        )
    )
    document.add(*(Code(_command_line(asked, call)) for call in calls_of(asked)))


def _command_line(asked: Mapping[str, Any], call: Mapping[str, Any]) -> str:
    """Write the command line that asks for a reproduction again."""
    words = ["sparsekern", "reproduce", "sparling", "--preset", asked["preset"], "--arms"]
    words += [*call["arms"], "--seeds", str(call["seeds"])]
    if asked.get("data"):
        words += ["--data", asked["data"]]
    if asked["overrides"]:
        words += ["--set", *(f"{name}={value}" for name, value in asked["overrides"].items())]
    return shlex.join([*words, "--out", "FOLDER"])


def _add_study(document: Document, folder: Path, study: FinishedCells, domain: MotifDomain) -> None:
    """Add the section on the study's own arm."""
    best = select_run(study)
    results = study[best]["results"]
    totals = {cell: motif_total(content["results"]) for cell, content in study.items()}
    good = sum(total < GOAL for total in totals.values())
    document.add(
        Heading("Motifs found"),
        Items(
            [
                f"{good} of {len(study)} seeds end with FPE + FNE + CE below {GOAL:.0f} %.",
                (
                    f"The run with the best validation accuracy is that of seed {best.seed} "
                    f"({100 * results['validation_exact']:.1f} % exact): FPE + FNE + CE "
                    f"{totals[best]:.2f} %, end-to-end error {percent(results, 'e2ee'):.2f} %."
                ),
                (
                    "Labels of motifs took no part in training, in annealing, or in this choice; "
                    f"their mean number, {domain.mean_motifs():.2f}, did: it sets the density at "
                    "which annealing ends."
                ),
                *_not_annealed(study),
            ]
        ),
    )
    tested = {cell: content["results"]["perturbation"]["inputs"] for cell, content in study.items()}
    rows = [
        [
            str(cell.seed),
            *(_share_with_interval(value["results"], name) for name in SHARES),
            f"{totals[cell]:.2f}",
            f"{_share_with_interval(value['results'], 'perturbation')} of {tested[cell]}",
            f"{value['results']['relative_density']:.2f}",
            f"{100 * value['results']['validation_exact']:.1f}",
        ]
        for cell, value in study.items()
    ]
    head = ["seed", *SHARE_NAMES, "FPE + FNE + CE", "consistency", "density", "validation exact"]
    document.add(
        Table(
            head,
            rows,
            "Each with its 95 % interval over test samples; density in multiples of the motifs' "
            f"own. {CONSISTENCY}",
        )
    )
    _add_published(document, study, domain)
    document.picture(
        "annealing",
        figures.annealing_path({cell.seed: _epoch_records(value) for cell, value in study.items()}),
        "Above: motif errors on a few test samples while the density falls (all seeds; zero is "
        "drawn at the lower edge). Below: validation accuracy.",
    )
    document.picture(
        "motifs",
        (cell_folder(folder, best) / "motifs.png").read_bytes(),
        f"Test inputs with the activations of seed {best.seed}: boxes are true motifs, green when "
        "found and orange when missed; crosses are activations (the largest, where there are "
        "many), green when right and red when not.",
    )
    _add_channels(document, results, domain)


def _not_annealed(study: FinishedCells) -> list[str]:
    """Say which seeds did not reach the final density, if any."""
    late = [
        str(cell.seed)
        for cell, content in study.items()
        if content["results"]["annealed_at"] is None
    ]
    return [f"Not at that density by the end of training: seeds {', '.join(late)}."] if late else []


def _epoch_records(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the epoch records of a cell, each with its number of samples."""
    validate_every = value["config"]["validate_every"]
    return [{**epoch, "samples": validate_every} for epoch in value["epochs"]]


def _share_with_interval(results: Mapping[str, Any], name: str) -> str:
    """Format a share with its interval."""
    share = results[name]
    if share["value"] is None:
        return "none"
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{100 * share['value']:.2f} ({low:.2f} to {high:.2f})"


def _add_published(document: Document, study: FinishedCells, domain: MotifDomain) -> None:
    """Add our errors beside the published ones."""
    ours = [
        _spread([percent(content["results"], name) for content in study.values()])
        for name in (*SHARES, "perturbation")
    ]
    rows = [[f"ours, {domain.name}, mean of {len(study)} seeds", *ours]]
    rows += [
        [f"published, {name}, mean of 9 seeds", *(f"{share:.2f}" for share in shares)]
        for name, shares in PUBLISHED.items()
    ]
    note = (
        "The published figures are of other, larger domains: they say what order of error the "
        "method reaches there, not what ours should be."
        if domain.name not in PUBLISHED
        else "Published: at the final density."
    )
    document.add(Table(["", *SHARE_NAMES, "consistency"], rows, note))


def _add_channels(document: Document, results: Mapping[str, Any], domain: MotifDomain) -> None:
    """Add how often each channel meets each symbol."""
    confusion = results["confusion"]
    head = ["symbol", *(f"channel {channel}" for channel in range(len(results["assignment"])))]
    rows = [
        [symbol, *map(str, counts)]
        for symbol, counts in zip(domain.symbols, confusion, strict=True)
    ]
    document.add(
        Heading("Which channel stands for which motif", 3),
        Table(head, rows, "How often a motif's largest activation was in each channel."),
    )


def _add_contrast(document: Document, cells: FinishedCells, group: str, title: str) -> None:
    """Add a group of arms beside the study's own arm."""
    arms = [arm for arm in ARMS if ARMS[arm].group == group]
    by_arm = {arm: [content for cell, content in cells.items() if cell.arm == arm] for arm in arms}
    if not any(by_arm.values()):
        return
    shown = {
        "sparling": [content for cell, content in cells.items() if cell.arm == "sparling"],
        **by_arm,
    }
    rows, points = [], []
    for arm, values in shown.items():
        if not values:
            continue
        all_results = [value["results"] for value in values]
        totals = [motif_total(results) for results in all_results]
        rows.append(
            [
                ARMS[arm].text,
                str(len(values)),
                *(_spread([percent(results, name) for results in all_results]) for name in SHARES),
                _spread(totals),
                _spread([results["relative_density"] for results in all_results]),
            ]
        )
        points += [
            (arm, results["relative_density"], total)
            for results, total in zip(all_results, totals, strict=True)
        ]
    document.add(Heading(title))
    if group == "l1":
        document.add(Paragraph(_l1_in_words(shown)))
    head = ["arm", "seeds", *SHARE_NAMES, "FPE + FNE + CE", "density"]
    document.add(
        Table(
            head,
            rows,
            'Mean ± standard deviation over seeds; "none" is a share of nothing, which counts as '
            "100 % in the sum.",
        )
    )
    if group == "l1":
        document.picture(
            "l1", figures.sweep(points), "Each run: its motif error against its density."
        )
        document.add(
            Table(
                ["lambda", *SHARE_NAMES],
                [[name, *(f"{share:.2f}" for share in shares)] for name, *shares in PUBLISHED_L1],
                "Published for L1 on DigitCircle, one seed each.",
            )
        )


def _l1_in_words(shown: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Say how L1 compares with thresholds."""
    means = {
        arm: mean(motif_total(value["results"]) for value in values)
        for arm, values in shown.items()
        if values
    }
    ours = means.pop("sparling", None)
    best = min(means, key=lambda arm: means[arm])
    text = (
        f"The weight of L1 with the least motif error is {best.removeprefix('l1-')}: FPE + FNE + "
        f"CE {means[best]:.1f} % on average."
    )
    if ours is not None:
        ends = []
        for arm in (best, "sparling"):
            totals = sorted(motif_total(value["results"]) for value in shown[arm])
            ends.append(f"{totals[0]:.1f} to {totals[-1]:.1f} %")
        text += (
            f" Thresholds with annealing reach {ours:.1f} % after the same samples. Single seeds: "
            f"{ends[0]} under that weight of L1, {ends[1]} with thresholds."
        )
    return text + " The weight is chosen here by motif labels, in favour of L1."


def _add_protocol(document: Document, cells: FinishedCells) -> None:
    """Add every choice of the protocol with its source."""
    config = next(iter(cells.values()))["config"]
    defaults = SparlingConfig.__dataclass_fields__
    rows = [
        [
            name,
            str(config[name]),
            source_of(name, config),
            defaults[name].metadata["help"],
        ]
        for name in SparlingConfig.sources()
    ]
    document.add(
        Heading("Protocol"),
        Paragraph(NETWORKS[config["domain"]]),
        Table(["setting", "value", "source", "what it is"], rows, "Of the first cell."),
    )
