"""What data sets, arms and definitions are called in figures, tables and sentences."""

from __future__ import annotations

SETS = {"dsprites": "dSprites", "shapes3d": "Shapes3D"}
NAMES = {"topk": "Top-k", "l1": "L1", "dense": "dense", "fixed": "fixed k"}
STUDY_AND_CONTROLS = tuple(NAMES)


def named(arm: str) -> str:
    """Name an arm in figures and tables."""
    return NAMES.get(arm, arm)


def definition(name: str) -> str:
    """Put a definition of dead units in words: "frequency<1e-02" -> "frequency < 0.01"."""
    kind, less, threshold = name.partition("<")
    return f"{kind} < {float(threshold):g}" if less else f"{kind} active"
