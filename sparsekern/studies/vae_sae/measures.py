"""What is measured of a VAE-SAE model."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...measures.activity import UnitActivity
from ...measures.disentanglement import Gap, mig, mig_monte_carlo, selectivity
from ...models.vae_sae import VAESAE, vae_sae_loss
from ...ops.codes_to_dense import codes_to_dense
from .images import Part, pixels

BATCH = 256
# A quick estimate of MIG during training, and the one at the end: resamples of the bootstrap.
QUICK_ROWS, RESAMPLES = 4096, 100
# The sparse code is fifty times as wide as z.
CODE_RESAMPLES = 10
MONTE_CARLO_SAMPLES = 1000


class Pass(NamedTuple):
    """One pass over images with z at its posterior mean, or drawn."""

    reconstruction: float
    """nats per image."""
    kl: float
    """nats per image."""
    activity: UnitActivity
    mean: Tensor
    """[n, Z]."""
    log_variance: Tensor
    """[n, Z]."""
    codes: Tensor | None
    """[n, N] dense activations, where they were asked for."""


@torch.no_grad()
def run_over(
    model: VAESAE, images: Tensor, *, sample_seed: int | None = None, keep_codes: bool = False
) -> Pass:
    """Run a model in evaluation mode over images uint8 [n, C, side, side], n >= 1.

    Args:
        model: in evaluation mode.
        images: on the model's device.
        sample_seed: draw z with this seed; by default z is the posterior mean.
        keep_codes: return the activations of the sparse layer.
    """
    device = images.device
    activity = UnitActivity(model.units, device)
    all_units = torch.arange(model.units, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    means, log_variances, codes = [], [], []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if sample_seed is not None:
            torch.manual_seed(sample_seed)
        for part in images.split(BATCH):
            x = pixels(part)
            output = model(x, sample=sample_seed is not None)
            loss = vae_sae_loss(output, x)
            sums += torch.stack((loss.reconstruction, loss.kl)).double() * len(part)
            indices = output.indices
            if indices is None:
                indices = all_units.expand_as(output.values)
            activity.update(output.values, indices)
            means.append(output.mean)
            log_variances.append(output.log_variance)
            if keep_codes:
                codes.append(codes_to_dense(output.values, indices, model.units))
    reconstruction, kl = (sums / len(images)).tolist()
    all_codes = torch.cat(codes) if keep_codes else None
    return Pass(reconstruction, kl, activity, torch.cat(means), torch.cat(log_variances), all_codes)


def evaluate(model: VAESAE, images: Tensor, *, sample_seed: int | None = None) -> dict[str, Any]:
    """Measure reconstruction and kl in nats per image, l0, and dead.

    For dead see :meth:`UnitActivity.dead_panel`.

    Args:
        model: in evaluation mode.
        images: uint8 [n, C, side, side], at least one, on the model's device.
        sample_seed: draw z with this seed; by default z is the posterior mean.
    """
    return _basic_facts(run_over(model, images, sample_seed=sample_seed))


def _basic_facts(one_pass: Pass) -> dict[str, Any]:
    """Collect what :func:`evaluate` returns."""
    return {
        "reconstruction": one_pass.reconstruction,
        "kl": one_pass.kl,
        "l0": one_pass.activity.l0(),
        "dead": one_pass.activity.dead_panel(),
    }


def quick_mig(model: VAESAE, part: Part, seed: int) -> dict[str, float]:
    """Estimate MIG of the mean code on the first 4096 images, with its 95 % interval."""
    one_pass = run_over(model, part.images[:QUICK_ROWS])
    gap = mig(one_pass.mean.cpu(), part.classes[:QUICK_ROWS], resamples=RESAMPLES, seed=seed)
    return {"mig": gap.score, "mig_low": gap.low, "mig_high": gap.high}


def measure(model: VAESAE, part: Part, seed: int, *, monte_carlo: bool = True) -> dict[str, Any]:
    """Measure everything that the report tells of a model, in JSON types.

    Besides what :func:`evaluate` says: dead_sampled, the panel with z drawn; mig of the mean code,
    of the sparse code, of a random code of the same shape as the mean code, and, if asked for, by
    Monte Carlo from the posteriors; and per unit frequency, mean (absolute activation), selectivity
    (share of the entropy of the factor it stands for) and that factor.
    """
    one_pass = run_over(model, part.images, keep_codes=True)
    classes = part.classes
    codes = one_pass.codes
    if codes is None:
        raise RuntimeError("measure: the codes must have been kept")
    random = torch.randn(one_pass.mean.shape, generator=torch.Generator().manual_seed(seed))
    mean, log_variance = one_pass.mean.cpu(), one_pass.log_variance.cpu()
    chosen = selectivity(codes.cpu(), classes)
    activity = one_pass.activity
    gaps = {}
    if monte_carlo:
        gaps["mig_monte_carlo"] = _gap_facts(
            mig_monte_carlo(mean, log_variance, classes, samples=MONTE_CARLO_SAMPLES, seed=seed)
        )
    return {
        **_basic_facts(one_pass),
        **gaps,
        "dead_sampled": evaluate(model, part.images, sample_seed=seed)["dead"],
        "mig": _gap_facts(mig(mean, classes, resamples=RESAMPLES, seed=seed)),
        "mig_code": _gap_facts(mig(codes.cpu(), classes, resamples=CODE_RESAMPLES, seed=seed)),
        "mig_random": _gap_facts(mig(random, classes, resamples=RESAMPLES, seed=seed)),
        "units": {
            "frequency": _rounded(activity.fired.double() / activity.rows),
            "mean": _rounded(activity.sums / activity.rows),
            "selectivity": _rounded(chosen.value),
            "factor": chosen.factor.tolist(),
        },
    }


def _gap_facts(gap: Gap) -> dict[str, Any]:
    """Collect a gap for JSON, which has no NaN.

    An interval that was not made is absent, a factor of one value is null.
    """
    facts = {"score": gap.score, "low": gap.low, "high": gap.high}
    factors = [None if math.isnan(value) else value for value in gap.factors]
    return {name: value for name, value in facts.items() if not math.isnan(value)} | {
        "factors": factors
    }


def _rounded(values: Tensor) -> list[float]:
    """Round to six digits."""
    return [float(f"{value:.6g}") for value in values.tolist()]
