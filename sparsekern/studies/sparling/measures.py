"""What is measured of a motif model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.motifs.domain import TEST_SEED, MotifBatch, MotifDomain
from ...measures.motif_errors import (
    MotifMatches,
    bootstrap_errors,
    edit_errors,
    exact_matches,
    find_motifs,
    join_matches,
    motif_errors,
)
from ...measures.motif_perturbation import UNTESTED, perturbation_consistency
from ...models.sparling import PAD, MotifModel

BATCH = 250
PERTURBED = 1000  # inputs, as published
RESAMPLES = 1000
# Activations compared with motifs at once: a dense bottleneck's take some 200 bytes each.
MOST_ACTIVATIONS = 2_000_000


def on_device(inputs: Tensor, device: torch.device) -> Tensor:
    """Move inputs to a device as float32; images with their channels last in memory."""
    inputs = inputs.to(device).float()
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


def pad_labels(labels: Tensor, domain: MotifDomain) -> Tensor:
    """Pad labels [B, L] with room for the end of the longest, [B, L + 1].

    Where a readout predicts that end; the slots of the small readout need none.
    """
    return labels if domain.name == "tiny" else F.pad(labels, (0, 1), value=PAD)


def batch_size_for(domain: MotifDomain, channels: int) -> int:
    """Choose how many samples are compared with their motifs at once."""
    return max(1, min(BATCH, MOST_ACTIVATIONS // (channels * math.prod(domain.space))))


@torch.no_grad()
def accuracy(
    model: MotifModel, domain: MotifDomain, samples: MotifBatch, device: torch.device
) -> float:
    """Compute the share of labels that a model in evaluation mode predicts exactly."""
    right = 0
    for start in range(0, len(samples.labels), BATCH):
        inputs = on_device(samples.inputs[start : start + BATCH], device)
        labels = pad_labels(samples.labels[start : start + BATCH], domain).to(device)
        right += int(exact_matches(model.predict(inputs), labels).sum())
    return right / len(samples.labels)


@torch.no_grad()
def quick_errors(
    model: MotifModel, domain: MotifDomain, samples: MotifBatch, device: torch.device
) -> dict[str, float | None]:
    """Measure fpe, fne, ce and relative_density of a few samples, in evaluation mode."""
    activations, _ = model.activations(on_device(samples.inputs, device))
    channels = activations.shape[1]
    matches = find_motifs(activations.cpu(), samples.motifs, margin=domain.margin)
    errors = motif_errors(matches, len(domain.symbols), channels, one_to_one=domain.one_to_one)
    density = int(matches.active.sum()) / activations.numel()
    shares = {name: getattr(errors, name) for name in ("fpe", "fne", "ce")}
    return {
        **{name: None if math.isnan(share) else share for name, share in shares.items()},
        "relative_density": density / domain.density(channels),
    }


@torch.no_grad()
def measure(
    model: MotifModel, domain: MotifDomain, count: int, channels: int, device: torch.device
) -> dict[str, Any]:
    """Measure everything that the report tells of a model in evaluation mode, in JSON types.

    fpe, fne, ce, e2ee and exact, shares of `count` test samples, each with its 95 % interval over
    samples; density, the share of activations that are not zero; relative_density, in multiples of
    the domain's own; assignment, the symbol of each channel; confusion [symbols][channels].
    """
    matches: list[MotifMatches] = []
    edits, exact = [], []
    size = batch_size_for(domain, channels)
    for start in range(0, count, size):
        batch = domain.batch(TEST_SEED, start, min(size, count - start))
        activations, _ = model.activations(on_device(batch.inputs, device))
        predicted = model.readout.decode(activations).cpu()  # type: ignore[operator]
        labels = pad_labels(batch.labels, domain)
        edits.append(edit_errors(predicted, labels))
        exact.append(exact_matches(predicted, labels))
        matches.append(find_motifs(activations.cpu(), batch.motifs, margin=domain.margin))
    all_matches = join_matches(matches)
    symbols, one_to_one = len(domain.symbols), domain.one_to_one
    errors = motif_errors(all_matches, symbols, channels, one_to_one=one_to_one)
    intervals = bootstrap_errors(
        all_matches, symbols, channels, one_to_one=one_to_one, resamples=RESAMPLES
    )
    elements = count * channels * int(np.prod(domain.space))
    density = int(all_matches.active.sum()) / elements
    facts: dict[str, Any] = {
        name: _share(getattr(errors, name), *intervals[name]) for name in ("fpe", "fne", "ce")
    }
    facts["e2ee"] = _mean_with_interval(torch.cat(edits).numpy())
    facts["exact"] = _mean_with_interval(torch.cat(exact).double().numpy())
    return {
        **facts,
        "density": density,
        "relative_density": density / domain.density(channels),
        "assignment": list(errors.assignment),
        "confusion": errors.confusion.tolist(),
    }


@torch.no_grad()
def perturbed(
    model: MotifModel,
    domain: MotifDomain,
    count: int,
    measured: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """Measure the perturbation consistency of a model in evaluation mode, in JSON types.

    The share, its 95 % interval over samples, and the number of inputs tested: a thousand, or as
    many of `count` test samples as can be (see sparsekern.measures.motif_perturbation). `measured`
    is what :func:`measure` returned.
    """
    channels = channels_of_symbols(measured["assignment"], measured["confusion"])
    generator = np.random.default_rng(0)
    verdicts: list[Tensor] = []
    tested, size = 0, batch_size_for(domain, len(measured["assignment"]))
    for start in range(0, count, size):
        batch = domain.batch(TEST_SEED, start, min(size, count - start))
        activations, _ = model.activations(on_device(batch.inputs, device))
        consistent = perturbation_consistency(
            model.readout.decode,  # type: ignore[arg-type]
            activations,
            pad_labels(batch.labels, domain),
            batch.motifs,
            channels,
            domain.replacements,
            generator,
            margin=domain.margin,
        )
        verdicts.append(consistent[consistent != UNTESTED])
        tested += len(verdicts[-1])
        if tested >= PERTURBED:
            break
    values = torch.cat(verdicts)[:PERTURBED].double().numpy()
    if not len(values):
        return {**_share(math.nan, math.nan, math.nan), "inputs": 0}
    return {**_mean_with_interval(values), "inputs": len(values)}


def channels_of_symbols(assignment: list[int], confusion: list[list[int]]) -> list[int]:
    """Choose the channel of each symbol, -1 for none.

    Of several that stand for it, the one that does so most often.
    """
    return [
        max(
            (channel for channel, other in enumerate(assignment) if other == symbol),
            key=lambda channel: counts[channel],
            default=-1,
        )
        for symbol, counts in enumerate(confusion)
    ]


def _mean_with_interval(values: np.ndarray) -> dict[str, float | None]:
    """Compute the mean of values [n] and its 95 % interval, by resampling."""
    generator = np.random.default_rng(0)
    n = len(values)
    means = [values[generator.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return _share(float(values.mean()), float(low), float(high))


def _share(value: float, low: float, high: float) -> dict[str, float | None]:
    """Collect a share and its interval; JSON has no NaN, so a share of nothing is null."""
    return {
        name: None if number != number else float(number)
        for name, number in (("value", value), ("low", low), ("high", high))
    }
