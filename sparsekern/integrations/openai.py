"""The top-k activation as OpenAI's `sparse_autoencoder` constructs and stores it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..nn.counter import DeadNeuronCounter
from ..nn.topk import TopK as PlainTopK

# the classes by the names that a state_dict holds
_POSTS: dict[str, Callable[[], nn.Module]] = {"ReLU": nn.ReLU, "Identity": nn.Identity}


class TopK(PlainTopK):
    """Keep the k largest entries of the last dimension: `sparse_autoencoder.model.TopK`.

    A state_dict of OpenAI's layer, whose entries k and postact_fn are a number and the name of a
    class, can be loaded; one of this layer is that of `sparsekern.TopK`.

    Args:
        k: how many to keep, at least 1.
        postact_fn: function of the selected values; ReLU if it is not given.
        counter: as for `sparsekern.TopK`.

    Shape: x [..., n] floating point -> [..., n] of the same dtype.

    Raises:
        TypeError, ValueError: k is not an integer or not in 1..n; postact_fn is not callable.
    """

    def __init__(
        self,
        k: int,
        postact_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        *,
        counter: DeadNeuronCounter | None = None,
    ) -> None:
        super().__init__(k, nn.ReLU() if postact_fn is None else postact_fn, counter=counter)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any], strict: bool = True) -> TopK:
        """Make a layer from {"k": int, "postact_fn": name of a class}.

        Raises:
            ValueError: no entry k, a postact_fn that is unknown, or, if strict, other entries.
        """
        if "k" not in state_dict:
            raise ValueError(f"TopK: state_dict must have an entry k, got {sorted(state_dict)}")
        layer = cls(int(state_dict["k"]), _make_post(state_dict.get("postact_fn", "ReLU")))
        unknown = set(state_dict) - {"k", "postact_fn"}
        if strict and unknown:
            raise ValueError(f"TopK: unexpected entries in state_dict: {sorted(unknown)}")
        return layer

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if (k := state_dict.pop(prefix + "k", None)) is not None:
            self.k = int(k)
        if (name := state_dict.pop(prefix + "postact_fn", None)) is not None:
            self.post = _make_post(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _make_post(name: str) -> nn.Module:
    """Make the function that a state_dict names."""
    if name not in _POSTS:
        raise ValueError(f"TopK: postact_fn must be one of {', '.join(_POSTS)}, got {name!r}")
    return _POSTS[name]()
