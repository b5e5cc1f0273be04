"""Pictures of inputs with their motifs."""

import pytest
import torch
from matplotlib.figure import Figure

from sparsekern.data import draw_motifs, motif_domain
from sparsekern.data.motifs.drawing import CORRECT, MISSED, TRUE, WRONG

OPTIONS = {
    "tiny": {},
    "digit-circle": {},
    "latex": {"longest": 4},
    "audio": {"seconds": 4.0, "count": (2, 4)},
}


def colors(axes):
    """Names of the colours of boxes, and of crosses."""
    from matplotlib.colors import to_rgba

    names = {to_rgba(name): name for name in (TRUE, CORRECT, WRONG, MISSED)}
    boxes = [names[patch.get_edgecolor()] for patch in axes.patches]
    return boxes, [line.get_color() for line in axes.lines]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_picture_file(name, tmp_path):
    domain = motif_domain(name, **OPTIONS[name])
    draw_motifs(domain, domain.batch(0, 0, 2), 1, tmp_path / "motifs.png")
    draw_motifs(domain, domain.batch(0, 0, 2), 1, str(tmp_path / "again.png"))
    assert (tmp_path / "motifs.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "again.png").stat().st_size == (tmp_path / "motifs.png").stat().st_size


@pytest.mark.parametrize("name", OPTIONS)
def test_every_motif_has_a_box_with_its_name(name):
    domain = motif_domain(name, **OPTIONS[name])
    batch = domain.batch(0, 0, 1)
    axes = Figure().subplots()
    draw_motifs(domain, batch, 0, axes)
    motifs = batch.motifs[0][batch.motifs[0, :, 0] >= 0]
    boxes, crosses = colors(axes)
    assert boxes == [TRUE] * len(motifs) and crosses == []
    assert [text.get_text() for text in axes.texts] == [domain.symbols[s] for s in motifs[:, 0]]
    corner = axes.patches[0].get_xy()
    assert corner[0] == motifs[0, -2] - 0.5
    label = [domain.label_symbols[number] for number in batch.labels[0] if number >= 0]
    assert axes.get_title() == "".join(label)


@pytest.mark.parametrize("name", ["tiny", "audio"])
def test_found_activations_are_coloured(name):
    domain = motif_domain(name, **OPTIONS[name])
    batch = domain.batch(1, 0, 1)
    motifs = batch.motifs[0][batch.motifs[0, :, 0] >= 0]
    first, second = motifs[0], motifs[1]
    kinds = len(domain.symbols)
    meanings = [(symbol + 1) % kinds for symbol in range(kinds)] + [-1]  # of the channels

    def channel_of(symbol):
        return (int(symbol) - 1) % kinds

    other = (int(second[0]) + 1) % kinds
    found = torch.stack(
        [
            torch.cat([torch.tensor([channel_of(first[0])]), first[1::2]]),  # at its very start
            torch.cat([torch.tensor([channel_of(other)]), second[1::2]]),
            torch.cat([torch.tensor([channel_of(first[0])]), first[2::2]]),  # just outside
            torch.cat([torch.tensor([kinds]), first[1::2]]),  # of a channel without a meaning
        ]
    )
    axes = Figure().subplots()
    draw_motifs(domain, batch, 0, axes, found=found, channel_symbols=meanings)
    boxes, crosses = colors(axes)
    assert boxes == [CORRECT] + [MISSED] * (len(motifs) - 1)
    assert crosses == [CORRECT, WRONG, WRONG, WRONG]
    texts = [text.get_text() for text in axes.texts][len(motifs) :]
    assert texts == [domain.symbols[other], domain.symbols[first[0]], "?"]


def test_the_region_is_wider_than_the_box_by_the_margin():
    domain = motif_domain("latex", longest=1)
    batch = domain.batch(0, 0, 1)
    symbol, top, _, left, _ = batch.motifs[0, 0].tolist()
    for distance, expected in ((2, [CORRECT]), (3, [WRONG])):
        axes = Figure().subplots()
        found = torch.tensor([[0, top - distance, left]])
        draw_motifs(domain, batch, 0, axes, found=found, channel_symbols=[symbol])
        assert colors(axes)[1] == expected


def test_nothing_found():
    domain = motif_domain("tiny")
    axes = Figure().subplots()
    found = torch.empty(0, 3, dtype=torch.int64)
    draw_motifs(domain, domain.batch(0, 0, 1), 0, axes, found=found, channel_symbols=[0, 1, 2, 3])
    assert set(colors(axes)[0]) == {MISSED}


def test_arguments_that_are_not_possible():
    domain = motif_domain("tiny")
    batch = domain.batch(0, 0, 2)
    with pytest.raises(ValueError, match=r"draw_motifs: sample must lie in 0\.\.1 .* got 2"):
        draw_motifs(domain, batch, 2, "unused.png")
    with pytest.raises(ValueError, match="draw_motifs: channel_symbols must be given with found"):
        draw_motifs(domain, batch, 0, "unused.png", found=torch.empty(0, 3, dtype=torch.int64))
