"""Perturbation consistency: hand-worked moves, and readouts that follow them or do not."""

import numpy as np
import pytest
import torch

from sparsekern.data import motif_domain
from sparsekern.data.motifs.domain import Replacement
from sparsekern.data.motifs.formula_grammar import TOKENS
from sparsekern.data.motifs.formula_pictures import SYMBOLS
from sparsekern.measures.motif_perturbation import (
    local_maxima,
    move_motif,
    perturbation_consistency,
)
from sparsekern.studies.sparling.measures import channels_of_symbols


def test_local_maxima_by_hand():
    activations = torch.zeros(1, 2, 12)
    activations[0, 0, [0, 2, 8]] = torch.tensor([1.0, 2.0, 0.5])  # 0 is two from a larger one
    activations[0, 1, 1] = 0.1  # of another channel: stays
    found = local_maxima(activations, 5)
    assert found[0, 0].tolist() == [0, 0, 2.0, 0, 0, 0, 0, 0, 0.5, 0, 0, 0]
    assert float(found[0, 1, 1]) == pytest.approx(0.1)
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4], image[0, 0, 0, 0], image[0, 0, 7, 7] = 3.0, 1.0, 2.0
    assert local_maxima(image, 3).count_nonzero() == 2  # 7 is three from 4; 0 is four
    assert float(local_maxima(image, 3)[0, 0, 0, 0]) == 1.0


def test_a_move_by_hand():
    activations = torch.zeros(3, 6, 6)
    activations[0, 1, 1], activations[0, 5, 5], activations[2, 2, 1] = 0.5, 0.7, 0.2
    after = move_motif(activations, [1, 1, 3, 1, 3], 0, source=0, to=2)
    assert after.nonzero().tolist() == [[0, 5, 5], [2, 1, 1], [2, 2, 1]]
    assert float(after[2, 1, 1]) == 0.5 and float(activations[0, 1, 1]) == 0.5, "a copy"
    widened = move_motif(activations, [1, 4, 5, 4, 5], 3, source=0, to=2)  # cut off at the border
    assert widened.nonzero().tolist() == [[2, 1, 1], [2, 2, 1], [2, 5, 5]]


def place_readout(activations):
    """Labels of up to three symbols in the order of their place; symbol s has channel s."""
    labels = torch.full((len(activations), 3), -1)
    for i, channels in enumerate(activations):
        where = channels.t().nonzero()[:, 1]
        labels[i, : len(where)] = where[:3]
    return labels


def replaced_in_place(label, symbols):
    return [
        Replacement(row, other, [*label[:row], other, *label[row + 1 :]])
        for row, symbol in enumerate(symbols)
        for other in range(4)
        if other != symbol
    ]


def inputs(count):
    """Activations [count, 4, 60] with three motifs each, 20 positions apart; labels, motifs."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (count, 3), generator=generator)
    activations = torch.zeros(count, 4, 60)
    motifs = torch.stack(
        [labels, *(torch.arange(3).mul(20).add(at).expand(count, 3) for at in (0, 20))], -1
    )
    for i in range(count):
        activations[i, labels[i], torch.tensor([5, 25, 45])] = 1.0
        activations[i, labels[i], torch.tensor([7, 27, 47])] = 0.5  # not a local maximum
    return activations, labels, motifs


def consistency(decode, channels=(0, 1, 2, 3), count=40, spoil=None):
    activations, labels, motifs = inputs(count)
    if spoil is not None:
        spoil(activations)
    return perturbation_consistency(
        decode, activations, labels, motifs, channels, replaced_in_place, np.random.default_rng(0)
    )


def test_a_readout_that_follows():
    assert consistency(place_readout).tolist() == [1] * 40


def test_a_readout_that_looks_elsewhere():
    """It knows the inputs by heart and ignores the rest."""
    _, labels, _ = inputs(40)
    assert consistency(lambda activations: labels[: len(activations)]).tolist() == [0] * 40


def test_a_readout_that_confuses_two_symbols():
    """Channel 3 is read as symbol 2: inputs with a 3 are not solved, those that get one are
    inconsistent."""
    _, labels, _ = inputs(200)

    def confused(activations):
        found = place_readout(activations)
        return found.masked_fill(found == 3, 2)

    verdicts = consistency(confused, count=200)
    assert torch.equal(verdicts == -1, (labels == 3).any(1))
    share = float((verdicts[verdicts >= 0] == 0).double().mean())
    assert 0.2 < share < 0.45  # one of three replacements


def test_what_is_not_tested():
    assert consistency(place_readout, channels=(-1,) * 4).tolist() == [-1] * 40
    one_channel = consistency(place_readout, channels=(0, 0, 0, 0))
    assert one_channel.tolist() == [-1] * 40, "nowhere to move to"
    silent = consistency(lambda a: inputs(40)[1][: len(a)], spoil=lambda a: a.zero_())
    assert silent.tolist() == [-1] * 40, "nothing to move"


def test_the_channel_of_a_symbol():
    assert channels_of_symbols([1, 0, 1, -1], [[1, 9, 0, 3], [5, 0, 7, 0], [0, 0, 0, 4]]) == [
        1,
        2,
        -1,
    ]


# -- what may be replaced, by domain ---------------------------------------------------------------


def test_replacements_of_a_circle():
    found = motif_domain("digit-circle").replacements([1, 5, 3], [1, 5, 3])
    assert len(found) == 3 * 7, "seven digits are not there yet"
    by = {(r.motif, r.symbol): r.label for r in found}
    assert by[0, 7] == [3, 7, 5] and by[1, 0] == [0, 3, 1] and by[2, 2] == [1, 5, 2]


def test_replacements_of_speech():
    found = motif_domain("audio").replacements([4, 4], [4, 4])
    assert len(found) == 18 and Replacement(1, 0, [4, 0]) in found


def test_replacements_of_a_formula():
    """x^{1}+1: the x alone occurs once, and neither + nor the braces are replaced."""
    label = [TOKENS.index(token) for token in ("x", "^{", "1", "}", "+", "1")]
    symbols = [SYMBOLS.index(symbol) for symbol in ("x", "1", "+", "1")]
    found = motif_domain("latex").replacements(label, symbols)
    assert len(found) == 15 and {r.motif for r in found} == {0}
    for replacement in found:
        assert TOKENS[replacement.label[0]] == SYMBOLS[replacement.symbol] != "x"
        assert replacement.label[1:] == label[1:]


@pytest.mark.parametrize("name", ["tiny", "digit-circle"])
def test_a_replaced_label_is_one_that_the_domain_draws(name):
    domain = motif_domain(name)
    batch = domain.batch(3, 0, 50)
    for label, motifs in zip(batch.labels.tolist(), batch.motifs.tolist(), strict=True):
        label = [symbol for symbol in label if symbol >= 0]
        symbols = [row[0] for row in motifs if row[0] >= 0]
        for replacement in domain.replacements(label, symbols):
            assert replacement.label[0] == min(replacement.label)
            assert len(set(replacement.label)) == len(label)
