"""Digits on a circle: stamps, layouts, noise, labels.

Bounds of statistics are five standard deviations; the seeds are fixed.
"""

import numpy as np
import pytest

from sparsekern.data import motif_domain
from sparsekern.data.motifs.digit_stamps import STAMPS

NAMES = ("tiny", "digit-circle")


def drawn(domain, seed=0, count=400):
    """Images [n, side, side], labels and motifs as arrays."""
    inputs, labels, motifs = domain.batch(seed, 0, count)
    return inputs[:, 0].numpy(), labels.numpy(), motifs.numpy()


def inside(motifs, side):
    """Whether each pixel lies in a box, bool [n, side, side]."""
    place = np.arange(side)
    rows = (place >= motifs[..., 1, None]) & (place < motifs[..., 2, None])
    columns = (place >= motifs[..., 3, None]) & (place < motifs[..., 4, None])
    return (rows[..., :, None] & columns[..., None, :]).any(1)


def test_stamps_are_like_the_published_ones():
    large = STAMPS["12x8"]
    assert [bitmap.shape for bitmap in large.values()] == [(12, 8)] * 10
    published = [30, 16, 21, 23, 25, 26, 28, 16, 27, 31]
    counts = [int(bitmap.sum()) for bitmap in large.values()]
    assert np.abs(np.subtract(counts, published)).max() <= 2
    assert np.mean(counts) / 96 == pytest.approx(0.2504, abs=0.01)
    assert list(STAMPS["7x5"]) == list("0147")
    assert [bitmap.shape for bitmap in STAMPS["7x5"].values()] == [(7, 5)] * 4


@pytest.mark.parametrize("stamps", STAMPS)
def test_stamps_differ_from_each_other_wherever_they_are_put(stamps):
    # A fifth of the smaller digit's pixels at the best of all moves by up to 3.
    for name, one in STAMPS[stamps].items():
        padded = np.pad(one, 3)
        for other_name, other in STAMPS[stamps].items():
            moved = [
                padded[y : y + other.shape[0], x : x + other.shape[1]]
                for y in range(7)
                for x in range(7)
            ]
            least = min(int((image != other).sum()) for image in moved)
            assert name == other_name or least >= 0.2 * min(one.sum(), other.sum())


@pytest.mark.parametrize("name", NAMES)
def test_boxes_hold_exactly_the_stamps(name):
    domain = motif_domain(name, background=0, flips=0)
    images, _, motifs = drawn(domain)
    expected = np.zeros_like(images)
    for image, rows in zip(expected, motifs, strict=True):
        for symbol, top, bottom, left, right in rows[rows[:, 0] >= 0]:
            assert not image[top:bottom, left:right].any(), "boxes are disjoint"
            image[top:bottom, left:right] = STAMPS[domain.stamps][domain.symbols[symbol]]
    assert (images == expected).all()


@pytest.mark.parametrize("name", NAMES)
def test_boxes_are_disjoint_and_as_large_as_stamps(name):
    domain = motif_domain(name)
    _, _, motifs = drawn(domain, count=3000)
    shape = STAMPS[domain.stamps]["0"].shape
    present = motifs[motifs[:, :, 0] >= 0]
    assert (present[:, 2] - present[:, 1] == shape[0]).all()
    assert (present[:, 4] - present[:, 3] == shape[1]).all()
    covered = inside(motifs, domain.side).sum((1, 2))
    assert (covered == (motifs[:, :, 0] >= 0).sum(1) * shape[0] * shape[1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_stamps_overwrite_the_background_before_pixels_flip(name):
    domain = motif_domain(name, background=1, flips=0)
    images, _, motifs = drawn(domain, count=50)
    clean = drawn(motif_domain(name, background=0, flips=0), count=50)[0]
    boxes = inside(motifs, domain.side)
    assert (images[boxes] == clean[boxes]).all() and images[~boxes].all()


@pytest.mark.parametrize("name, background, flips", [("tiny", 0.05, 0.03),
                                                     ("digit-circle", 0.125, 0.05)])  # fmt: skip
def test_noise_has_the_published_rates(name, background, flips):
    domain = motif_domain(name)
    images, _, motifs = drawn(domain, seed=1)
    clean = drawn(motif_domain(name, background=0, flips=0), seed=1)[0]
    boxes = inside(motifs, domain.side)
    outside = images[~boxes].mean()
    expected = background * (1 - flips) + (1 - background) * flips
    assert outside == pytest.approx(expected, abs=5 * (expected / (~boxes).sum()) ** 0.5)
    for ink in (0, 1):
        pixels = boxes & (clean == ink)
        share = (images != clean)[pixels].mean()
        assert share == pytest.approx(flips, abs=5 * (flips / pixels.sum()) ** 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_not_correlated(name):
    domain = motif_domain(name)
    images, _, motifs = drawn(domain, seed=2)
    noise = np.where(inside(motifs, domain.side), np.nan, images)
    noise -= np.nanmean(noise)
    noise /= np.nanstd(noise)
    for one, other in (
        (noise[:, 1:], noise[:, :-1]),
        (noise[:, :, 1:], noise[:, :, :-1]),
        (noise[1:], noise[:-1]),
    ):
        product = one * other
        assert abs(np.nanmean(product)) <= 5 / np.sqrt(np.isfinite(product).sum())


@pytest.mark.parametrize("name", NAMES)
def test_digits_are_distinct_and_evenly_chosen(name):
    domain = motif_domain(name)
    _, labels, _ = drawn(domain, count=4000)
    counts = (labels >= 0).sum(1)
    fewest, most = domain.distinct
    kinds = most - fewest + 1
    numbers = np.bincount(counts - fewest, minlength=kinds)
    assert len(numbers) == kinds
    assert np.abs(numbers / 4000 - 1 / kinds).max() <= 5 * (1 / kinds / 4000) ** 0.5
    assert counts.mean() == pytest.approx(domain.mean_motifs(), abs=5 * counts.std() / 4000**0.5)
    for label, count in zip(labels, counts, strict=True):
        assert len(set(label[:count].tolist())) == count
        assert label[0] == label[:count].min()
    frequency = np.bincount(labels[labels >= 0]) / 4000
    assert np.abs(frequency - counts.mean() / len(domain.symbols)).max() <= 5 * 0.5 / 4000**0.5


@pytest.mark.parametrize("count", [3, 4])
def test_every_order_is_equally_likely(count):
    domain = motif_domain("tiny", distinct=(count, count))
    _, labels, _ = drawn(domain, count=4000)
    # After the smallest digit: all (count - 1)! orders of each set of digits.
    kinds, numbers = np.unique(labels, axis=0, return_counts=True)
    assert len(kinds) == {3: 4 * 2, 4: 6}[count]
    expected = 4000 / len(kinds)
    assert np.abs(numbers - expected).max() <= 5 * expected**0.5


def centres(motifs):
    """Middles of boxes: rows and columns [..., 2]."""
    return (motifs[..., 1::2] + motifs[..., 2::2]) / 2


def circle_through(points):
    """Centre [2] and radius of the circle through three points [3, 2]."""
    middle = np.linalg.solve(
        2 * (points[1:] - points[0]), (points[1:] ** 2).sum(1) - (points[0] ** 2).sum()
    )
    return middle, np.hypot(*(points[0] - middle))


@pytest.fixture(scope="module")
def large():
    """The published circle ten times as large, where whole pixels hardly matter: for each image
    its centre, radius, and turns of its digits in label order."""
    domain = motif_domain("digit-circle", side=1000, radii=(200, 350), clearance=150, shift=0,
                          background=0, flips=0)  # fmt: skip
    found = []
    # A few at a time: an image has a million pixels.
    motifs = [domain.batch(0, first, 30).motifs.numpy() for first in range(0, 300, 30)]
    for rows in np.concatenate(motifs):
        points = centres(rows[rows[:, 0] >= 0])
        middle, radius = circle_through(points[:3])
        away = points - middle
        found.append((middle, radius, np.arctan2(away[:, 0], away[:, 1]) / (2 * np.pi)))
    return found


def test_circles_have_the_published_radii_and_fit(large):
    radius = np.array([radius for _, radius, _ in large])
    # A pixel of rounding moves the circle through three nearby points by a few.
    assert radius.min() >= 195 and radius.max() <= 355
    assert radius.mean() == pytest.approx(275, abs=5 * 150 / 12**0.5 / len(large) ** 0.5)
    for middle, radius, _ in large:
        assert (middle - radius >= 145).all() and (middle + radius <= 855).all()


def test_gaps_are_at_least_half_an_even_spacing_and_labels_go_clockwise(large):
    for _, _, turns in large:
        gaps = (np.roll(turns, -1) - turns) % 1  # the row grows downwards: this is clockwise
        assert gaps.sum() == pytest.approx(1), "once round"
        assert gaps.min() >= 1 / (2 * len(turns)) - 0.005


def test_gaps_are_those_of_random_angles(large):
    # The share of a gap beyond the least one has the mean 1 / n and, as one of n parts of a whole
    # cut at random, the variance (n - 1) / (n^2 (n + 1)).
    for count in (3, 4, 5, 6):
        gaps = [(np.roll(turns, -1) - turns) % 1 for _, _, turns in large if len(turns) == count]
        shares = (np.array(gaps)[:, 0] - 1 / (2 * count)) * 2
        deviation = np.sqrt((count - 1) / (count + 1)) / count
        assert shares.mean() == pytest.approx(1 / count, abs=5 * deviation / len(gaps) ** 0.5)
        assert shares.std() == pytest.approx(deviation, rel=5 / len(gaps) ** 0.5)


def test_shifts_are_even_and_move_single_stamps():
    still, moving = (motif_domain("digit-circle", shift=shift, distinct=(3, 3)) for shift in (0, 3))
    one, other = (drawn(domain, count=2000)[2] for domain in (still, moving))
    moves = (other - one)[:, :, [1, 3]]
    # Layouts with an overlap are drawn anew for either, so a few differ altogether.
    together = np.abs(moves).max((1, 2)) <= 3
    assert together.mean() >= 0.99
    counts = np.bincount(moves[together].ravel() + 3)
    assert len(counts) == 7
    expected = counts.sum() / 7
    assert np.abs(counts - expected).max() <= 5 * expected**0.5
    assert abs(np.corrcoef(moves[together][:, 0].T)[0, 1]) <= 5 / together.sum() ** 0.5


def test_tiny_gaps_are_wide():
    domain = motif_domain("tiny")
    _, _, motifs = drawn(domain, count=2000)
    for rows in motifs:
        points = centres(rows[rows[:, 0] >= 0])
        apart = np.hypot(*(points[:, None] - points).T)[np.triu_indices(len(points), 1)]
        # A chord over 0.19 turns of the smallest circle, less a pixel of rounding at either end.
        assert apart.min() >= 2 * 8.5 * np.sin(np.pi * 0.19) - 2**0.5


def test_layouts_that_overlap_are_drawn_anew_until_one_does_not():
    crowded = motif_domain("digit-circle", side=60, radii=(12.0, 15.0), distinct=(4, 4))
    _, _, motifs = drawn(crowded, count=200)
    assert (inside(motifs, 60).sum((1, 2)) == 4 * 96).all()


def test_layouts_that_always_overlap_are_an_error():
    impossible = motif_domain("digit-circle", radii=(2.0, 2.5), distinct=(6, 6))
    with pytest.raises(RuntimeError, match="DigitCircle: stamps overlap in all of 1000 layouts"):
        impossible.batch(0, 0, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stamps": "9x9"}, "stamps must be one of 12x8, 7x5, got '9x9'"),
        ({"digits": "10"}, "digits must be some of 0123456789, sorted, got '10'"),
        ({"digits": "0a"}, "digits must be some of"),
        ({"distinct": (3, 11)}, r"distinct must be a range within 1..10 .* got \(3, 11\)"),
        ({"distinct": (4, 3)}, "distinct must be a range"),
        ({"clearance": 9}, "clearance must be at least 9.5"),
        ({"shift": -1}, "shift must be 0 or more, got -1"),
        ({"radii": (20, 36)}, r"radii must be a range above 0, up to 35.0 .* got \(20, 36\)"),
        ({"gap": 0.2}, "gap must lie in 0..1/6"),
        ({"background": 1.5}, "background must lie in 0..1, got 1.5"),
        ({"flips": -0.1}, "flips must lie in 0..1, got -0.1"),
    ],
)
def test_parameters_that_are_not_possible(options, message):
    with pytest.raises(ValueError, match=f"DigitCircle: {message}"):
        motif_domain("digit-circle", **options)
