"""Motif errors: hand-worked examples of the published definitions."""

import math

import numpy as np
import pytest
import torch

from sparsekern.measures.motif_errors import (
    assign_symbols,
    bootstrap_errors,
    edit_errors,
    exact_matches,
    find_motifs,
    join_matches,
    motif_errors,
)

NONE, PAD = -1, -2


def boxes(*samples):
    """Motifs (symbol, top, bottom, left, right) of each sample, padded to two."""
    rows = [[*sample, *[(-1,) * 5] * (2 - len(sample))] for sample in samples]
    return torch.tensor(rows)


def worked_example():
    """Two inputs of 6 x 6 with three channels and three motifs."""
    activations = torch.zeros(2, 3, 6, 6)
    activations[0, 2, 1, 1] = 0.5  # the largest in the first box: channel 2
    activations[0, 0, 0, 0] = 0.3  # in the same box: consumed, not a false positive
    activations[0, 1, 5, 5] = 1.0  # in no box: a false positive
    activations[1, 0, 3, 3] = 0.1
    activations[1, 2, 2, 2] = 0.2
    motifs = boxes([(1, 0, 2, 0, 2), (0, 3, 5, 3, 5)], [(1, 2, 4, 2, 4)])
    return activations, motifs


def test_a_worked_example():
    found = find_motifs(*worked_example())
    assert found.channels.tolist() == [[2, NONE], [2, PAD]]
    assert found.spare.tolist() == [1, 0] and found.active.tolist() == [3, 2]
    errors = motif_errors(found, 2, 3, one_to_one=True)
    assert errors.fne == pytest.approx(1 / 3)  # one motif of three has no activation
    assert errors.fpe == pytest.approx(1 / 3)  # one left over, two matched
    assert errors.ce == 0 and errors.assignment[2] == 1
    assert errors.total == pytest.approx(2 / 3)
    assert errors.confusion.tolist() == [[0, 0, 0], [0, 0, 2]]


def test_boxes_are_half_open_and_widened_by_the_margin():
    activations = torch.zeros(1, 1, 8)
    activations[0, 0, 5] = 1.0
    motifs = torch.tensor([[[0, 2, 5]]])
    assert find_motifs(activations, motifs).channels.tolist() == [[NONE]]
    assert find_motifs(activations, motifs, margin=1).channels.tolist() == [[0]]
    motifs = torch.tensor([[[0, 5, 7]]])
    assert find_motifs(activations, motifs).channels.tolist() == [[0]]


def test_an_activation_belongs_to_the_first_motif_that_holds_it():
    activations = torch.zeros(1, 2, 8)
    activations[0, 1, 4] = 1.0
    motifs = torch.tensor([[[0, 2, 5], [1, 4, 6]]])
    found = find_motifs(activations, motifs)
    assert found.channels.tolist() == [[1, NONE]] and found.spare.tolist() == [0]


def test_assignment_one_to_one_and_by_majority():
    # Channel 0 fires for both symbols, channel 1 mostly for symbol 0.
    confusion = np.array([[6, 3], [5, 0]])
    assert assign_symbols(confusion, True) == (1, 0)  # 8 right instead of 6
    assert assign_symbols(confusion, False) == (0, 0)  # each channel's majority: 9 right
    assert assign_symbols(np.array([[0, 2, 0]]), False) == (-1, 0, -1)


def test_confusion_by_either_assignment():
    samples = 14
    activations = torch.zeros(samples, 2, 4)
    motifs = torch.zeros(samples, 1, 3, dtype=torch.int64)
    for i in range(samples):  # the table above
        symbol = 0 if i < 9 else 1
        channel = 0 if i < 6 or i >= 9 else 1
        motifs[i, 0] = torch.tensor([symbol, 1, 3])
        activations[i, channel, 2] = 1
    found = find_motifs(activations, motifs)
    assert motif_errors(found, 2, 2, one_to_one=True).ce == pytest.approx(6 / 14)
    assert motif_errors(found, 2, 2, one_to_one=False).ce == pytest.approx(5 / 14)


def test_dense_activations_without_and_nothing_at_all():
    motifs = boxes([(0, 0, 2, 0, 2)])
    dense = motif_errors(find_motifs(torch.ones(1, 1, 6, 6), motifs), 1, 1, one_to_one=True)
    assert (dense.fne, dense.ce) == (0, 0) and dense.fpe == pytest.approx(32 / 33)
    silent = motif_errors(find_motifs(torch.zeros(1, 1, 6, 6), motifs), 1, 1, one_to_one=True)
    assert silent.fne == 1 and math.isnan(silent.fpe) and math.isnan(silent.ce)


def test_batches_can_be_joined():
    activations, motifs = worked_example()
    parts = [find_motifs(activations[i : i + 1], motifs[i : i + 1]) for i in range(2)]
    whole = find_motifs(activations, motifs)
    for ours, theirs in zip(join_matches(parts), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_bootstrap_intervals():
    generator = torch.Generator().manual_seed(0)
    activations = torch.zeros(400, 1, 4)
    activations[:, 0, 1] = (torch.rand(400, generator=generator) < 0.8).float()
    motifs = torch.tensor([[[0, 1, 2]]]).expand(400, 1, 3)
    found = find_motifs(activations, motifs)
    fne = motif_errors(found, 1, 1, one_to_one=True).fne
    low, high = bootstrap_errors(found, 1, 1, one_to_one=True, resamples=400)["fne"]
    deviation = math.sqrt(fne * (1 - fne) / 400)
    assert low == pytest.approx(fne - 1.96 * deviation, abs=0.01)
    assert high == pytest.approx(fne + 1.96 * deviation, abs=0.01)


def test_edit_errors():
    predicted = torch.tensor([[1, 2, 3, -1], [1, -1, -1, -1], [2, 1, -1, -1], [-1] * 4, [-1] * 4])
    labels = torch.tensor([[1, 3, -1, -1], [1, -1, -1, -1], [1, 2, -1, -1], [1, 2, 3, 4], [-1] * 4])
    # A symbol too many of three; equal; two exchanged; all four missing; two empty ones.
    assert edit_errors(predicted, labels).tolist() == pytest.approx([1 / 3, 0, 1, 1, 0])
    assert exact_matches(predicted, labels).tolist() == [False, True, False, False, True]


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"motifs must have shape \[2, M, 5\].*got \[2, 1, 3\]"):
        find_motifs(torch.zeros(2, 1, 6, 6), torch.zeros(2, 1, 3, dtype=torch.int64))


def test_a_share_of_nothing_has_no_interval():
    found = find_motifs(torch.zeros(3, 2, 8), torch.tensor([[[0, 2, 5]]] * 3))
    intervals = bootstrap_errors(found, 2, 2, one_to_one=True, resamples=20)
    assert intervals["fne"] == (1.0, 1.0)
    assert all(math.isnan(end) for name in ("fpe", "ce") for end in intervals[name])
