"""Tell the first pass over a batch from a second one, which a backward pass runs.

Definition: True unless a backward pass is running on this thread. Code that is not compiled asks
torch (see nn/recomputation.py). In compiled code that answer would be a constant, so it calls this
operation, which answers when it runs.
"""

from __future__ import annotations

import torch

from ..dispatch.operations import define

__all__ = ["NO_PASS", "backward_pass", "first_pass"]

NO_PASS = -1
try:
    from torch._C import _current_graph_task_id as backward_pass
except ImportError:  # torch has no public name for it: then every pass counts as a first one

    def backward_pass() -> int:
        """Return that no backward pass is running."""
        return NO_PASS


def first_pass(like: torch.Tensor) -> torch.Tensor:
    """Return a 0-d bool tensor on the device of another: False inside a backward pass.

    Example:
        >>> import torch
        >>> from sparsekern.ops.first_pass import first_pass
        >>> first_pass(torch.zeros(2))
        tensor(True)
    """
    return _first_pass(like)


def first_pass_reference(like: torch.Tensor) -> torch.Tensor:
    return torch.full((), backward_pass() == NO_PASS, dtype=torch.bool, device=like.device)


def _fake(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty((), dtype=torch.bool)


_first_pass = define(
    "first_pass",
    "(Tensor like) -> Tensor",
    reference=first_pass_reference,
    # There is nothing to compute, so a forced backend gets the same function.
    implementations={"native": first_pass_reference, "triton": first_pass_reference},
    fake=_fake,
)
