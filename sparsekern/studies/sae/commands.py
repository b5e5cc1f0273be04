"""What the commands offer of this study."""

from __future__ import annotations

from ..study import Study
from .config import PRESETS, SAEConfig
from .run import FILES, run, saved_config, table

STUDY = Study(
    name="sae",
    help="sparse autoencoder on stored activations",
    description=(
        "Trains a sparse autoencoder on files of activations; 'sparsekern data "
        "activations' makes such files."
    ),
    config=SAEConfig,
    presets=PRESETS,
    files=FILES,
    run=run,
    table=table,
    saved_config=saved_config,
    several_processes=True,
)
