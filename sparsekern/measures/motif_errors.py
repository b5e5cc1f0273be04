"""Whether a model's activations are the motifs of its inputs, and its labels the right ones.

Definitions, of Gupta et al. (arXiv 2302.01976), section 4, and the authors' public code. Each true
motif has a region, its box widened by a margin. Its prediction is the channel of the largest
activation in the region, or none if all are zero; then all activations in the region are consumed.
An activation in the regions of two motifs is the first one's, in the order of the motifs.

    FNE = motifs without a prediction / motifs
    FPE = activations never consumed / (activations never consumed + motifs with a prediction)
    CE  = motifs whose prediction is not their symbol's channel / motifs with a prediction
    E2EE = mean over samples of edit distance / length of the longer sequence

The channel of a symbol is its partner in the one-to-one assignment that makes CE least, or, where
several channels may stand for a symbol, each channel stands for the symbol that it meets most
often. FPE counts activations, the others motifs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._system import require

NONE, PADDING = -1, -2


class MotifMatches(NamedTuple):
    """What activations say about the motifs of B inputs."""

    symbols: Tensor
    """int64 [B, M], of the true motifs; -1 where there is none."""
    channels: Tensor
    """int64 [B, M], predicted; -1 for none, -2 where there is no motif."""
    spare: Tensor
    """int64 [B], activations never consumed."""
    active: Tensor
    """int64 [B], all activations."""


@dataclass(frozen=True)
class MotifErrors:
    """Shares in 0..1; NaN where there is nothing to take a share of."""

    fpe: float
    fne: float
    ce: float
    assignment: tuple[int, ...]
    """The symbol that each channel stands for; -1 for none."""
    confusion: np.ndarray
    """int64 [S, C]: motifs of each symbol predicted as each channel."""

    @property
    def total(self) -> float:
        """FPE + FNE + CE."""
        return self.fpe + self.fne + self.ce


def find_motifs(activations: Tensor, motifs: Tensor, *, margin: int = 0) -> MotifMatches:
    """Compare activations with true motifs.

    Args:
        activations: [B, C, *space] of d dimensions of space, nearly all zero.
        motifs: int64 [B, M, 1 + 2 d]: symbol, then start and stop (half open) along each dimension;
            a symbol of -1 pads.
        margin: by how much a box is widened on each side.

    Raises:
        ValueError: the shapes do not fit.
    """
    batch, channels, *space = activations.shape
    dims = len(space)
    if motifs.shape[0] != batch or motifs.shape[-1] != 1 + 2 * dims:
        raise ValueError(
            f"find_motifs: motifs must have shape [{batch}, M, {1 + 2 * dims}] for activations "
            f"{list(activations.shape)}, got {list(motifs.shape)}"
        )
    active = activations != 0
    active_at = active.nonzero()  # [P, 2 + d]
    values = activations[active]
    sample, channel, position = active_at[:, 0], active_at[:, 1], active_at[:, 2:]
    boxes = motifs[sample]  # [P, M, 1 + 2 d]
    start, stop = boxes[..., 1::2] - margin, boxes[..., 2::2] + margin
    positions = position.unsqueeze(1)
    inside = ((positions >= start) & (positions < stop)).all(-1) & (boxes[..., 0] >= 0)
    consumed = inside.any(1)
    owner = inside.int().argmax(1)  # the first motif in whose region it lies
    count = motifs.shape[1]
    largest = values.new_zeros(batch * count * channels)
    cell = ((sample * count + owner) * channels + channel)[consumed]
    largest.scatter_reduce_(0, cell, values[consumed].abs(), "amax")
    best, chosen = largest.view(batch, count, channels).max(-1)
    chosen = torch.where(best > 0, chosen, NONE)
    chosen = torch.where(motifs[..., 0] >= 0, chosen, PADDING)
    spare = torch.bincount(sample[~consumed], minlength=batch)
    return MotifMatches(motifs[..., 0], chosen, spare, torch.bincount(sample, minlength=batch))


def join_matches(batches: list[MotifMatches]) -> MotifMatches:
    """Join several batches to one."""
    return MotifMatches(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def motif_errors(
    matches: MotifMatches, symbols: int, channels: int, *, one_to_one: bool
) -> MotifErrors:
    """Compute FPE, FNE and CE.

    Args:
        matches: of any number of inputs.
        symbols: S.
        channels: C.
        one_to_one: how channels are assigned; see the module.
    """
    confusion = confusion_matrix(matches, symbols, channels)
    assignment = assign_symbols(confusion, one_to_one)
    return _errors_under(matches, confusion, assignment)


def confusion_matrix(matches: MotifMatches, symbols: int, channels: int) -> np.ndarray:
    """Count how often a motif of a symbol was predicted as a channel: int64 [S, C]."""
    matched = matches.channels >= 0
    pairs = matches.symbols[matched] * channels + matches.channels[matched]
    counts = torch.bincount(pairs, minlength=symbols * channels)
    return counts.view(symbols, channels).numpy(force=True)


def assign_symbols(confusion: np.ndarray, one_to_one: bool) -> tuple[int, ...]:
    """Find the symbol of each channel; -1 for none.

    Args:
        confusion: int64 [S, C].
        one_to_one: each symbol has one channel at most; else each channel has its majority symbol.

    Returns:
        C numbers of symbols.
    """
    if not one_to_one:
        return tuple(np.where(confusion.sum(0) > 0, confusion.argmax(0), NONE).tolist())
    optimize = require("scipy.optimize", "assigning channels to symbols")
    rows, columns = optimize.linear_sum_assignment(confusion, maximize=True)
    symbols = np.full(confusion.shape[1], NONE)
    symbols[columns] = rows
    return tuple(symbols.tolist())


def _errors_under(
    matches: MotifMatches, confusion: np.ndarray, assignment: tuple[int, ...]
) -> MotifErrors:
    """Compute FPE, FNE and CE under an assignment."""
    matched = int(confusion.sum())
    motifs = int((matches.symbols >= 0).sum())
    spare = int(matches.spare.sum())
    right = sum(
        int(confusion[symbol, channel]) for channel, symbol in enumerate(assignment) if symbol >= 0
    )
    return MotifErrors(
        fpe=_share(spare, spare + matched),
        fne=_share(motifs - matched, motifs),
        ce=_share(matched - right, matched),
        assignment=assignment,
        confusion=confusion,
    )


def _share(part: float, whole: float) -> float:
    """Divide a part by the whole; NaN where there is nothing."""
    return part / whole if whole else float("nan")


def bootstrap_errors(
    matches: MotifMatches,
    symbols: int,
    channels: int,
    *,
    one_to_one: bool,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Compute 95 % intervals of fpe, fne and ce over the samples, by resampling them.

    The assignment is that of all samples.

    Args:
        matches: of any number of inputs.
        symbols: S.
        channels: C.
        one_to_one: how channels are assigned; see the module.
        resamples: how many.
        seed: of the resampling.

    Returns:
        Low and high end of each, by name; NaN where there is nothing to take a share of.
    """
    assignment = assign_symbols(confusion_matrix(matches, symbols, channels), one_to_one)
    channel_symbol = torch.tensor([*assignment, NONE, NONE])  # of channels -2 and -1: none
    true = matches.symbols >= 0
    matched = matches.channels >= 0
    wrong = matched & (channel_symbol[matches.channels] != matches.symbols)
    columns = (true, matched, wrong)
    facts = (
        torch.stack([*(column.sum(1) for column in columns), matches.spare], 1)
        .double()
        .numpy(force=True)
    )
    generator = np.random.default_rng(seed)
    n = len(facts)
    draws = np.empty((resamples, 3))
    for i in range(resamples):
        motifs, predicted_count, wrongs, spare = facts[generator.integers(n, size=n)].sum(0)
        draws[i] = (
            _share(spare, spare + predicted_count),
            _share(motifs - predicted_count, motifs),
            _share(wrongs, predicted_count),
        )
    intervals = {}
    for name, column in zip(("fpe", "fne", "ce"), draws.T, strict=True):
        known = column[~np.isnan(column)]  # a resample can lack what the share is of
        low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
        intervals[name] = (float(low), float(high))
    return intervals


# -- labels ----------------------------------------------------------------------------------------


def exact_matches(predicted: Tensor, labels: Tensor) -> Tensor:
    """Tell whether label sequences [B, L], padded with -1, are equal: bool [B]."""
    return (predicted == labels).all(1)


def edit_errors(predicted: Tensor, labels: Tensor) -> Tensor:
    """Compute the edit distance over the length of the longer sequence: float64 [B].

    Both sequences are padded with -1; 0 for two empty ones.
    """
    return torch.tensor(
        [
            _edit_error(
                [symbol for symbol in a if symbol >= 0], [symbol for symbol in b if symbol >= 0]
            )
            for a, b in zip(predicted.tolist(), labels.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


def _edit_error(a: list[int], b: list[int]) -> float:
    """Compute the edit distance of two sequences over the length of the longer one."""
    if a == b:
        return 0.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            substituted = previous + (x != y)
            previous = row[j]
            row[j] = min(substituted, row[j] + 1, row[j - 1] + 1)
    return row[-1] / max(len(a), len(b))
