"""Reproductions of a study in the tests: their command, and what their cells found."""

from __future__ import annotations

import json
import pathlib

CLOCK = ("images_per_second", "samples_per_second", "seconds", "draw_seconds")


def command_of(study: str, folder, *flags, settings) -> list[str]:
    """The words of ``sparsekern reproduce``."""
    words = ["reproduce", study, "--no-progress", "--out", folder, *flags, "--set", *settings]
    return list(map(str, words))


def results(folder: pathlib.Path) -> dict[str, dict]:
    """Of all finished cells, without what depends on the clock."""
    found = {}
    for path in sorted((folder / "cells").glob("*/results.json")):
        facts = json.loads(path.read_text())
        found[path.parent.name] = {name: fact for name, fact in facts.items() if name not in CLOCK}
    return found
