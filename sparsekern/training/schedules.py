"""Schedules: how a number moves from a start to an end over the epochs.

The abstract of arXiv 2603.18056 says "adaptive sparsity scheduling", 500 to 50 active neurons over
50 epochs, and not along which curve; these are the usual candidates. All are exact at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable

STEP_STAGES = 10


def _linear(start: float, end: float, t: float) -> float:
    """Move by equal differences."""
    return start + (end - start) * t


def _cosine(start: float, end: float, t: float) -> float:
    """Move slowly at both ends."""
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def _geometric(start: float, end: float, t: float) -> float:
    """Move by equal ratios."""
    return float(start * (end / start) ** t)


def _step(start: float, end: float, t: float) -> float:
    """Move in equal steps, equally long."""
    stage = min(int(t * STEP_STAGES), STEP_STAGES - 1)
    return start + (end - start) * stage / (STEP_STAGES - 1)


SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "geometric": _geometric,
    "step": _step,
}


def scheduled_k(schedule: str, start: int, end: int, epoch: int, epochs: int) -> int:
    """Compute k in one epoch, an integer between start and end.

    Epoch 0 has k = start and epoch ``epochs - 1`` has k = end, exactly; later epochs stay at end. A
    schedule of a single epoch has k = end.

    Args:
        schedule: "linear" (equal differences), "cosine" (slow at both ends), "geometric" (equal
            ratios: fast first), "step" (10 equal levels, equally long).
        start: k in the first epoch, >= 1.
        end: k in the last epoch, >= 1.
        epoch: counted from 0.
        epochs: length of the schedule, >= 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(
            f"scheduled_k: schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}"
        )
    for name, value, least in (
        ("start", start, 1),
        ("end", end, 1),
        ("epoch", epoch, 0),
        ("epochs", epochs, 1),
    ):
        if value < least:
            raise ValueError(f"scheduled_k: {name} must be at least {least}, got {value}")
    if epoch >= epochs - 1:
        return end
    return round(SCHEDULES[schedule](start, end, epoch / (epochs - 1)))
