"""A number of active latents k that is saved with its layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

NAME = "current_k"
"""Name of the entry in a state_dict."""


class SavedK(nn.Module):
    """A layer with an attribute k, which is in its state_dict once it was changed.

    A layer whose k is that of its construction has no entry. Loading an entry sets k; a state
    without one leaves k as it is.
    """

    k: Any
    _k_was_set = False
    _kept: Tensor
    _exponent: int | None = None

    def _store_k(self, k: int | float) -> None:
        """Store k as the width of an empty tensor.

        For torch.compile the numbers of a module are constants, so a schedule would compile again
        for every k. Sizes may change. A float is stored as the 53 bits of its fraction; the
        exponent, which is a constant, changes once per power of two.
        """
        self._k_was_set = "_kept" in vars(self)
        self._exponent = None
        if isinstance(k, float):
            fraction, exponent = math.frexp(k)
            k, self._exponent = int(fraction * 2**53), exponent - 53
        self._kept = torch.empty(0, k)

    def _stored_k(self) -> Any:
        width = self._kept.shape[1]
        return width if self._exponent is None else width * 2.0**self._exponent

    @property
    def current_k(self) -> Tensor:
        """Tensor that is saved for k: 0-d, int64, or float64 for a float."""
        dtype = torch.float64 if isinstance(self.k, float) else torch.int64
        return torch.tensor(self.k, dtype=dtype, device="cpu")

    @current_k.setter
    def current_k(self, value: Tensor) -> None:
        # torch.func.functional_call sets the entries of the state that it is given as attributes.
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
