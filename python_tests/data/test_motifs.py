"""What all motif domains promise: shapes, purity, streams, densities, errors."""

import pickle

import numpy as np
import pytest
import torch

from sparsekern.data import TEST_SEED, VALIDATION_SEED, MotifDomain, motif_domain

# With the options that make the slow ones quick.
OPTIONS = {
    "tiny": {},
    "digit-circle": {},
    "latex": {"longest": 5},
    "audio": {"seconds": 4.0, "count": (2, 4)},
}


@pytest.fixture(scope="module", params=OPTIONS)
def domain(request):
    return motif_domain(request.param, **OPTIONS[request.param])


def test_shapes_and_dtypes(domain):
    assert isinstance(domain, MotifDomain)
    inputs, labels, motifs = domain.batch(3, 10, 6)
    assert inputs.shape == (6, domain.in_channels, *domain.space)
    assert inputs.dtype == (torch.float32 if domain.name == "audio" else torch.uint8)
    assert labels.shape == (6, domain.max_length) and labels.dtype == torch.int64
    assert motifs.shape == (6, domain.max_motifs, 1 + 2 * len(domain.space))
    assert motifs.dtype == torch.int64
    assert all(array.is_contiguous() for array in (inputs, labels, motifs))
    if inputs.dtype == torch.uint8:
        assert set(inputs.unique().tolist()) <= {0, 1}


def test_no_samples(domain):
    inputs, labels, motifs = domain.batch(0, 0, 0)
    assert inputs.shape == (0, domain.in_channels, *domain.space)
    assert labels.shape == (0, domain.max_length)
    assert motifs.shape == (0, domain.max_motifs, 1 + 2 * len(domain.space))


def test_padding_and_boxes_lie_where_they_should(domain):
    _, labels, motifs = domain.batch(0, 0, 12)
    for array, kinds in ((labels, domain.label_symbols), (motifs[:, :, 0], domain.symbols)):
        present = array >= 0
        assert (array[~present] == -1).all() and array.max() < len(kinds)
        assert (present[:, :-1] >= present[:, 1:]).all(), "padding is at the end"
        assert present[:, 0].all()
    absent = motifs[:, :, 0] < 0
    assert (motifs[absent] == -1).all()
    starts, stops = motifs[~absent][:, 1::2], motifs[~absent][:, 2::2]
    assert (starts >= 0).all() and (starts < stops).all()
    assert (stops <= torch.tensor(domain.space)).all()


def test_samples_do_not_depend_on_their_batch(domain):
    whole = domain.batch(7, 3, 5)
    for sample in (4, 0, 2):
        single = domain.batch(7, 3 + sample, 1)
        for one, all_of_them in zip(single, whole, strict=True):
            assert torch.equal(one[0], all_of_them[sample])
    for one, other in zip(domain.batch(7, 5, 3), whole, strict=True):
        assert torch.equal(one, other[2:])


def test_equal_parameters_mean_equal_samples(domain):
    again = motif_domain("audio" if domain.name == "audio" else domain.name, **OPTIONS[domain.name])
    assert again == domain and hash(again) == hash(domain)
    copied = pickle.loads(pickle.dumps(domain))
    for one, two, three in zip(*(d.batch(1, 0, 2) for d in (domain, again, copied)), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_streams_differ(domain):
    seeds = (0, 1, VALIDATION_SEED, TEST_SEED, 2**63 - 1, -(2**63))
    inputs = [domain.batch(seed, 0, 1).inputs for seed in seeds]
    for one in range(len(seeds)):
        for other in range(one):
            assert not torch.equal(inputs[one], inputs[other])


@pytest.mark.parametrize(
    "name, channels, published, within",
    [
        ("tiny", 4, 9.57e-4, 1e-3),
        ("digit-circle", 10, 4.492e-5, 0.01),  # theirs is the mean of 1000 samples
        ("latex", 32, 6.97e-6, 0.01),
        ("audio", 10, 1.168e-3, 1e-3),
    ],
)
def test_densities_are_the_published_ones(name, channels, published, within):
    domain = motif_domain(name)
    assert domain.density(channels) == pytest.approx(published, rel=within)
    assert domain.density(channels) * channels * np.prod(domain.space) == pytest.approx(
        domain.mean_motifs()
    )


def test_published_sizes():
    facts = {
        name: (d.in_channels, d.space, len(d.symbols), d.max_length, d.margin, d.one_to_one)
        for name in OPTIONS
        for d in [motif_domain(name)]
    }
    assert facts == {
        "tiny": (1, (28, 28), 4, 4, 0, True),
        "digit-circle": (1, (100, 100), 10, 6, 0, True),
        "latex": (1, (120, 360), 20, 30, 2, False),
        "audio": (64, (642,), 10, 10, 0, False),
    }


def test_unknown_names_and_parameters():
    with pytest.raises(ValueError, match=r"motif_domain: name must be one of tiny, .*got 'video'"):
        motif_domain("video")
    with pytest.raises(TypeError, match="colour"):
        motif_domain("tiny", colour=3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((2**63, 0, 1), "seed must fit in an int64, got 9223372036854775808"),
        ((0, -1, 1), "first and count must be 0 or more .* got -1 and 1"),
        ((0, 0, -1), "first and count must be 0 or more .* got 0 and -1"),
        ((0, 2**63 - 1, 1), "their sum fit in an int64"),
    ],
)
def test_batches_that_are_not_possible(arguments, message):
    with pytest.raises(ValueError, match=f"batch: .*{message}"):
        motif_domain("tiny").batch(*arguments)


def test_density_needs_channels():
    with pytest.raises(ValueError, match="density: channels must be at least 1, got 0"):
        motif_domain("tiny").density(0)
