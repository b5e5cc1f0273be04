"""Annealing of a density by the accuracy that a model reaches at it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class AccuracyGatedDensity(nn.Module):
    """Lowers a density by a factor each time the validation accuracy exceeds a falling target.

    With T the target, at a validation after d samples since the last one::

        T = max(T - fall * d, 0)
        if accuracy > T:  density = max(density * factor, end);  T = max(T, accuracy)

    Time is counted in samples, not in steps. The state lies in buffers, so that a checkpoint of the
    model has it.

    Args:
        start: density at first, above 0 and at most 1.
        end: where annealing ends; exactly this density is the last one. At most start.
        factor: above 0 and below 1.
        target: T at first.
        fall: of T per sample, at least 0.

    Attributes:
        density: float64 scalar, for the next training step.
        trained_density: float64 scalar, the one that the weights were trained at when
            :meth:`update` was called last: what a checkpoint saved right after it holds.
        reached: int64 scalar, samples seen when the last density was reached; -1 before.

    Raises:
        ValueError: an argument is out of its range.

    Source: Gupta et al., Sparling (arXiv 2302.01976), section 3 and the authors' public code:
    start 0.5, factor 0.75, target 1, fall 1e-7, a validation every 20,000 samples (200,000 in the
    text).

    Example:
        >>> from sparsekern.training import AccuracyGatedDensity
        >>> gate = AccuracyGatedDensity(0.5, 0.1, fall=1e-5)
        >>> gate.update(0.95, samples=10_000)
        0.375
    """

    density: Tensor
    trained_density: Tensor
    target: Tensor
    samples: Tensor
    reached: Tensor

    def __init__(
        self,
        start: float,
        end: float,
        *,
        factor: float = 0.75,
        target: float = 1.0,
        fall: float = 1e-7,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value, fits, rule in (
            ("start", start, 0 < start <= 1, "above 0 and at most 1"),
            ("end", end, 0 < end <= start, f"above 0 and at most start = {start}"),
            ("factor", factor, 0 < factor < 1, "above 0 and below 1"),
            ("target", target, 0 <= target <= 1, "in 0..1"),
            ("fall", fall, 0 <= fall < math.inf, "at least 0 and finite"),
        ):
            if not fits:
                raise ValueError(f"{name}: {argument} must be {rule}, got {value}")
        self.end, self.factor, self.fall = end, factor, fall
        self.register_buffer("density", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("trained_density", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("target", torch.tensor(target, dtype=torch.float64))
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64))
        self.register_buffer("reached", torch.full((), 0 if start == end else -1))

    @property
    def done(self) -> bool:
        """Whether the last density is reached."""
        return int(self.reached) >= 0

    @torch.no_grad()
    def update(self, accuracy: float, samples: int) -> float:
        """Take in a validation.

        Args:
            accuracy: in 0..1.
            samples: seen in training so far, no fewer than at the last validation.

        Returns:
            The density to train at from now on.

        Raises:
            ValueError: an argument is out of its range.
        """
        name = f"{type(self).__name__}.update"
        if not 0 <= accuracy <= 1:
            raise ValueError(f"{name}: accuracy must lie in 0..1, got {accuracy}")
        passed = samples - int(self.samples)
        if passed < 0:
            raise ValueError(
                f"{name}: samples must be at least {int(self.samples)} (at the last validation), "
                f"got {samples}"
            )
        self.samples.fill_(samples)
        self.trained_density.copy_(self.density)
        self.target.sub_(self.fall * passed).clamp_(min=0)
        if accuracy > float(self.target):
            self.target.clamp_(min=accuracy)
            if not self.done:
                lowered = max(float(self.density) * self.factor, self.end)
                self.density.fill_(lowered)
                if lowered == self.end:
                    self.reached.fill_(samples)
        return float(self.density)
