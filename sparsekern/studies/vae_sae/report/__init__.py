"""The report of a reproduction: text, figures and raw results in one folder.

report.md, figures/*.png    the report as Markdown
report.html                 the same in one file
cells.csv, units.csv, epochs.csv
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .... import __version__
from ....training.runs import write_atomically
from ...reproduction import table_bytes, usable_processors
from ...reproduction.document import Document, Heading, Items, Paragraph, write_report
from ..grid import Cell, asked_cells
from .measurements import Measured
from .raw_results import cell_rows, epoch_rows, unit_rows
from .sections import arms, collapse, overview
from .statistics import counted

TITLE = "VAE-SAE: dead units under sparsification"
NAMED = 12  # at most so many missing cells are named one by one


def write(
    folder: Path,
    asked: Mapping[str, Any],
    cells: Mapping[Cell, Mapping[str, Any]],
    *,
    failed: Mapping[str, str],
    total: int,
) -> None:
    """Write report.md, report.html, figures and CSV files, each atomically; replaces older ones.

    Args:
        folder: of the reproduction, with its run folders.
        asked: the content of reproduction.json.
        cells: the finished cells, see reproduction.read_cells.
        failed: cell's name -> why, of this call.
        total: cells that were asked for.

    Raises:
        RunError: a cell lacks a measurement, or was run by another version; names it.
    """
    measured = Measured(cells)
    document = Document()
    document.add(Heading(TITLE, 1))
    _add_state(document, asked, cells, failed, total)
    if cells:
        _add_sections(document, folder, measured, asked)
    write_atomically(folder / "cells.csv", table_bytes(cell_rows(measured, asked)))
    write_atomically(folder / "units.csv", table_bytes(unit_rows(measured)))
    write_atomically(folder / "epochs.csv", table_bytes(epoch_rows(measured)))
    write_report(document, folder, TITLE)


def _add_sections(
    document: Document, folder: Path, measured: Measured, asked: Mapping[str, Any]
) -> None:
    """Add all sections."""
    facts = {
        "sparsekern": __version__,
        "torch": torch.__version__,
        "usable processors:": str(usable_processors()),
        "report of": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if torch.cuda.is_available():
        facts["GPU:"] = torch.cuda.get_device_name()
    overview.what_was_run(document, measured, asked, facts)
    overview.main_table(document, measured)
    arms.every_arm(document, measured)
    collapse.active_units(document, measured)
    collapse.courses(document, measured)
    collapse.further_epochs(document, measured)
    overview.local_interpretability(document, measured)
    overview.reconstructions(document, measured, folder)
    arms.cures(document, measured)
    arms.sensitivity(document, measured, asked)
    overview.what_follows(document, measured, asked)
    overview.protocol(document, measured, asked)
    document.add(
        Heading("Raw results"),
        Items(
            [
                (
                    "cells.csv: a row for each cell. Shares are 0 to 1, reconstruction and kl are "
                    "nats per image; columns without prefix are those at the end of the schedule, "
                    "after_ at the end of the run, untrained_ before training; settings are those "
                    "in which the cell differs from this reproduction's Top-k arm."
                ),
                (
                    "units.csv: a row for each unit of each cell, after all epochs. "
                    "last_active_epoch is that of the schedule, last_active_epoch_of_run that of "
                    "all epochs; both count from 1; 0 is a unit that was active on the held-out "
                    "images after no epoch, and an empty field one that was active after the last."
                ),
                "epochs.csv: a row for each epoch of each cell; epochs count from 1.",
            ]
        ),
    )


def _add_state(
    document: Document,
    asked: Mapping[str, Any],
    cells: Mapping[Cell, Any],
    failed: Mapping[str, str],
    total: int,
) -> None:
    """Say what is missing and what failed."""
    if len(cells) == total:
        document.add(Paragraph(f"Complete: {counted(total, 'cell')}."))
        return
    absent = [cell for cell in asked_cells(asked) if cell not in cells and cell.name not in failed]
    names = [cell.name for cell in absent]
    if len(names) > NAMED:
        by_arm = Counter(cell.arm for cell in absent)
        names = [f"{count} of {arm}" for arm, count in by_arm.items()]
    text = f"Incomplete: {len(cells)} of {counted(total, 'cell')}."
    if names:
        text += f" Not finished: {', '.join(names)}."
    document.add(Paragraph(text, notice=True))
    if failed:
        document.add(Items([f"{name} failed: {why}" for name, why in failed.items()]))
