"""What cannot be concluded from the cells of a reproduction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .....measures.activity import DEAD_THRESHOLDS
from ...grid import Cell, cell_config
from ..measurements import Measured
from ..names import SETS
from ..statistics import counted

SEEDS_FOR_SPREAD = 3


def changed_settings(asked: Mapping[str, Any]) -> dict[str, str]:
    """Find the settings that the request overrides, with what the preset has in their place."""
    base = cell_config(Cell(asked["datasets"][0], "topk", 0), asked["preset"], {}, None)
    pairs = ((name, value, getattr(base, name)) for name, value in asked["overrides"].items())
    return {name: str(preset) for name, value, preset in pairs if value != preset}


def limits(measured: Measured, changed: Mapping[str, str]) -> list[str]:
    """Say what cannot be concluded.

    Args:
        measured: the cells.
        changed: settings that differ from the preset, with what they would be.
    """
    contents = list(measured.cells.values())
    counts = {
        len(measured.of(dataset, arm)) for dataset in measured.datasets for arm in measured.arms
        if measured.has(dataset, arm)
    }  # fmt: skip
    sentences = [
        (
            "Only the abstract of the study is public. Layers, losses, the place of the sparse "
            "layer, the definition of a dead unit and every field without the abstract as its "
            "source below are declared by us, so a difference from the published rates neither "
            "confirms nor refutes them."
        ),
    ]
    if changed:
        words = ", ".join(f"{name} (the preset has {value})" for name, value in changed.items())
        sentences.append(f"Settings were changed, so this is not the preset's protocol: {words}.")
    if min(counts) < SEEDS_FOR_SPREAD:
        sentences.append(
            f"Some arms have {counted(min(counts), 'seed')}. With fewer than {SEEDS_FOR_SPREAD} a "
            "standard deviation is hardly known, and small differences can be chance."
        )
    sentences += _image_limits(measured)
    tests = min(content["results"]["test_images"] for content in contents)
    finest = min(DEAD_THRESHOLDS)
    if tests * finest <= 1:
        sentences.append(
            f"On {tests} test images, a frequency below {finest:g} is the same as never active."
        )
    sentences += [
        (
            "Deaths are dated on the held-out images, dead shares are counted on the test images; "
            "a rare unit can be dead to the first and alive to the second."
        ),
        (
            "Why units fall silent in the first epochs, before k cuts anything, is not told: no "
            "arm of the study varies the initial weights or the step size."
        ),
        "Of the study's numbers, four rates are public; its values of MIG are not.",
    ]
    return sentences


def _image_limits(measured: Measured) -> Iterator[str]:
    """Say what the images leave open."""
    configs = [content["config"] for content in measured.cells.values()]
    sides = sorted({config["side"] for config in configs})
    if sides[0] < 64:
        yield (
            f"The images have {sides[0]} x {sides[0]} pixels instead of 64 x 64: finer shapes and "
            "orientations are lost, and rates at full size can differ."
        )
    images = sorted({config["images"] for config in configs})
    if images[0] < 100_000:
        yield (
            f"Training saw {images[0]} images, a small part of either set; an epoch has "
            "correspondingly few steps, and rates per epoch do not carry over to whole sets."
        )
    drawn = [dataset for dataset in measured.datasets if is_rendered(measured, dataset)]
    if drawn:
        names = " and ".join(SETS[dataset] for dataset in drawn)
        yield f"The images of {names} are rendered, compatible ones, not the published files."


def is_rendered(measured: Measured, dataset: str) -> bool:
    """Tell whether images of a data set came from no file."""
    return any(cell.dataset == dataset and content["config"]["data"] is None
               for cell, content in measured.cells.items())  # fmt: skip
