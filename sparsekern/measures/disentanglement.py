"""How well single units stand for single factors of variation.

All of it comes from I(z; v), the mutual information of a unit z and a factor v, in nats:

    gap of v          = (I of the best unit - I of the second best) / H(v)
    MIG               = mean over the factors of their gaps                                [0, 1]
    selectivity of z  = max over the factors of I(z; v) / H(v)                             [0, 1]

Two published estimators of I: `mutual_information` counts in histograms (Locatello et al. 2019,
disentanglement_lib: 20 bins of equal width for each unit, on the mean code of 10,000 samples), and
`monte_carlo_information` integrates over Gaussian posteriors (Chen et al. 2018, arXiv 1802.04942).

Estimates by histograms are too large by about (bins - 1) (values - 1) / (2 rows) nats, so compare
codes on the same number of rows only. A factor that has one value carries no information and is
left out of means.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BINS = 20
# Elements of temporaries.
BLOCK = 1 << 24
# The same where they had better stay in a core's cache.
CACHED_BLOCK = 1 << 17


class Gap(NamedTuple):
    """A mutual information gap: its mean over the factors, and one gap for each of them.

    ``score`` is the mean; ``factors`` has NaN where a factor has one value; ``low`` and ``high``
    are a bootstrap interval of the score (NaN without resamples).
    """

    score: float
    factors: tuple[float, ...]
    low: float
    high: float


class Selectivity(NamedTuple):
    """For each unit: value [units] in 0..1, and factor int64 [units], the one it stands for."""

    value: Tensor
    factor: Tensor


def _check_codes(op: str, codes: Tensor, factors: Tensor) -> None:
    if codes.dim() != 2 or not codes.is_floating_point():
        raise ValueError(
            f"{op}: codes must be [rows, units] floating point, got {list(codes.shape)} of "
            f"{codes.dtype}"
        )
    if factors.dim() != 2 or factors.is_floating_point() or len(factors) != len(codes):
        raise ValueError(
            f"{op}: factors must be [{len(codes)}, factors] integers, got {list(factors.shape)} of "
            f"{factors.dtype}"
        )
    if len(codes) < 2:
        raise ValueError(f"{op}: codes must have at least two rows, got {len(codes)}")
    if not codes.isfinite().all():
        raise ValueError(f"{op}: codes must be finite, got NaN or infinities")


def _number_classes(factor: Tensor) -> tuple[Tensor, int]:
    """Turn a factor's values into 0, 1, ...; return those and how many there are."""
    values, classes = factor.unique(return_inverse=True)
    return classes, len(values)


def discretize(codes: Tensor, bins: int = BINS) -> Tensor:
    """Sort each unit's values into bins of equal width between its smallest and largest value.

    Args:
        codes: [rows, units] floating point.
        bins: how many.

    Returns:
        int64 [rows, units] in 0..bins-1; a unit that is constant has one bin.
    """
    codes = codes.double()
    low, high = codes.amin(0), codes.amax(0)
    steps = torch.arange(bins, dtype=torch.float64, device=codes.device) / bins
    edges = low.unsqueeze(1) + (high - low).unsqueeze(1) * steps  # left edges
    labels = torch.searchsorted(edges, codes.t().contiguous(), right=True) - 1
    return torch.where((high == low).unsqueeze(1), 0, labels).t().contiguous()


def _information_of_counts(counts: Tensor) -> Tensor:
    """Compute the mutual information [...] in nats of counts [..., values, bins]."""
    joint = counts / counts.sum((-2, -1), keepdim=True)
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    ratio = torch.where(joint > 0, joint / independent, 1)
    return (joint * ratio.log()).sum((-2, -1)).clamp_min(0)


class _Histograms:
    """Joint histograms of units and factors, for any weights of the rows.

    Only entries outside the first bin are counted one by one; what is left of a factor's value lies
    in the first. In a sparse code that is nearly everything, since its zeros are its minimum.

    Args:
        labels: [rows, units] in 0..bins-1.
        bins: how many.
        factors: [rows, factors] integer classes.
    """

    def __init__(self, labels: Tensor, bins: int, factors: Tensor) -> None:
        self.rows, self.units = labels.shape
        self.bins = bins
        self.factors = [_number_classes(factor) for factor in factors.unbind(1)]
        largest = max(size for _, size in self.factors)
        step = max(1, BLOCK // max(self.rows, largest * bins))
        self.blocks = []
        for part in labels.split(step, dim=1):
            row, unit = part.nonzero(as_tuple=True)
            self.blocks.append((part.shape[1], row, unit, part[row, unit]))

    def information(self, weights: Tensor) -> Tensor:
        """Compute the mutual information [units, factors] under weights float64 [rows]."""
        per_factor = []
        for classes, size in self.factors:
            whole = classes.bincount(weights, size)
            parts = []
            for width, row, unit, label in self.blocks:
                cell = (unit * size + classes[row]) * self.bins + label
                counts = cell.bincount(weights[row], width * size * self.bins)
                counts = counts.view(width, size, self.bins)
                counts[:, :, 0] = whole - counts.sum(-1)
                parts.append(_information_of_counts(counts))
            per_factor.append(torch.cat(parts))
        return torch.stack(per_factor, 1)


def entropies(factors: Tensor) -> Tensor:
    """Compute H(v) of each factor in nats: factors int [rows, factors] -> float64 [factors]."""
    per_factor = []
    for factor in factors.unbind(1):
        classes, size = _number_classes(factor)
        share = classes.bincount(minlength=size).double() / len(classes)
        per_factor.append(-(share * share.log()).sum())
    return torch.stack(per_factor)


def mutual_information(codes: Tensor, factors: Tensor, *, bins: int = BINS) -> Tensor:
    """Estimate I(z; v) of every unit and factor, counted in histograms.

    Args:
        codes: [rows, units] floating point, finite.
        factors: [rows, factors] integer classes.
        bins: of each unit, of equal width.

    Returns:
        float64 [units, factors], nats.

    Raises:
        ValueError: shapes or dtypes that do not fit, NaN, or fewer than two rows.

    Example:
        >>> import torch
        >>> factor = torch.tensor([[0], [1], [0], [1]])
        >>> from sparsekern.measures.disentanglement import mutual_information
        >>> round(mutual_information(factor.double(), factor).item(), 4)  # log 2
        0.6931
    """
    _check_codes("mutual_information", codes, factors)
    weights = torch.ones(len(codes), dtype=torch.float64, device=codes.device)
    return _Histograms(discretize(codes, bins), bins, factors).information(weights)


def mig(
    codes: Tensor,
    factors: Tensor,
    *,
    bins: int = BINS,
    resamples: int = 0,
    level: float = 0.95,
    seed: int = 0,
) -> Gap:
    """Compute the mutual information gap of a code, by histograms.

    Args:
        codes: [rows, units] floating point, finite, at least two units.
        factors: [rows, factors] integer classes.
        bins: of each unit, of equal width.
        resamples: bootstrap samples of the rows for the interval; 0 makes none.
        level: of the interval, by percentiles.
        seed: of the bootstrap.

    Raises:
        ValueError: as `mutual_information`, fewer than two units, or no factor with two values.

    Source: Chen et al. 2018; estimator of disentanglement_lib (Locatello et al. 2019).
    """
    op = "mig"
    _check_codes(op, codes, factors)
    if codes.shape[1] < 2:
        raise ValueError(f"{op}: codes must have at least two units, got {codes.shape[1]}")
    entropy = entropies(factors)
    if not (entropy > 0).any():
        raise ValueError(f"{op}: factors must include one with more than one value, got none")
    histograms = _Histograms(discretize(codes, bins), bins, factors)
    ones = torch.ones(len(codes), dtype=torch.float64, device=codes.device)
    gaps = _gaps(histograms.information(ones), entropy)
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(resamples):
        drawn = torch.randint(len(codes), (len(codes),), generator=generator)
        weights = drawn.bincount(minlength=len(codes)).double().to(codes.device)
        scores.append(_gaps(histograms.information(weights), entropy).nanmean())
    low = high = math.nan
    if scores:
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = torch.stack(scores).cpu().quantile(tails).tolist()
    return Gap(gaps.nanmean().item(), tuple(gaps.tolist()), low, high)


def _gaps(information: Tensor, entropy: Tensor) -> Tensor:
    """Compute the gap of each factor, NaN where its entropy is 0.

    Information is [units, factors], entropy [factors].
    """
    best = information.topk(2, dim=0).values
    return torch.where(entropy > 0, (best[0] - best[1]) / entropy, torch.nan)


def selectivity(codes: Tensor, factors: Tensor, *, bins: int = BINS) -> Selectivity:
    """Measure how much each unit tells about the one factor that it tells most about.

    Args:
        codes: [rows, units] floating point, finite.
        factors: [rows, factors] integer classes; one with a single value is never chosen.
        bins: of each unit, of equal width.
    """
    information = mutual_information(codes, factors, bins=bins)
    entropy = entropies(factors)
    share = torch.where(entropy > 0, information / entropy, 0)
    return Selectivity(*share.max(1))


# -- Gaussian posteriors ---------------------------------------------------------------------------


def monte_carlo_information(
    mean: Tensor, logvar: Tensor, factors: Tensor, *, samples: int = 10_000, seed: int = 0
) -> Tensor:
    """Estimate I(z; v) of latents and factors, from posteriors q(z | x) = N(mean, exp(logvar)).

    H(z) = -E log q(z) with q(z) = mean over the rows of q(z | x), over samples of rows and of z;
    H(z | v) is the mean over v's values of the same, among the rows with that value.

    Args:
        mean: [rows, latents] floating point, of data in which factors are independent.
        logvar: [rows, latents], the logarithms of the variances.
        factors: [rows, factors] integer classes.
        samples: for each entropy. Time and memory grow with samples * rows * latents.
        seed: of the samples.

    Returns:
        float64 [latents, factors], nats, at least 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, or NaN.

    Source: Chen et al. 2018 (arXiv 1802.04942), appendix C.
    """
    op = "monte_carlo_information"
    _check_codes(op, mean, factors)
    if logvar.shape != mean.shape:
        raise ValueError(f"{op}: logvar must be {list(mean.shape)}, got {list(logvar.shape)}")
    generator = torch.Generator().manual_seed(seed)
    whole = _entropy(mean, logvar, samples, generator)
    per_factor = []
    for factor in factors.unbind(1):
        classes, size = _number_classes(factor)
        conditional = torch.zeros_like(whole)
        for value in range(size):
            rows = classes == value
            conditional += _entropy(mean[rows], logvar[rows], samples, generator) / size
        per_factor.append((whole - conditional).clamp_min(0))
    return torch.stack(per_factor, 1)


def _entropy(mean: Tensor, logvar: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Estimate H of each latent of the mixture of the rows' posteriors: float64 [latents]."""
    rows, latents = mean.shape
    drawn = torch.randint(rows, (samples,), generator=generator)
    noise = torch.randn(samples, latents, generator=generator).to(mean.device)
    z = mean[drawn] + noise * (0.5 * logvar[drawn]).exp()
    # Rows last, since sums run over them.
    means, scale = mean.t().contiguous(), (-0.5 * logvar).exp().t().contiguous()
    constant = 0.5 * (logvar + math.log(2 * math.pi)).t().contiguous()
    total = torch.zeros(latents, dtype=torch.float64, device=mean.device)
    block = BLOCK if mean.device.type == "cuda" else CACHED_BLOCK
    for part in z.split(max(1, block // (rows * latents))):
        log_density = part.unsqueeze(2) - means
        log_density.mul_(scale).square_().mul_(-0.5).sub_(constant)
        total += log_density.logsumexp(2).sum(0, dtype=torch.float64)
    return math.log(rows) - total / samples


def mig_monte_carlo(
    mean: Tensor, logvar: Tensor, factors: Tensor, *, samples: int = 10_000, seed: int = 0
) -> Gap:
    """Compute the mutual information gap of Gaussian posteriors, as its authors estimate it.

    Normalised by the logarithm of a factor's number of values. Arguments and errors are those of
    :func:`monte_carlo_information`.
    """
    information = monte_carlo_information(mean, logvar, factors, samples=samples, seed=seed)
    sizes = [_number_classes(factor)[1] for factor in factors.unbind(1)]
    entropy = torch.tensor(sizes, dtype=torch.float64, device=mean.device).log()
    gaps = _gaps(information, entropy)
    return Gap(gaps.nanmean().item(), tuple(gaps.tolist()), math.nan, math.nan)
