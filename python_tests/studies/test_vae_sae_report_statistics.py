"""Means, intervals and verdicts of a report, against values known otherwise."""

import numpy as np
import pytest
import scipy.stats

from sparsekern.studies.vae_sae.report.statistics import (
    Difference,
    Spread,
    Verdict,
    counted,
    mig_floor,
    paired_change,
    spread,
    verdict,
    welch,
)


def test_spread_is_mean_and_sample_deviation():
    found = spread([0.1, 0.2, 0.3])
    assert found.n == 3 and found.mean == pytest.approx(0.2) and found.sd == pytest.approx(0.1)
    assert found.percent() == "20.0 ± 10.0" and found.text(2) == "0.20 ± 0.10"
    one = spread([0.25])
    assert one == Spread(0.25, None, 1) and one.percent() == "25.0"


def test_an_interval_of_a_difference_is_that_of_welch():
    one, two = [3.1, 2.4, 4.0], [1.0, 1.1, 0.7, 1.3, 0.2]
    found = welch(spread(one), spread(two))
    expected = scipy.stats.ttest_ind(one, two, equal_var=False).confidence_interval(0.95)
    assert found.low == pytest.approx(expected.low) and found.high == pytest.approx(expected.high)
    assert found.mean == pytest.approx(np.mean(one) - np.mean(two))
    assert found.seeds == "3 and 5 seeds"
    # By hand: s^2 = 2 * 1 / 3, df = 4, t(4) = 2.776 at 97.5 %.
    found = welch(Spread(5.0, 1.0, 3), Spread(2.0, 1.0, 3))
    assert (found.low, found.high) == pytest.approx((0.733, 5.267), abs=1e-3)


def test_an_interval_of_changes_within_runs_is_that_of_student():
    values = [0.3, -0.1, 0.5, 0.2]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = paired_change(spread(values))
    assert (found.low, found.high) == pytest.approx(tuple(expected))
    assert paired_change(spread([0.2])) == Difference(0.2, None, None, "1 seed")


def test_intervals_miss_the_truth_about_as_often_as_they_say():
    """With seeds drawn from two normals of one mean; a rule |mean| > sd would in a quarter."""
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(1000):
        found = welch(spread(generator.normal(0, 1, 3)), spread(generator.normal(0, 2, 3)))
        missed += found.shown != 0
    assert missed < 65


@pytest.mark.parametrize(
    ("one", "two", "shown"),
    [
        # t(4) sqrt(2 / 3) = 2.267
        (Spread(4.3, 1.0, 3), Spread(2.0, 1.0, 3), 1),
        (Spread(4.2, 1.0, 3), Spread(2.0, 1.0, 3), 0),
        (Spread(1.8, 1.0, 3), Spread(4.0, 1.0, 3), 0),
        (Spread(1.7, 1.0, 3), Spread(4.0, 1.0, 3), -1),
        # t(2) = 4.303 with two seeds each
        (Spread(6.2, 1.0, 2), Spread(2.0, 1.0, 2), 0),
        (Spread(6.4, 1.0, 2), Spread(2.0, 1.0, 2), 1),
        (Spread(9.0, None, 1), Spread(2.0, 1.0, 3), None),
        (Spread(2.0, 0.0, 2), Spread(2.0, 0.0, 2), 0),
        (Spread(2.5, 0.0, 2), Spread(2.0, 0.0, 2), 1),
    ],
)
def test_a_difference_is_shown_where_its_interval_leaves_out_0(one, two, shown):
    assert welch(one, two).shown == shown


def test_a_difference_in_words():
    found = Difference(0.141, 0.0749, 0.2071, "3 seeds each")
    assert found.points() == "+14.1 percentage points (95 % interval +7.5 to +20.7, 3 seeds each)"
    assert found.brief(2) == "+0.14 (+0.07 to +0.21)"
    alone = Difference(-0.0001, None, None, "1 seed each")
    assert alone.text(2) == "+0.00 (1 seed each: no interval)" and alone.brief(2) == "+0.00"
    assert counted(1, "seed") == "1 seed" and counted(0, "seed") == "0 seeds"


@pytest.mark.parametrize(
    ("dead", "reconstruction", "mig", "expected"),
    [
        (0.049, 31.0, 0.091, (True, True, True)),
        (0.05, 31.0, 0.091, (False, True, True)),
        (0.01, 31.1, 0.091, (True, False, True)),
        (0.01, 29.0, 0.089, (True, True, False)),
    ],
)
def test_the_verdict_allows_the_uncured_deviation(dead, reconstruction, mig, expected):
    # Uncured 30 +- 1 and 0.10 +- 0.01; a cure's own scatter, here ten times that, buys nothing.
    found = verdict(
        Spread(dead, 0.0, 3),
        (Spread(reconstruction, 10.0, 3), Spread(30.0, 1.0, 3)),
        (Spread(mig, 0.1, 3), Spread(0.1, 0.01, 3)),
    )
    assert found[:3] == expected and found.all == all(expected) and not found.blind


def test_a_verdict_on_mig_that_could_not_fail_says_so():
    def of(uncured):
        even = Spread(1.0, 0.1, 3)
        return verdict(Spread(0.0, 0.0, 3), (even, even), (Spread(0.0, 0.0, 3), uncured))

    assert of(Spread(0.06, 0.066, 3)) == Verdict(True, True, True, blind=True)
    assert of(Spread(0.06, 0.031, 3)) == Verdict(True, True, False, blind=True)
    assert of(Spread(0.06, 0.029, 3)) == Verdict(True, True, False, blind=False)
    assert mig_floor(Spread(0.06, 0.066, 3)) == 0.0
    assert mig_floor(Spread(0.06, 0.05, 3)) == pytest.approx(0.01)


def test_one_uncured_seed_decides_no_verdict_on_reconstruction_and_mig():
    one, two = (Spread(1.0, None, 1), Spread(1.0, None, 1)), (Spread(1, None, 1), Spread(1, 0.1, 2))
    assert verdict(Spread(0.0, None, 1), one, two) == Verdict(True, None, True, blind=False)
    assert verdict(Spread(0.0, None, 1), two, one) == Verdict(True, True, None, blind=False)
    assert not verdict(Spread(0.0, None, 1), one, two).all
