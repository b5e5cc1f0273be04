"""Random numbers by (seed, sample, position): the published sequence, and statistics.

Bounds are five standard deviations of what is measured; the seeds are fixed.
"""

import numpy as np
import pytest

from sparsekern.data.counter_random import coins, fractions, integers, starts, words

MANY = 1 << 16


def start_of(seed, sample=0):
    return starts(seed, np.array([sample]))


def test_words_are_those_of_splitmix64():
    # The first numbers of the reference implementation from the state 1234567.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    state = np.array([1234567], np.uint64)
    assert words(state, 0, 5)[0].tolist() == expected
    assert words(state, 2, 2)[0].tolist() == expected[2:4]


def test_every_position_is_the_same_in_any_batch_and_any_range():
    samples = np.array([5, 0, 123456789, 7])
    start = starts(-3, samples)
    whole = words(start, 0, 100)
    assert (whole[:, 40:60] == words(start, 40, 20)).all()
    assert (whole[2:3] == words(start_of(-3, 123456789), 0, 100)).all()
    heads = coins(start, 1000, 103, 0.3)
    assert (heads[1:2] == coins(start[1:2], 1000, 103, 0.3)).all()
    assert (heads[:, :50] == coins(start, 1000, 50, 0.3)).all()


def test_blocks_of_coins_do_not_show():
    # More samples than are hashed at a time.
    start = starts(0, np.arange(50))
    heads = coins(start, 0, 10_001, 0.5)
    assert (heads[33] == coins(start[33:34], 0, 10_001, 0.5)[0]).all()


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_every_bit_is_on_half_the_time_along_positions_and_samples(seed):
    along_positions = words(start_of(seed), 0, MANY)[0]
    along_samples = words(starts(seed, np.arange(MANY)), 3, 1)[:, 0]
    along_seeds = np.array([words(start_of(seed - s if seed > 0 else seed + s), 0, 1)[0, 0]
                            for s in range(2000)])  # fmt: skip
    for numbers in (along_positions, along_samples, along_seeds):
        bits = np.unpackbits(numbers.view(np.uint8).reshape(-1, 8), axis=1)
        assert abs(bits.mean(0) - 0.5).max() <= 5 * 0.5 / np.sqrt(len(numbers))


def test_neighbours_are_not_correlated():
    grid = fractions(words(starts(4, np.arange(256)), 0, 257)) - 0.5
    other = fractions(words(starts(5, np.arange(256)), 0, 257)) - 0.5
    for one, two in (
        (grid[:, :-1], grid[:, 1:]),
        (grid[:-1], grid[1:]),
        (grid, other),
        (grid[:-1, 1:], grid[1:, :-1]),
    ):
        assert abs((one * two).mean() * 12) <= 5 / np.sqrt(one.size)


@pytest.mark.parametrize("what", ["seed", "sample"])
def test_one_changed_bit_changes_half_of_all_bits(what):
    flips = []
    for number in range(50):
        for bit in range(40):
            changed = number ^ (1 << bit)
            pair = [(number, 9), (changed, 9)] if what == "seed" else [(9, number), (9, changed)]
            one, two = (int(words(start_of(*place), 0, 1)[0, 0]) for place in pair)
            flips.append(bin(one ^ two).count("1"))
    # 64 fair coins: standard deviation 4.
    assert abs(np.mean(flips) - 32) <= 5 * 4 / np.sqrt(len(flips))
    assert min(flips) >= 8 and max(flips) <= 56  # six standard deviations


def test_no_two_samples_share_a_start():
    assert len(np.unique(starts(0, np.arange(300_000)))) == 300_000


def test_integers_are_even():
    numbers = words(start_of(1), 0, MANY)[0]
    for below in (1, 2, 3, 10, 1000):
        drawn = integers(numbers, below)
        counts = np.bincount(drawn, minlength=below)
        assert len(counts) == below
        expected = MANY / below
        chi = ((counts - expected) ** 2 / expected).sum()
        assert chi <= below - 1 + 5 * np.sqrt(2 * below)
    each = integers(numbers[:4], np.array([1, 2, 3, 4]))
    assert (each < [1, 2, 3, 4]).all() and each.dtype == np.int64


def test_fractions_are_even():
    share = fractions(words(start_of(2), 0, MANY)[0])
    assert share.min() >= 0 and share.max() < 1
    counts = np.histogram(share, 64, (0, 1))[0]
    expected = MANY / 64
    assert ((counts - expected) ** 2 / expected).sum() <= 63 + 5 * np.sqrt(2 * 63)


@pytest.mark.parametrize("probability", [0, 0.03, 0.125, 0.5, 1])
def test_coins_have_their_probability(probability):
    heads = coins(starts(3, np.arange(64)), 0, 4096, probability)
    bound = 5 * np.sqrt(probability * (1 - probability) / heads.size)
    # The probability is rounded to a multiple of 2^-16.
    assert abs(heads.mean() - probability) <= bound + 2.0**-17
    assert heads.dtype == bool and heads.shape == (64, 4096)
