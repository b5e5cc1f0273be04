"""Adam as a torch optimizer, with the norms of a dictionary's rows kept at 1 in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .ops.adam import adam_step


class Adam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015) whose parameter groups may ask for rows of norm 1.

    Equivalent PyTorch, for a group with unit_rows, at each step::

        d = parameter
        d.grad -= (d.grad * d).sum(1, True) / d.square().sum(1, True) * d
        torch.optim.Adam's step
        d /= d.norm(dim=1, keepdim=True)

    Args:
        params: parameters, or groups of them as in torch.
        lr: learning rate, at least 0.
        betas: decay of the two moments, each in 0..1 (1 excluded).
        eps: added to the root of the second moment.
        weight_decay: share of the parameter that is added to its gradient (L2).
        unit_rows: default of the groups: keep the norms of the rows of 2-d parameters at 1. The
            gradients themselves are not changed.

    Raises:
        ValueError: a number is out of its range, or unit_rows with a parameter that is not 2-d.

    Note:
        The state is that of torch.optim.Adam (step, exp_avg, exp_avg_sq), so that checkpoints of
        either fit the other.

    Example:
        >>> import torch
        >>> dictionary = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(8, 4)))
        >>> bias = torch.nn.Parameter(torch.zeros(4))
        >>> groups = [{"params": [dictionary], "unit_rows": True}, {"params": [bias]}]
        >>> optimizer = Adam(groups, lr=1e-3)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        unit_rows: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"Adam: {name} must be at least 0, got {value}")
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"Adam: betas must lie in 0..1 (1 excluded), got {betas}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "unit_rows": unit_rows,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group with unit_rows takes 2-d parameters only."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"] if group["unit_rows"] else ():
            if parameter.dim() != 2:
                self.param_groups.pop()
                raise ValueError(
                    "Adam: unit_rows needs parameters [rows, features], "
                    f"got {list(parameter.shape)}"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch; groups of a torch.optim.Adam have no unit_rows, and must not ask for what
        this optimizer does not do."""
        for group in state.get("param_groups", ()):
            for option in ("amsgrad", "maximize"):
                if group.get(option):
                    raise ValueError(f"Adam: {option} must be False, got {group[option]}")
            group.setdefault("unit_rows", False)
        super().__setstate__(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        if grad.is_sparse:
            raise ValueError("Adam: gradients must be dense, got a sparse one")
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, as torch keeps it
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        adam_step(
            parameter,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
            unit_rows=group["unit_rows"],
        )
        # So that autograd notices where an older value was still needed.
        changed = (parameter, state["exp_avg"], state["exp_avg_sq"])
        torch.autograd.graph.increment_version(changed)
