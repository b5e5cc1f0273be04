"""Motif domains: inputs made of small motifs, labelled with the sequence of their symbols.

A domain draws samples without end. Sample number i of stream ``seed`` is a pure function of
(seed, i), so batches can be drawn in any order and size. The four domains of the Sparling study
(arXiv 2302.01976): see :func:`motif_domain`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import counter_random

# Streams of their own, so that no run trains (with a seed of 0 or more) on what it is tested with.
VALIDATION_SEED, TEST_SEED = -1, -2
NONE = -1  # pads labels and motifs


class MotifBatch(NamedTuple):
    """Samples with their labels and the motifs that they are made of.

    Attributes:
        inputs: ``[B, C, *space]``, uint8 of 0 and 1 for images, float32 for sound.
        labels: int64 ``[B, L]``, indices into the domain's ``label_symbols``, in order, padded
            with -1.
        motifs: int64 ``[B, M, 1 + 2 d]``: index into the domain's ``symbols``, then start and stop
            (half open) along each of the d dimensions of space. Padding rows hold -1 everywhere.
    """

    inputs: Tensor
    labels: Tensor
    motifs: Tensor


class Replacement(NamedTuple):
    """One motif of an input as another symbol."""

    motif: int
    """Row of the motif."""
    symbol: int
    """What it becomes."""
    label: list[int]
    """Of the input after that."""


class MotifDomain(ABC):
    """What the domains have in common.

    Subclasses are frozen dataclasses: equal parameters mean equal samples.
    """

    name: str
    in_channels: int = 1
    margin: int = 0  # a motif's activations are looked for in its box, widened by this
    one_to_one: bool = True  # one channel per symbol; else each channel means its majority symbol

    @property
    @abstractmethod
    def origin(self) -> str:
        """What the samples are, and how far they are the published ones: for reports."""

    @property
    @abstractmethod
    def symbols(self) -> tuple[str, ...]:
        """What the first column of ``motifs`` counts."""

    @property
    def label_symbols(self) -> tuple[str, ...]:
        """What the numbers of ``labels`` stand for.

        The same as :attr:`symbols` unless a label holds more than motifs.
        """
        return self.symbols

    @property
    @abstractmethod
    def space(self) -> tuple[int, ...]:
        """Size of the d dimensions in which motifs have a place."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Symbols of the longest label, the L of a batch."""

    @property
    @abstractmethod
    def max_motifs(self) -> int:
        """Motifs of the fullest input, the M of a batch."""

    @abstractmethod
    def mean_motifs(self) -> float:
        """Compute the expected number of motifs of an input."""

    @abstractmethod
    def draw(self, start: np.ndarray) -> MotifBatch:
        """Draw the samples whose random numbers start at ``start``, uint64 ``[B]``."""

    @abstractmethod
    def replacements(self, label: list[int], symbols: list[int]) -> list[Replacement]:
        """List every way to make one motif another symbol so that the label is known and possible.

        Args:
            label: of an input, without its padding.
            symbols: of its motifs, without their padding.
        """

    def density(self, channels: int) -> float:
        """Compute the share of activations that are not zero where each motif has one, delta*.

        ``mean_motifs() / (prod(space) * channels)``.

        Raises:
            ValueError: channels is not positive.
        """
        if channels < 1:
            raise ValueError(f"density: channels must be at least 1, got {channels}")
        return self.mean_motifs() / (float(np.prod(self.space)) * channels)

    def batch(self, seed: int, first: int, count: int) -> MotifBatch:
        """Draw samples ``first .. first + count - 1`` of stream ``seed``.

        Args:
            seed: any int64; 0 and more for training, :data:`VALIDATION_SEED`, :data:`TEST_SEED`.
            first: number of the first sample, 0 or more.
            count: number of samples, 0 or more.

        Raises:
            ValueError: one of them is out of range.
        """
        bounds = torch.iinfo(torch.int64)
        if not bounds.min <= seed <= bounds.max:
            raise ValueError(f"batch: seed must fit in an int64, got {seed}")
        if first < 0 or count < 0 or first + count > bounds.max:
            raise ValueError(
                f"batch: first and count must be 0 or more and their sum fit in an int64, "
                f"got {first} and {count}"
            )
        return self.draw(counter_random.starts(seed, np.arange(first, first + count)))


def check_parameters(domain: MotifDomain, *rules: tuple[str, bool, str]) -> None:
    """Check a domain's parameters: a rule is a parameter, whether it is met, and a text.

    Raises:
        ValueError: a rule is not met.
    """
    for parameter, met, rule in rules:
        if not met:
            raise ValueError(
                f"{type(domain).__name__}: {parameter} {rule}, got {getattr(domain, parameter)!r}"
            )
