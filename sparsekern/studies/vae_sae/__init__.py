"""The VAE-SAE study: dead units of a sparse layer while k goes from 500 to 50 (arXiv 2603.18056).

The paper's protocol is not public; config.py declares ours, models/vae_sae.py the model.
"""

from .config import PRESETS, VAESAEConfig
from .measures import evaluate
from .run import FILES, NAME, run, saved_config, table

Config = VAESAEConfig

__all__ = [
    "FILES",
    "NAME",
    "PRESETS",
    "Config",
    "VAESAEConfig",
    "evaluate",
    "run",
    "saved_config",
    "table",
]
