"""A workload with its tensors made: what is timed, against what, and how it is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import testing
from .timing import forced
from .workload import Workload

Tensors = tuple[torch.Tensor, ...]

# Elements compared at once: the error rule works in float64 on several copies.
CHUNK = 2**20


@dataclass(frozen=True)
class Problem:
    """What a stem's file makes of a workload.

    ours: the library's call, served by whichever backend is forced. peers: the same job by other
    means, by the names that the targets use. check: the error ratio of ours under a backend (0 for
    exact results, at most 1 where the error rule holds); raises AssertionError where something else
    is wrong. traffic: bytes that have to move, by `formula`. roof: the rate of the roofline that
    bounds it, if one does. flops: operations, if any are worth counting. grad: whether the calls
    run with autograd on. prepare: makes what these peers need, which may be large, before any of
    them is called or ours is checked.
    """

    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    check: Callable[[str], float]
    traffic: int
    formula: str
    roof: str | None
    flops: int = 0
    grad: bool = False
    prepare: Callable[[Sequence[str]], None] = lambda names: None


def region(workload: Workload) -> torch.autocast:
    """Make the autocast region that a workload asks for; it does nothing if it asks for none."""
    dtype = getattr(torch, workload.autocast or "bfloat16")
    return torch.autocast(workload.device, dtype, enabled=bool(workload.autocast))


def check_exact(what: str, call: Callable[[], Tensors], backend: str) -> float:
    """0.0 when a backend returns what the reference returns, bit for bit; else AssertionError."""
    with forced(backend):
        actual = call()
    with forced("reference"):
        expected = call()
    for position, (one, other) in enumerate(zip(actual, expected, strict=True)):
        testing.assert_same(f"{what}, output {position}", one, other)
    return 0.0


def worst_ratio(
    actual: torch.Tensor, truth: torch.Tensor, reference: torch.Tensor, scale: torch.Tensor
) -> float:
    """Return the error ratio of a matrix, taken over a few rows at a time to bound the memory."""
    rows = max(1, CHUNK // max(1, actual[0].numel()))
    parts = (slice(start, start + rows) for start in range(0, len(actual), rows))
    return max(
        testing.error_ratio(actual[part], truth[part], reference[part], scale[part])
        for part in parts
    )
