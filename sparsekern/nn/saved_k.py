"""A number of active latents that is saved with its layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

NAME = "current_k"
"""Of the entry in a state_dict."""


class SavedK(nn.Module):
    """A layer with an attribute k, which is in its state_dict once it was set after construction
    (an annealed one; a layer whose k stands still has no entry). Loading sets k, and a state
    without it leaves k as it is."""

    k: Any
    _k_was_set = False
    _kept: Tensor
    _exponent: int | None = None

    def _keep(self, k: int | float) -> None:
        """Hold k as the width of an empty tensor.

        torch.compile takes the numbers of modules as constants, and would compile again for every k
        of a schedule; sizes it follows. A float is held as the 53 bits of its fraction, whose
        exponent, a constant, changes only where k is halved or doubled.
        """
        self._k_was_set = "_kept" in vars(self)
        self._exponent = None
        if isinstance(k, float):
            fraction, exponent = math.frexp(k)
            k, self._exponent = int(fraction * 2**53), exponent - 53
        self._kept = torch.empty(0, k)

    def _kept_k(self) -> Any:
        width = self._kept.shape[1]
        return width if self._exponent is None else width * 2.0**self._exponent

    @property
    def current_k(self) -> Tensor:
        """k as it is saved: 0-d, int64, or float64 where it can be a fraction."""
        fractions = isinstance(self.k, float)
        return torch.tensor(self.k, dtype=torch.float64 if fractions else torch.int64, device="cpu")

    @current_k.setter
    def current_k(self, value: Tensor) -> None:
        # torch.func.functional_call puts what is given to it where the layer reads it.
        k = value.item()
        if k != self.k:
            self.k = k

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._k_was_set:
            destination[prefix + NAME] = self.current_k

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.pop(prefix + NAME, None)
        if saved is not None:
            self.k = saved.item()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
