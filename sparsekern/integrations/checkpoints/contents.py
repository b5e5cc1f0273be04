"""What a checkpoint of any format contains, in our names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from torch import Tensor, nn

WriteFile = Callable[[BinaryIO], Any]
"""Writes the content of a file that is open for it."""
# Of SparseAutoencoder.
_DEFAULTS = {"scale_scores": False, "subtract_bias": True, "normalize_rows": False}
_FOLDS = {"scale_scores": "fold_norms", "subtract_bias": "fold_bias"}


class Unstated(nn.Module):
    """Stand for the activation where files do not say which it is."""


@dataclass
class Checkpoint:
    """A sparse autoencoder: what its constructor takes and what its state_dict holds.

    Attributes:
        activation: the layer, with its thresholds.
        tensors: ``dictionary`` [N, D], ``encoder`` [N, D] (absent if tied), ``encoder_bias`` [N],
            ``decoder_bias`` [D]; those of ``counter`` and ``activation`` may be absent.
        options: further arguments of `SparseAutoencoder`.
        metadata: what the library knows of the activations, in JSON types: ``model_name`` and
            ``hook_name`` (SAELens' words) if it does, and more of its own.
    """

    activation: nn.Module
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def latents(self) -> int:
        """N, width of the sparse layer."""
        return self.tensors["dictionary"].shape[0]

    @property
    def features(self) -> int:
        """D, width of the activations."""
        return self.tensors["dictionary"].shape[1]

    @property
    def encoder(self) -> Tensor:
        """Encoder [N, D]; the dictionary if they are tied."""
        return self.tensors.get("encoder", self.tensors["dictionary"])


def check_flags(checkpoint: Checkpoint, name: str, needed: Mapping[str, bool]) -> None:
    """Check that options which a format lacks are what its library does."""
    for key, value in needed.items():
        if checkpoint.options.get(key, _DEFAULTS[key]) != value:
            how = ""
            if key in _FOLDS and not value:
                fold = _FOLDS[key]
                how = f" (see SparseAutoencoder.{fold}, or convert --{fold.replace('_', ' ')})"
            raise ValueError(f"{name}: {key} must be {value}, the format has no such option{how}")
