"""Forward passes that gradient checkpointing runs again.

Checkpointing (`torch.utils.checkpoint` and the like) runs the forward pass of a segment a second
time during the backward pass. A layer that counts or averages must count a batch once, and must
compute in the second pass what it computed in the first.

A pass is a second one if it runs inside a backward pass. That recognises every form of
checkpointing: reentrant or not, nested, of torch or of another library. A forward pass that a
gradient hook runs for another purpose counts as a second one, too, and changes no state. One case
is not exact: if checkpointing is applied to compiled code (instead of the other way round),
SpatialSparsity counts a batch once, but its second pass does not use the thresholds of the first.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from ..dispatch.transforms import is_wrapped
from ..ops.first_pass import NO_PASS, backward_pass, first_pass

REMEMBERED = 64


def recomputing() -> bool:
    """Return True if a backward pass runs on this thread, so that a forward pass is a second one.

    False while code is compiled: compiled code tests it when it runs, see `take`.
    """
    return not torch.compiler.is_compiling() and backward_pass() != NO_PASS


def take(buffer: Tensor, new: Tensor) -> None:
    """Copy a new state into a buffer, except in a second pass."""
    if torch.compiler.is_compiling():
        buffer.copy_(torch.where(first_pass(buffer), new, buffer))
    elif not recomputing():
        buffer.copy_(new)


class RecentStates:
    """The states that the last forward passes of a layer used, for the passes run again.

    A pass is recognised by a key: numbers that follow from its batch alone. The nearest key is
    taken, since a second pass may differ in the last bits on a GPU. Of equal keys the latest is
    taken, since backward passes run in reverse order; so a batch that was passed twice before its
    backward pass has the second state in both. All tensors stay on the device, and the host never
    waits.

    Args:
        capacity: number of passes that are remembered. If more lie between a first pass and its
            second, the second gets the state of another pass.
    """

    def __init__(self, capacity: int = REMEMBERED) -> None:
        self._passes: deque[tuple[Tensor, Tensor]] = deque(maxlen=capacity)

    def remember(self, key: Tensor, state: Tensor) -> None:
        """Store the key of a first pass and the state it used, each of a constant shape."""
        if not (torch.compiler.is_compiling() or is_wrapped(key)):
            self._passes.append((key.detach().clone(), state.detach().clone()))

    @torch.no_grad()
    def recall(self, key: Tensor, current: Tensor) -> Tensor:
        """Return the state of the remembered pass with the nearest key; `current` if none is."""
        passes = [
            (pass_key, state)
            for pass_key, state in reversed(self._passes)
            if _can_be_stacked(pass_key, key) and _can_be_stacked(state, current)
        ]
        if not passes:
            return current
        keys = torch.stack([pass_key for pass_key, _ in passes])
        distances = (keys - key).abs().reshape(len(passes), -1).sum(1)
        nearest = distances.nan_to_num(torch.inf).argmin()
        return torch.stack([state for _, state in passes])[nearest]

    def __reduce__(self) -> Any:
        # Passes belong to the graphs of this process, so copies and pickles have none.
        return RecentStates, (self._passes.maxlen,)


def _can_be_stacked(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors can be stacked."""
    first, second = ((type(t), t.shape, t.dtype, t.device) for t in (one, other))
    return first == second
