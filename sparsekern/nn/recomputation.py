"""Forward passes that gradient checkpointing runs again.

Checkpointing (`torch.utils.checkpoint` and all its relatives) runs the forward pass of a segment a
second time while the backward pass is under way. A layer that counts or averages must not take the
batch in twice, and what it computes from its state must be what it computed the first time.

The second pass is known by the backward pass around it, which holds for every form of
checkpointing: reentrant or not, nested, of torch or of another library. So a forward pass that is
run for its own sake from inside a backward pass (by a gradient hook) counts as a second one, and
changes no state. One case is not exact: where compiled code is checkpointed (instead of the other
way round), SpatialSparsity takes a batch in once, but its second pass cannot look for the
thresholds of the first.
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
    """Whether a backward pass is running on this thread, so that a forward pass is a second one.

    False while code is compiled, which asks when it runs: see `take`.
    """
    return not torch.compiler.is_compiling() and backward_pass() != NO_PASS


def take(buffer: Tensor, new: Tensor) -> None:
    """Put a new state into a buffer, but not in a second pass."""
    if torch.compiler.is_compiling():
        buffer.copy_(torch.where(first_pass(buffer), new, buffer))
    elif not recomputing():
        buffer.copy_(new)


class RecentStates:
    """The states that the last forward passes of a layer used, for the passes run again.

    A pass is recognised by a key: numbers that follow from its batch alone. The nearest counts,
    since a second pass may differ in the last bits on a GPU, and of equal ones the latest, as
    backward passes run in the reverse order; so a batch that went through twice before its backward
    pass has its second state in both. All stays on the device, and nothing waits for it.

    Args:
        most: how many passes are remembered; with more than that between a first and its second
            pass, the state is that of another.
    """

    def __init__(self, most: int = REMEMBERED) -> None:
        self._passes: deque[tuple[Tensor, Tensor]] = deque(maxlen=most)

    def remember(self, key: Tensor, state: Tensor) -> None:
        """Of a first pass: its key and the state it used, both of a shape that stays."""
        if not (torch.compiler.is_compiling() or is_wrapped(key)):
            self._passes.append((key.detach().clone(), state.detach().clone()))

    @torch.no_grad()
    def recall(self, key: Tensor, now: Tensor) -> Tensor:
        """The state of the remembered pass whose key is nearest; `now` where there is none."""
        alike = [
            (known, state)
            for known, state in reversed(self._passes)
            if _alike(known, key) and _alike(state, now)
        ]
        if not alike:
            return now
        keys = torch.stack([known for known, _ in alike])
        distances = (keys - key).abs().reshape(len(alike), -1).sum(1)
        nearest = distances.nan_to_num(torch.inf).argmin()
        return torch.stack([state for _, state in alike])[nearest]

    def __reduce__(self) -> Any:
        # Passes belong to the graphs of this process: a copy begins without them.
        return RecentStates, (self._passes.maxlen,)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors can be stacked."""
    kinds = [(type(t), t.shape, t.dtype, t.device) for t in (one, other)]
    return kinds[0] == kinds[1]
