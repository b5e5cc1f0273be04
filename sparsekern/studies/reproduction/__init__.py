"""How a study is reproduced by one command: a grid of cells, each a run of its own."""

from .cells import GridOutcome, cell_folder, epochs_done, read_cells, usable_processors
from .folder import (
    REQUEST,
    calls_of,
    checked_names,
    locked,
    merged_request,
    parsed_settings,
    table_bytes,
)
from .grid import checked_jobs, run_grid

__all__ = [
    "REQUEST",
    "GridOutcome",
    "calls_of",
    "cell_folder",
    "checked_jobs",
    "checked_names",
    "epochs_done",
    "locked",
    "merged_request",
    "parsed_settings",
    "read_cells",
    "run_grid",
    "table_bytes",
    "usable_processors",
]
