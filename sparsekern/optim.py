"""Adam as a torch optimizer, with the norms of a dictionary's rows kept at 1 in the same pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .ops.adam_step import adam_step
from .ops.checks import FLOATING

SHORT_DTYPES = (torch.bfloat16, torch.float16)
# Options of torch's Adam that ask for another step; fused, foreign and capturable do not.
OTHER_STEPS = ("amsgrad", "maximize", "differentiable", "decoupled_weight_decay")


class Adam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015) whose parameter groups may ask for rows of norm 1.

    Equivalent PyTorch, for a group with unit_rows, at each step::

        d = parameter
        d.grad -= (d.grad * d).sum(1, True) / d.square().sum(1, True) * d
        torch.optim.Adam's step
        d /= d.norm(dim=1, keepdim=True)

    Args:
        params: parameters, or groups of them as in torch; sharded ones (DTensor, as of FSDP2), too.
        lr: learning rate, at least 0.
        betas: decay of the two moments, each in 0..1 (1 excluded).
        eps: added to the root of the second moment.
        weight_decay: share of the parameter that is added to its gradient (L2).
        unit_rows: default of the groups: keep the norms of the rows, along the last dimension, of
            parameters at 1. The gradients themselves are not changed. Sharded parameters must hold
            whole rows.

    Raises:
        ValueError: a number is out of its range, unit_rows with a parameter that has no rows or
            whose rows are cut, or an option of torch's Adam that asks for another step.
        TypeError: a parameter is not floating point.

    Note:
        The state is that of torch.optim.Adam (step, exp_avg, exp_avg_sq), so that checkpoints of
        either fit the other. Parameters of bfloat16 and float16 also have a copy in float32,
        "master", which takes the step and is then rounded: steps below the parameter's precision
        add up, where torch's Adam stands still. Their moments are float32, too. Where a parameter
        was changed from outside, its new value goes on.

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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "unit_rows": unit_rows,
        }
        _check_numbers(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch; one with unit_rows takes parameters with rows only."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state as in torch.

        Groups of a torch.optim.Adam keep the unit_rows that they have here, and must not ask for
        what this optimizer does not do.
        """
        own = self.__dict__.get("param_groups", ())
        for number, group in enumerate(state.get("param_groups", ())):
            _check_options(group)
            group.setdefault("unit_rows", number < len(own) and own[number]["unit_rows"])
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as in torch; that of 16-bit parameters stays float32."""
        loaded: list[dict[str, Any]] = []  # as the hooks leave it

        def remember(_: Any, state_dict: dict[str, Any]) -> None:
            loaded.append(state_dict)

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        names = [name for group in loaded[0]["param_groups"] for name in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            if parameter not in self.state:
                continue
            state = self.state[parameter]
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu()
            if parameter.dtype not in SHORT_DTYPES:
                state.pop("master", None)
                continue
            for key in ("exp_avg", "exp_avg_sq", "master"):
                if key in state:  # torch has rounded it to the parameter's dtype
                    exact = loaded[0]["state"][name][key]
                    state[key] = exact.to(device=parameter.device, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """Update one parameter."""
        if grad.layout != torch.strided:
            raise ValueError(f"Adam: gradients must be dense, got one of {grad.layout}")
        if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "Adam: step must not be captured by a CUDA graph, which would repeat the number of "
                "this step; use torch.optim.Adam with capturable=True"
            )
        state = self.state[parameter]
        short = parameter.dtype in SHORT_DTYPES
        wide = torch.float32 if short else parameter.dtype
        if not state:
            # On the CPU, as torch keeps it; the default dtype may not count far.
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(parameter, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide)
        if short and "master" not in state:
            state["master"] = parameter.detach().to(wide)
        state["step"] += 1
        target = state["master"] if short else parameter
        changed = (target, state["exp_avg"], state["exp_avg_sq"])
        if is_sharded(parameter):
            grad = _placed_like(grad, parameter)
            # So that autograd notices where an older value was still needed.
            torch.autograd.graph.increment_version([parameter, *changed])
        local, local_grad, *tensors = (_local_part(t) for t in (parameter, grad, *changed))
        if short:  # where the parameter was changed from outside, that value counts
            master = tensors[0]
            master.copy_(torch.where(master.to(local.dtype) == local, master, local.to(wide)))
        wide_grad = local_grad.to(wide)
        if group["unit_rows"] and local.dim() > 2:
            wide_grad = wide_grad.reshape(-1, local.shape[-1])
            tensors = [tensor.view(wide_grad.shape) for tensor in tensors]
        adam_step(
            tensors[0],
            wide_grad,
            *tensors[1:],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=int(state["step"]),
            unit_rows=group["unit_rows"],
        )
        if short:
            local.copy_(tensors[0].view(local.shape))


# -- checks ----------------------------------------------------------------------------------------


def _check_numbers(group: dict[str, Any]) -> None:
    """Raise ValueError where a number of a group is out of its range."""
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"Adam: {name} must be at least 0, got {group[name]}")
    for beta in group["betas"]:
        if not 0 <= beta < 1:
            raise ValueError(f"Adam: betas must lie in 0..1 (1 excluded), got {group['betas']}")


def _check_options(group: dict[str, Any]) -> None:
    """Raise ValueError where a group asks for what torch's Adam alone does."""
    for option in OTHER_STEPS:
        if group.get(option):
            raise ValueError(f"Adam: {option} must be False, got {group[option]}")


def _check_group(group: dict[str, Any]) -> None:
    """Raise where a group's numbers, options or parameters are not possible."""
    _check_numbers(group)
    _check_options(group)
    for parameter in group["params"]:
        if parameter.dtype not in FLOATING:
            raise TypeError(
                "Adam: parameters must be float32, bfloat16, float16 or float64, "
                f"got {parameter.dtype}"
            )
        if not group["unit_rows"]:
            continue
        if parameter.dim() < 2:
            raise ValueError(
                f"Adam: unit_rows needs parameters [..., features], got {list(parameter.shape)}"
            )
        if parameter.dim() > 2 and not _local_part(parameter).is_contiguous():
            raise ValueError(
                "Adam: unit_rows needs contiguous parameters, "
                f"got {list(parameter.shape)} with strides {list(parameter.stride())}"
            )
        if is_sharded(parameter):
            _check_whole_rows(parameter)


# -- sharded parameters ----------------------------------------------------------------------------


def is_sharded(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is a DTensor; without importing them, which takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _check_whole_rows(parameter: Any) -> None:
    """Raise ValueError where processes hold parts of rows."""
    for placement in parameter.placements:
        whole = placement.is_replicate() or placement.is_shard()
        if not whole or getattr(placement, "dim", 0) in (-1, parameter.dim() - 1):
            raise ValueError(
                "Adam: unit_rows needs whole rows on each process (Shard(0) or Replicate()), "
                f"got a parameter placed {tuple(parameter.placements)}"
            )


def _placed_like(grad: Any, parameter: Any) -> Any:
    """Place a sharded gradient as its parameter is."""
    if not is_sharded(grad):
        raise ValueError("Adam: the gradient of a DTensor must be one, got a plain tensor")
    if grad.placements == parameter.placements:
        return grad
    return grad.redistribute(parameter.device_mesh, parameter.placements)


def _local_part(tensor: Any) -> torch.Tensor:
    """Take the part of a tensor that this process holds."""
    part: torch.Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part
