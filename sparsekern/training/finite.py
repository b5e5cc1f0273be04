"""Whether training is still finite: each step, and everything before it is saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .processes import Processes

# A norm of 1.8e19 overflows in float32: squares of gradients that large do in Adam, too.
_ADVICE = "a smaller learning rate may help"


class TrainingError(RuntimeError):
    """Training cannot go on, for example because the loss is not a number."""


class FiniteSteps:
    """Looks at loss, gradients and parameters after each step.

    The device writes a number for each of the three; on a GPU the host reads those of a step when
    the next one has been queued, so that the device never waits for it.

    Args:
        model: what is trained.
        processes: that train it.
    """

    def __init__(self, model: nn.Module, processes: Processes | None = None) -> None:
        self.model = model
        self.processes = processes or Processes()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._waiting: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def gradients(self) -> Tensor:
        """Compute this process's share of their norm; before the step, which may change them."""
        return self.processes.share_of_norm(
            [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        )

    @torch.no_grad()
    def watch(self, step: int, loss: Tensor, gradients: Tensor, *numbers: int) -> tuple[int, ...]:
        """Take in a step.

        Args:
            step: its number, from 1.
            loss: scalar.
            gradients: what :meth:`gradients` returned before the optimizer's step.
            numbers: to be compared among processes in the same message.

        Returns:
            The largest that any process gave, for each of the numbers.

        Raises:
            TrainingError: loss, gradients or parameters of this step (on a GPU: of the one before)
                are not finite.
        """
        parameters = self.processes.share_of_norm(
            [parameter.detach() for parameter in self.parameters]
        )
        norms, largest = self.processes.norms([gradients, parameters], *numbers)
        device = norms.device
        checked = torch.cat((loss.detach().reshape(1).to(device, torch.float64), norms.double()))
        if device.type != "cuda":
            self._check(step, checked)
            return largest
        host = torch.empty(checked.shape, dtype=checked.dtype, pin_memory=True)
        host.copy_(checked, non_blocking=True)
        event = torch.cuda.current_stream(device).record_event()
        before, self._waiting = self._waiting, (step, host, event)
        self._check_waiting(before)
        return largest

    def settle(self) -> None:
        """Wait for the last step and check it; raises as :meth:`watch`."""
        waiting, self._waiting = self._waiting, None
        self._check_waiting(waiting)

    def _check_waiting(self, waiting: tuple[int, Tensor, torch.cuda.Event | None] | None) -> None:
        """Wait for a step whose numbers are on their way, and check it."""
        if waiting is not None:
            step, host, event = waiting
            if event is not None:
                event.synchronize()
            self._check(step, host)

    def _check(self, step: int, norms: Tensor) -> None:
        loss, gradients, parameters = norms.tolist()
        if not math.isfinite(loss):
            raise divergence_error("loss", loss, step)
        if not math.isfinite(gradients):
            raise divergence_error(
                self._name_nonfinite("gradient of", self._gradients()), gradients, step
            )
        if not math.isfinite(parameters):
            raise divergence_error(
                self._name_nonfinite("parameter", self.model.named_parameters()), parameters, step
            )

    def _name_nonfinite(self, kind: str, named: Iterable[tuple[str, Tensor]]) -> str:
        """Name the first that is not finite; where all are, it is their norm that overflowed."""
        tensors = dict(named)
        bad = nonfinite_names(tensors, self.processes)
        names = [name for name in tensors if name in bad]
        return f"{kind} {names[0]}" if names else f"the norm of the {kind.split()[0]}s"

    def _gradients(self) -> Iterable[tuple[str, Tensor]]:
        named = self.model.named_parameters()
        return ((name, parameter.grad) for name, parameter in named if parameter.grad is not None)


def divergence_error(what: str, value: float, step: int) -> TrainingError:
    """Make the error to raise when training has diverged."""
    return TrainingError(f"{what} is {value} at step {step}; {_ADVICE}")


def check_finite_state(
    tensors: Mapping[str, Tensor],
    step: int,
    exempt: Iterable[str] = (),
    processes: Processes | None = None,
) -> None:
    """Raise :class:`TrainingError`, naming the first of them, unless all tensors are finite.

    Args:
        tensors: by name.
        step: for the message.
        exempt: names that may hold anything.
        processes: that hold the tensors.
    """
    bad = nonfinite_names(tensors, processes)
    for name in tensors:
        if name in bad and name not in exempt:
            raise TrainingError(f"{name} is not finite at step {step}, and is not saved; {_ADVICE}")


@torch.no_grad()
def nonfinite_names(tensors: Mapping[str, Tensor], processes: Processes | None = None) -> set[str]:
    """Name the tensors that hold NaN or infinities; the host waits once a device.

    processes: that hold them; all must call it with the same names.
    """
    processes = processes or Processes()
    names = [
        name for name, tensor in tensors.items() if tensor.numel() and tensor.is_floating_point()
    ]
    if not names:
        return set()
    # In one pass each, without a mask of their size; NaN is both of its own.
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name in names:
        tensor = processes.local(tensors[name].detach())
        if tensor.element_size() == 1:  # float8 has no aminmax
            tensor = tensor.float()
        low, high = tensor.aminmax()
        finite = low.isfinite() & high.isfinite()
        by_device.setdefault(tensor.device, []).append((name, finite))
    finite_by_name: dict[str, bool] = {}
    for checked in by_device.values():
        flags = torch.stack([finite for _, finite in checked]).tolist()
        finite_by_name |= zip((name for name, _ in checked), flags, strict=True)
    bad = processes.flags(torch.tensor([not finite_by_name[name] for name in names])).tolist()
    return {name for name, is_bad in zip(names, bad, strict=True) if is_bad}
