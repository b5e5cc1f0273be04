"""How a study is reproduced by one command: a grid of cells, each a run of its own."""

from .cells import (
    CELLS,
    Ended,
    cell_folder,
    epochs_done,
    is_finished,
    read_cells,
    run_cells,
    usable_processors,
)
from .folder import REQUEST, checked_names, locked, merged_request, parsed_settings

__all__ = [
    "CELLS",
    "REQUEST",
    "Ended",
    "cell_folder",
    "checked_names",
    "epochs_done",
    "is_finished",
    "locked",
    "merged_request",
    "parsed_settings",
    "read_cells",
    "run_cells",
    "usable_processors",
]
