"""Modules that have moved, under the names that they had in version 0.1.

Imports in other code use these, and pickles of whole models.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    "disentanglement": "measures.disentanglement",
    "metrics": "measures.activity",
    "motif_errors": "measures.motif_errors",
    "motif_perturbation": "measures.motif_perturbation",
    "ops.activity": "ops.count_active",
    "ops.adam": "ops.adam_step",
    "ops.linear_checks": "ops.linear_topk.checks",
    "ops.linear_slices": "ops.linear_topk.slices",
    "ops.threshold": "ops.channel_threshold",
    "ops.transposition": "ops.transpose_codes",
    "models.sae": "sae.model",
    **{
        f"models.{part}": f"sae.{part}"
        for part in ("decoding", "encoding", "normalisation", "statistics", "wrappers")
    },
    **{
        f"data.activation_{part}": f"data.activations.{part}"
        for part in (
            "arrays", "capture", "hdf5", "order", "origins", "rows", "sources", "statistics",
            "writing",
        )
    },
    "data.activation_cutting": "data.activations.batching",
    "data.activation_files": "data.activations.opening",
    "data.activation_format": "data.activations.activation_file",
    **{
        f"data.{part}": f"data.images.{part}"
        for part in ("dsprites", "factors", "shapes3d", "shapes3d_scene")
    },
    **{f"data.image_{part}": f"data.images.{part}" for part in ("files", "writing")},
    "data.image_sets": "data.images.factor_images",
    "data.motif_drawing": "data.motifs.drawing",
    **{
        f"data.{part}": f"data.motifs.{part}"
        for part in (
            "audio_mnist", "digit_circle", "digit_stamps", "formula_grammar", "formula_pictures",
            "latex_formulas", "mel_spectrograms", "spoken_digits", "synthetic_speech",
        )
    },
    **{f"studies.sae_{part}": f"studies.sae.{part}" for part in ("config", "rows")},
    "studies.sae_runs": "studies.sae.run",
}  # fmt: skip
"""Old names and new ones, both inside this package."""


class RenamedModules(MetaPathFinder, Loader):
    """A finder of modules by their old names, which are the same objects as by the new ones.

    It stands at the end of sys.meta_path, so it gets only names that do not exist.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old name, else None."""
        package, _, old = name.partition(".")
        if package != __package__ or old not in RENAMED:
            return None
        return ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> None:
        """Return None for the usual empty module, which exec_module replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in the place of an empty one, with a warning."""
        name = module.__name__
        new = f"{__package__}.{RENAMED[name.partition('.')[2]]}"
        warnings.warn(f"{name} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[name] = importlib.import_module(new)
