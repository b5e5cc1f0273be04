"""What the configs of all studies share: documented fields, and checks of what a user gives."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

import torch


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A config field with its documentation, which is also the help of its flag."""
    return field(default=default, metadata={"help": help, **metadata})


def check_finite(name: str, value: Any) -> None:
    """Refuses NaN and infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def usable_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU when there is one.

    Raises:
        ValueError: there is no such device, or it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error
    return device
