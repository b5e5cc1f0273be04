"""A fixture for modules whose runs draw the same pictures again and again."""

import sys

import pytest
from matplotlib.figure import Figure

DOTS_PER_INCH = 20


@pytest.fixture(scope="module", autouse=True)
def quick_pictures():
    """The first picture of each kind is drawn as users see it, the others small, each text where it
    falls: to find places for them takes longer than these runs."""
    save, drawn = Figure.savefig, set()

    def savefig(figure, *arguments, **options):
        function = sys._getframe(2).f_code  # what called as_png
        if function in drawn:
            figure.set_layout_engine("none")
            options["dpi"] = DOTS_PER_INCH
        drawn.add(function)
        save(figure, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield
