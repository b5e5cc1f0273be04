"""Formulas: the grammar, their pictures, and the noisy canvases.

Bounds of statistics are five standard deviations; the seeds are fixed.
"""

import collections

import numpy as np
import pytest

from sparsekern.data import motif_domain
from sparsekern.data.motifs import formula_grammar, formula_pictures

PIXELS = 39.0


def tokens_of(text):
    """The tokens of a formula in LaTeX."""
    tokens = []
    while text:
        token = max((t for t in formula_grammar.TOKENS if text.startswith(t)), key=len)
        tokens.append(token)
        text = text[len(token) :]
    return tuple(tokens)


def boxes_of(text, pixels=PIXELS):
    """The picture of a formula, and the boxes (rows, columns) of each of its symbols."""
    drawn = formula_pictures.picture(tokens_of(text), pixels)
    boxes = collections.defaultdict(list)
    for symbol, *box in drawn.motifs.tolist():
        boxes[formula_pictures.SYMBOLS[symbol]].append(box)
    return drawn, boxes


# -- grammar ---------------------------------------------------------------------------------------


def formulas(length, count, seed=0):
    random = np.random.default_rng(seed)
    numbers = random.random((count, formula_grammar.numbers_of(length)))
    return [formula_grammar.formula(length, iter(row.tolist())) for row in numbers]


@pytest.mark.parametrize("length", range(1, 31))
def test_formulas_have_their_length_and_enough_random_numbers(length):
    for tokens in formulas(length, 100):
        assert len(tokens) == length and set(tokens) <= set(formula_grammar.TOKENS)


@pytest.mark.parametrize("length", [9, 30])
def test_brackets_match(length):
    for tokens in formulas(length, 300):
        closing = []
        for token in tokens:
            if token in ("^{", "_{", "\\frac{", "("):
                closing.append({"\\frac{": "}{", "(": ")"}.get(token, "}"))
            elif token in ("}{", "}", ")"):
                assert closing.pop() == token
                closing += ["}"] * (token == "}{")
        assert not closing


def grown(random):
    """A formula of any length, production by production as in the grammar, or None if long."""
    pending, tokens = ["E"], []
    while pending:
        symbol = pending.pop(0)
        if symbol != "E":
            tokens.append(symbol)
            continue
        character = formula_grammar.DIGITS_AND_LETTERS[random.integers(16)]
        rules = [
            [character],
            [character, "^{", "E", "}"],
            [character, "_{", "E", "}"],
            ["E", "+", "E"],
            ["E", "E"],
            ["(", "E", ")"],
            ["\\frac{", "E", "}{", "E", "}"],
        ]
        weights = np.array([1] + 6 * [0.25])
        pending = rules[random.choice(7, p=weights / weights.sum())] + pending
        if len(tokens) + len(pending) > 6:
            return None
    return tuple(tokens)


def test_formulas_are_those_of_the_grammar_given_their_length():
    random = np.random.default_rng(1)
    by_length = collections.defaultdict(list)
    for _ in range(12_000):
        tokens = grown(random)
        if tokens:
            by_length[len(tokens)].append(tokens)

    def shape(tokens):
        return "".join("c" if t in formula_grammar.DIGITS_AND_LETTERS else t for t in tokens)

    for length in (2, 3, 4, 5, 6):
        theirs = collections.Counter(map(shape, by_length[length]))
        ours = collections.Counter(map(shape, formulas(length, 4000)))
        total = sum(theirs.values())
        assert total >= 100
        for kind in theirs.keys() | ours.keys():
            share = ours[kind] / 4000
            variance = max(share * (1 - share), 1 / total) * (1 / total + 1 / 4000)
            assert abs(theirs[kind] / total - share) <= 5 * variance**0.5, kind


def test_characters_are_equally_likely():
    counts = collections.Counter(token for f in formulas(5, 3000) for token in f)
    numbers = np.array([counts[c] for c in formula_grammar.DIGITS_AND_LETTERS])
    assert np.abs(numbers - numbers.mean()).max() <= 5 * numbers.mean() ** 0.5


@pytest.mark.parametrize("length, mean", [(1, 1), (2, 2), (10, None), (30, None)])
def test_mean_motifs_of_a_length(length, mean):
    expected = formula_grammar.mean_motifs(length)
    numbers = np.array([formula_grammar.motifs_of(tokens) for tokens in formulas(length, 3000)])
    assert numbers.mean() == pytest.approx(expected, abs=5 * numbers.std() / 3000**0.5 + 1e-12)
    assert mean is None or expected == pytest.approx(mean)


# -- pictures --------------------------------------------------------------------------------------


def test_every_symbol_has_a_box_that_fits_its_ink():
    for symbol in formula_grammar.CHARACTERS:
        drawn, boxes = boxes_of(symbol)
        assert boxes[symbol] == [[0, drawn.ink.shape[0], 0, drawn.ink.shape[1]]]
        for edge in (drawn.ink[0], drawn.ink[-1], drawn.ink[:, 0], drawn.ink[:, -1]):
            assert edge.any()
        assert 0.05 <= drawn.ink.mean() <= 0.7, "strokes and holes"


def test_pictures_of_symbols_differ():
    pictures = [formula_pictures.picture((c,), PIXELS).ink for c in formula_grammar.CHARACTERS]
    assert len({(ink.shape, ink.tobytes()) for ink in pictures}) == 19


def test_superscripts_are_smaller_and_higher_and_subscripts_lower():
    _, boxes = boxes_of("7^{7}")
    (top, bottom, left, right), (top_2, bottom_2, left_2, right_2) = boxes["7"]
    assert left_2 >= left and right_2 > right and top_2 < top
    assert bottom_2 - top_2 == pytest.approx(0.7 * (bottom - top), abs=2)
    _, boxes = boxes_of("7_{7}")
    (_, bottom, _, _), (_, bottom_2, _, _) = boxes["7"]
    assert bottom_2 > bottom


def test_fractions_have_a_bar_between_their_parts():
    drawn, boxes = boxes_of("\\frac{1+2}{x}")
    [(top, bottom, left, right)] = boxes["\\frac"]
    assert drawn.ink[top:bottom, left:right].all() and right - left >= 8 * (bottom - top)
    for above in ("1", "+", "2"):
        assert boxes[above][0][1] <= top
        assert left <= boxes[above][0][2] and boxes[above][0][3] <= right + 1
    assert boxes["x"][0][0] >= bottom


def test_a_picture_is_the_union_of_stamps_that_look_the_same_everywhere():
    drawn, boxes = boxes_of("b+\\frac{b}{b}b")
    tallest = max(bottom - top for top, bottom, _, _ in boxes["b"])
    large = [box for box in boxes["b"] if box[1] - box[0] == tallest]
    assert len(large) == 2 and len(boxes["b"]) == 4
    one, other = (drawn.ink[t:b, le:r] for t, b, le, r in large)
    assert (one == other).all()
    covered = np.zeros_like(drawn.ink)
    for _, top, bottom, left, right in drawn.motifs:
        covered[top:bottom, left:right] = 1
    assert (covered >= drawn.ink).all()


@pytest.mark.parametrize(
    "text",
    ["x", "3+4", "a^{2}+b_{10}", "\\frac{x+1}{2}", "(y)\\frac{4}{c^{7}}", "0_{a_{b_{c_{1}}}}"],
)
def test_pictures_look_as_matplotlib_draws_them(text):
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    ours = formula_pictures.picture(tokens_of(text), PIXELS).ink
    font = FontProperties(size=PIXELS, math_fontfamily="cm")
    theirs = np.asarray(MathTextParser("agg").parse(f"${text}$", 72, font).image) > 255 / 4
    rows, columns = np.flatnonzero(theirs.any(1)), np.flatnonzero(theirs.any(0))
    theirs = theirs[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # Theirs are hinted, and pieces are put elsewhere by up to a pixel.
    assert np.abs(np.subtract(ours.shape, theirs.shape)).max() <= 3
    room = np.add(ours.shape, 6)
    canvas = np.zeros(room, bool)
    canvas[3 : 3 + ours.shape[0], 3 : 3 + ours.shape[1]] = ours
    best = 0.0
    for y in range(room[0] - theirs.shape[0] + 1):
        for x in range(room[1] - theirs.shape[1] + 1):
            other = np.zeros(room, bool)
            other[y : y + theirs.shape[0], x : x + theirs.shape[1]] = theirs
            best = max(best, (canvas & other).sum() / (canvas | other).sum())
    assert best >= 0.65


def test_the_smallest_sizes_still_have_ink():
    text = "1"
    for _ in range(8):
        text = f"z^{{{text}}}"
    drawn, boxes = boxes_of(text, 27.0)
    assert len(boxes["z"]) == 8 and len(boxes["1"]) == 1
    for _, top, bottom, left, right in drawn.motifs:
        assert drawn.ink[top:bottom, left:right].any()


# -- canvases --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def domain():
    return motif_domain("latex")


@pytest.fixture(scope="module")
def batch(domain):
    return domain.batch(0, 0, 120)


def clean(domain, label, motifs):
    """The canvas without noise: the picture of the label's tokens, where the motifs are."""
    tokens = tuple(domain.label_symbols[number] for number in label[label >= 0])
    drawn = formula_pictures.picture(tokens, domain.font_pixels)
    motifs = motifs[motifs[:, 0] >= 0]
    top, left = motifs[:, 1].min(), motifs[:, 3].min()
    assert (motifs == drawn.motifs + np.array([0, top, top, left, left])).all()
    canvas = np.zeros(domain.canvas, np.uint8)
    canvas[top : top + drawn.ink.shape[0], left : left + drawn.ink.shape[1]] = drawn.ink
    return canvas


def test_labels_and_motifs_give_the_picture_back(domain, batch):
    quiet = motif_domain("latex", noise=0).batch(0, 0, 40)
    for image, label, motifs in zip(*(part.numpy() for part in quiet), strict=True):
        assert (image[0] == clean(domain, label, motifs)).all()
    assert (quiet.labels == batch.labels[:40]).all() and (quiet.motifs == batch.motifs[:40]).all()


def test_noise_only_adds_ink(domain, batch):
    share = []
    for image, label, motifs in zip(*(part[:40].numpy() for part in batch), strict=True):
        ink = clean(domain, label, motifs) == 1
        assert image[0][ink].all()
        share.append(image[0][~ink].mean())
    assert np.mean(share) == pytest.approx(0.25, abs=5 * (0.1875 / 43_200 / 40) ** 0.5)


def test_motifs_are_those_of_the_label(domain, batch):
    for label, motifs in zip(batch.labels.numpy(), batch.motifs.numpy(), strict=True):
        tokens = [domain.label_symbols[number] for number in label[label >= 0]]
        in_label = [
            "\\frac" if token == formula_grammar.FRACTION else token
            for token in tokens
            if token in (*formula_grammar.CHARACTERS, formula_grammar.FRACTION)
        ]
        in_picture = [domain.symbols[number] for number in motifs[:, 0] if number >= 0]
        assert sorted(in_label) == sorted(in_picture)


def test_lengths_are_even_and_motifs_as_many_as_expected(domain, batch):
    lengths = (batch.labels >= 0).sum(1).double()
    assert lengths.min() >= 1 and lengths.max() <= 30
    assert lengths.mean() == pytest.approx(15.5, abs=5 * (899 / 12 / 120) ** 0.5)
    assert len(lengths.unique()) >= 25
    numbers = (batch.motifs[:, :, 0] >= 0).sum(1).double()
    assert numbers.mean() == pytest.approx(
        domain.mean_motifs(), abs=5 * float(numbers.std()) / 120**0.5
    )
    assert domain.mean_motifs() == pytest.approx(9.64, abs=0.05)


def test_formulas_stand_anywhere(domain, batch):
    present = batch.motifs[:, :, :1] >= 0
    ends = batch.motifs.where(present, -1).amax(1)[:, [2, 4]]
    starts = batch.motifs.where(present, 1000).amin(1)[:, [1, 3]]
    room = starts + (ends.new_tensor(domain.canvas) - ends)
    share = (starts / room.clamp(min=1))[(room > 30).all(1)]
    assert (share.mean(0) - 0.5).abs().max() <= 5 * (1 / 12 / len(share)) ** 0.5
    assert abs(np.corrcoef(share.T)[0, 1]) <= 5 / len(share) ** 0.5


def test_formulas_that_do_not_fit_are_replaced_by_others_of_their_length():
    options = {"canvas": (120, 90), "longest": 12}
    narrow = motif_domain("latex", **options).batch(0, 0, 30)
    wide = motif_domain("latex", longest=12).batch(0, 0, 30)
    replaced = (narrow.labels != wide.labels).any(1)
    assert 0 < replaced.sum() < 30
    assert ((narrow.labels >= 0).sum(1) == (wide.labels >= 0).sum(1)).all()
    assert narrow.motifs[:, :, 4].max() <= 90


def test_a_canvas_that_fits_no_formula_is_an_error(monkeypatch):
    monkeypatch.setattr("sparsekern.data.motifs.latex_formulas.ATTEMPTS", 5)
    with pytest.raises(RuntimeError, match=r"none of 5 formulas of .* fits the canvas"):
        motif_domain("latex", canvas=(5, 5)).batch(0, 0, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"canvas": (0, 3)}, r"canvas must be rows and columns, 1 or more, got \(0, 3\)"),
        ({"longest": 0}, "longest must be 1 or more, got 0"),
        ({"points": 0}, "points must be positive, got 0"),
        ({"dots_per_inch": -1}, "dots_per_inch must be positive, got -1"),
        ({"noise": 2}, r"noise must lie in 0\.\.1, got 2"),
    ],
)
def test_parameters_that_are_not_possible(options, message):
    with pytest.raises(ValueError, match=f"LatexFormulas: {message}"):
        motif_domain("latex", **options)
