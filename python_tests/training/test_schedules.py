"""Schedules of k."""

import pytest

from sparsekern.training import SCHEDULES, scheduled_k


def curve(name, start=500, end=50, epochs=50):
    return [scheduled_k(name, start, end, epoch, epochs) for epoch in range(epochs)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("start, end", [(500, 50), (50, 500), (7, 1), (5, 5)])
@pytest.mark.parametrize("epochs", [2, 3, 50, 137])
def test_exact_ends_and_one_direction(name, start, end, epochs):
    ks = curve(name, start, end, epochs)
    assert ks[0] == start and ks[-1] == end
    assert ks == sorted(ks, reverse=start > end)
    assert all(type(k) is int for k in ks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_epoch_has_the_end_and_later_epochs_keep_it(name):
    assert curve(name, epochs=1) == [50]
    assert scheduled_k(name, 500, 50, 200, 50) == 50


def test_linear_moves_by_equal_differences():
    assert curve("linear", epochs=51) == [500 - 9 * epoch for epoch in range(51)]


def test_geometric_moves_by_equal_ratios():
    assert curve("geometric", 1000, 1, 4) == [1000, 100, 10, 1]


def test_cosine_is_half_way_in_the_middle_and_slow_at_the_ends():
    ks = curve("cosine", epochs=51)
    assert ks[25] == 275
    assert ks[0] - ks[1] < 9 and ks[49] - ks[50] < 9 < ks[25] - ks[26]


def test_step_has_ten_equal_levels():
    ks = curve("step", epochs=51)
    assert sorted(set(ks), reverse=True) == list(range(500, 49, -50))
    assert [ks.count(level) for level in (500, 450)] == [5, 5]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("fast", 500, 50, 0, 50), "schedule must be one of linear, cosine, geometric, step"),
        (("linear", 0, 50, 0, 50), "start must be at least 1, got 0"),
        (("linear", 500, 0, 0, 50), "end must be at least 1, got 0"),
        (("linear", 500, 50, -1, 50), "epoch must be at least 0, got -1"),
        (("linear", 500, 50, 0, 0), "epochs must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"scheduled_k: {message}"):
        scheduled_k(*arguments)
