"""Whether compiled code runs for the first time for a batch, or again for its backward pass.

Definition: True unless a backward pass is running on this thread. Python asks that itself (see
nn/recomputation.py); compiled code, in which Python's answer would be a constant, asks this
operation when it runs.
"""

from __future__ import annotations

import torch

from ..dispatch.operations import define

NO_PASS = -1
try:
    from torch._C import _current_graph_task_id as backward_pass
except ImportError:  # torch has no public name for it: then every pass counts as a first one

    def backward_pass() -> int:
        return NO_PASS


def first_pass(like: torch.Tensor) -> torch.Tensor:
    """Return a 0-d bool tensor on the device of another: False inside a backward pass.

    Example:
        >>> import torch
        >>> from sparsekern.ops.first_pass import first_pass
        >>> first_pass(torch.zeros(2))
        tensor(True)
    """
    answer: torch.Tensor = _first_pass(like)
    return answer


def first_pass_reference(like: torch.Tensor) -> torch.Tensor:
    return torch.full((), backward_pass() == NO_PASS, dtype=torch.bool, device=like.device)


def _fake(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty((), dtype=torch.bool)


_first_pass = define(
    "first_pass",
    "(Tensor like) -> Tensor",
    reference=first_pass_reference,
    # It computes nothing, so that a forced backend has nothing to choose.
    implementations={"native": first_pass_reference, "triton": first_pass_reference},
    fake=_fake,
)
