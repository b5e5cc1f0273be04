"""Mutual information, its gap and selectivity, on codes whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sparsekern.measures.disentanglement import (
    discretize,
    entropies,
    mig,
    mig_monte_carlo,
    monte_carlo_information,
    mutual_information,
    selectivity,
)

SIZES = (3, 6, 8)
GRID = torch.cartesian_prod(*(torch.arange(size) for size in SIZES)).repeat(20, 1)


def noise(units: int, rows: int = len(GRID)) -> torch.Tensor:
    return torch.randn(rows, units, generator=torch.Generator().manual_seed(0))


def test_bins_are_those_of_numpy():
    codes = torch.cat((noise(3), torch.full((len(GRID), 1), 0.7), GRID[:, :1].float()), 1).double()
    labels = discretize(codes)
    for unit in range(codes.shape[1]):
        values = codes[:, unit].numpy()
        expected = np.digitize(values, np.histogram(values, 20)[1][:-1]) - 1
        assert len(np.unique(labels[:, unit])) == len(np.unique(expected))
        # the last bits of an edge may differ, where a value lies on it
        assert np.mean(labels[:, unit].numpy() != (expected if unit != 3 else 0)) < 0.002


def test_information_of_known_joint_counts():
    code = torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1])
    factor = torch.tensor([0, 0, 1, 1, 1, 1, 1, 0])
    joint = {(0, 0): 2 / 8, (0, 1): 1 / 8, (1, 1): 4 / 8, (1, 0): 1 / 8}
    p_code, p_factor = {0: 3 / 8, 1: 5 / 8}, {0: 3 / 8, 1: 5 / 8}
    expected = sum(p * math.log(p / (p_code[c] * p_factor[f])) for (c, f), p in joint.items())
    found = mutual_information(code.unsqueeze(1), factor.unsqueeze(1)).item()
    assert found == pytest.approx(expected, rel=1e-12)


def test_factors_as_code_have_the_largest_gap():
    codes = torch.cat((GRID.float(), noise(1) * 0), 1)
    assert entropies(GRID).tolist() == pytest.approx([math.log(size) for size in SIZES])
    found = mig(codes, GRID)
    assert found.score == pytest.approx(1) and found.factors == pytest.approx((1, 1, 1))
    permuted = mig(codes[:, [2, 3, 0, 1]] * torch.tensor([-2.0, 1, 3, 1]), GRID)
    assert permuted.factors == pytest.approx(found.factors)


def test_noise_and_duplicates_have_none():
    assert mig(noise(5), GRID).score < 0.05
    twice = torch.cat((GRID, GRID), 1).float()
    assert mig(twice, GRID).score == pytest.approx(0, abs=1e-12)
    constant = torch.ones(len(GRID), 2)
    assert mig(constant, GRID).score == 0
    with_constant = torch.cat((GRID.float(), constant), 1)
    assert mig(with_constant, GRID).score == pytest.approx(1)


def test_a_factor_of_one_value_is_left_out():
    factors = torch.cat((torch.zeros(len(GRID), 1, dtype=torch.int64), GRID), 1)
    found = mig(GRID.float(), factors)
    assert math.isnan(found.factors[0]) and found.score == pytest.approx(1)
    assert 0 not in selectivity(GRID.float(), factors).factor.tolist()
    with pytest.raises(ValueError, match="factors must include one with more than one value"):
        mig(GRID.float(), factors[:, :1])


def test_the_interval_holds_the_score_and_is_repeatable():
    codes = GRID.float() + 0.7 * noise(3)
    found = mig(codes, GRID, resamples=60, seed=1)
    assert found.low < found.score + 0.05 and found.score - 0.05 < found.high
    assert 0 < found.high - found.low < 0.2
    assert found == mig(codes, GRID, resamples=60, seed=1)
    wider = mig(codes, GRID, resamples=60, seed=1, level=0.5)
    assert found.low < wider.low < wider.high < found.high


def test_selectivity_names_the_factor():
    codes = torch.stack((GRID[:, 1], -GRID[:, 2], torch.zeros(len(GRID))), 1).float()
    found = selectivity(torch.cat((codes, noise(1)), 1), GRID)
    assert found.factor[:2].tolist() == [1, 2]
    assert found.value[:2].tolist() == pytest.approx([1, 1])
    assert abs(found.value[2]) < 1e-12 and found.value[3] < 0.1


@pytest.mark.slow
def test_monte_carlo_agrees_with_what_is_known():
    """Narrow posteriors at a factor's values carry log(size); wide ones nothing."""
    mean = torch.cat((GRID.double(), torch.zeros(len(GRID), 1)), 1)
    logvar = torch.full_like(mean, -8.0)
    information = monte_carlo_information(mean, logvar, GRID, samples=1500)
    for unit, size in enumerate(SIZES):
        assert information[unit, unit].item() == pytest.approx(math.log(size), abs=0.06)
    off = information - torch.diag_embed(information.diagonal())[:1].new_zeros(4, 3)
    off[torch.arange(3), torch.arange(3)] = 0
    assert off.max() < 0.12
    assert mig_monte_carlo(mean, logvar, GRID, samples=1500).score == pytest.approx(1, abs=0.08)
    blurred = mig_monte_carlo(mean, torch.full_like(mean, 6.0), GRID, samples=1500)
    assert blurred.score < 0.1


def test_monte_carlo_of_one_gaussian():
    """Two values of a factor at distance 2 a: I = entropy of the mixture - entropy of one part."""
    factor = torch.tensor([[0], [1]]).repeat(200, 1)
    mean = (factor * 2 - 1).double() * 1.0
    found = monte_carlo_information(mean, torch.zeros_like(mean), factor, samples=40_000).item()
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = sum((-0.5 * (z - c).square()).exp() for c in (-1, 1)) / math.sqrt(8 * math.pi)
    mixture = -torch.trapezoid(density * density.log(), z).item()
    assert found == pytest.approx(mixture - 0.5 * math.log(2 * math.pi * math.e), abs=0.02)


BAD = {
    "a vector": (lambda: mig(noise(1)[:, 0], GRID), r"codes must be \[rows, units\]"),
    "integers": (lambda: mig(GRID, GRID), "codes must be .* floating point"),
    "one unit": (lambda: mig(noise(1), GRID), "at least two units, got 1"),
    "rows": (lambda: mig(noise(2), GRID[:5]), r"factors must be \[2880, factors\] integers"),
    "floats": (lambda: mig(noise(2), GRID.float()), "factors must be .* integers"),
    "NaN": (lambda: mig(noise(2) * torch.nan, GRID), "codes must be finite"),
    "one row": (lambda: mig(noise(2, 1), GRID[:1]), "at least two rows, got 1"),
    "logvar": (
        lambda: mig_monte_carlo(noise(2), noise(3), GRID),
        r"logvar must be \[2880, 2\], got \[2880, 3\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        call()
