"""What decides how sparse an epoch is: the strength of L1, and the gate of k.

Their state lies in buffers, so that a checkpoint of the model has it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Strengths outside do nothing or kill everything; the bounds are what keeps the controller from
# winding up while L0 cannot follow.
WEAKEST, STRONGEST = 1e-2, 1e3
GATE_LEVELS = 16
GATE_TOLERANCE = 0.02


class L1Steering(nn.Module):
    """Steers the strength of an L1 penalty so that L0 follows a target.

    A proportional-integral controller in logarithms: with e = log(L0 / target),

        log strength = integral + proportional * e,    integral += rate * e  (each step)

    The integral stays inside the bounds of useful strengths, and stands still while the strength
    is at one of them and e would push it further: so it does not wind up while ReLU alone leaves
    fewer units active than the target.

    Args:
        start: strength in the first step.
        rate, proportional: gains.
    """

    integral: Tensor
    level: Tensor

    def __init__(self, start: float = 0.01, rate: float = 0.3, proportional: float = 4.0) -> None:
        super().__init__()
        self.rate, self.proportional = rate, proportional
        self.register_buffer("integral", torch.tensor(math.log(start), dtype=torch.float64))
        self.register_buffer("level", torch.tensor(math.log(start), dtype=torch.float64))

    @property
    def strength(self) -> Tensor:
        """The penalty's weight, a scalar."""
        return self.level.exp()

    @torch.no_grad()
    def update(self, l0: Tensor, target: float) -> None:
        """Take in the mean number of active units of a batch, a scalar."""
        error = (l0.double().clamp_min(0.1) / target).log()
        low, high = math.log(WEAKEST), math.log(STRONGEST)
        stuck = ((self.level <= low) & (error < 0)) | ((self.level >= high) & (error > 0))
        change = torch.where(stuck, 0.0, self.rate * error)
        self.integral.add_(change).clamp_(low, high)
        self.level.copy_((self.integral + self.proportional * error).clamp(low, high))


class ValidationGate(nn.Module):
    """Lowers k in geometric steps, each when the held-out loss has recovered from the last.

    After an epoch k goes one of 16 steps down if the loss is within 2 % of the best so far. Where
    as many epochs are left as steps, it goes down whatever the loss, so that the last epoch always
    has the final k. The idea is that of Sparling's annealing (Bansal et al. 2023), whose gate is an
    accuracy.

    Args:
        start, end: k before the first and after the last step.
        epochs: of the schedule.
    """

    passed: Tensor
    best: Tensor

    def __init__(self, start: int, end: int, epochs: int) -> None:
        super().__init__()
        self.start, self.end, self.epochs = start, end, epochs
        self.steps = min(GATE_LEVELS, max(epochs - 1, 0))
        self.register_buffer("passed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("best", torch.full((), math.inf, dtype=torch.float64))

    @property
    def k(self) -> int:
        """Of the next epoch."""
        if self.steps == 0:
            return self.end
        share = int(self.passed) / self.steps
        return round(self.start * float((self.end / self.start) ** share))

    @torch.no_grad()
    def update(self, loss: float, epoch: int) -> None:
        """Take in the held-out loss after an epoch, counted from 0."""
        self.best.clamp_(max=loss)
        left = self.epochs - 1 - epoch
        due = self.steps - int(self.passed) >= left
        recovered = loss <= float(self.best) * (1 + GATE_TOLERANCE)
        if int(self.passed) < self.steps and (due or recovered):
            self.passed += 1
