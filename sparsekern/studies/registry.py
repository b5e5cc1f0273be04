"""The studies that the commands offer, by name. A new one is added here and nowhere else."""

from __future__ import annotations

from .sae.commands import STUDY as SAE
from .sparling.commands import STUDY as SPARLING
from .study import Study
from .vae_sae.commands import STUDY as VAE_SAE

STUDIES: dict[str, Study] = {study.name: study for study in (VAE_SAE, SAE, SPARLING)}
