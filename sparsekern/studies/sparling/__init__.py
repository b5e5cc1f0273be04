"""The Sparling study: motifs found end to end by extreme activation sparsity (arXiv 2302.01976)."""

from .config import PRESETS, SparlingConfig
from .run import FILES, NAME, run, saved_config, table

Config = SparlingConfig

__all__ = ["FILES", "NAME", "PRESETS", "Config", "SparlingConfig", "run", "saved_config", "table"]
