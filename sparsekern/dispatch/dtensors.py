"""Operations on DTensors: each process computes with the part that it holds.

Rows are independent of each other in most operations, so where all arguments of a call with rows
are cut along the same leading dimensions, so are its results, and nothing is sent. What is summed
over rows is then a partial sum. Nothing is ever gathered: any other placement is an error.

Gradients are those of the parts: a tensor that every process has whole gets a partial sum.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# What an output is where rows are cut.
ROWS, SUM, GROUPING = "rows", "sum", "grouping"
_REMEDY = (
    "redistribute it (which sends all of it), give each process's part with to_local(), or share "
    "out latents with sparsekern.distributed"
)
_WHOLE_MODULE = (
    "parameters that fully_shard has cut are whole in the forward pass of their module, and in "
    "methods given to torch.distributed.fsdp.register_fsdp_forward_method"
)


class Rows(NamedTuple):
    """How an operation works on parts of its rows.

    Attributes:
        arguments: positions of the arguments that have rows, [..., n].
        outputs: what each output is: ROWS of the same, a SUM over them, or a GROUPING of all rows,
            which must be empty where they are cut.
        whole_dim: position of the argument that says which dimension must not be cut; -1: the last,
            None: any may.
        groupings: positions of arguments that describe all rows: None where they are cut.
    """

    arguments: tuple[int, ...]
    outputs: tuple[str, ...]
    whole_dim: int | None = -1
    groupings: tuple[int, ...] = ()


def has_dtensors(args: tuple[Any, ...]) -> bool:
    """Return True if one of the arguments is a DTensor; without importing them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(arg, module.DTensor) for arg in args)


def check_alike(name: str, **tensors: Any) -> None:
    """Raise TypeError if some tensors are DTensors and some are not."""
    if has_dtensors(tuple(tensors.values())) and not torch.compiler.is_compiling():
        _check_kinds(name, list(tensors), dict(enumerate(tensors.values())))


def call_on_parts(
    name: str, names: list[str], rows: Rows | None, call: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    """Call an operation whose arguments are DTensors with the parts of this process.

    Args:
        name: of the operation.
        names: of its arguments.
        rows: see there; None: no argument may be cut.
        call: the operation on plain tensors.
        args: the arguments.

    Returns:
        The outputs as DTensors.

    Raises:
        TypeError: some arguments are plain tensors.
        ValueError: a placement with which a process cannot compute its part.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    tensors: dict[int, Any] = {
        i: arg for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)
    }
    _check_kinds(name, names, tensors)
    cut = _cut_dimensions(name, names, rows, args, tensors)
    if rows is not None and any(d is not None for d in cut):
        for i in rows.groupings:
            if args[i] is not None:
                raise ValueError(
                    f"{name}: {names[i]} must be None where rows are cut, since it describes all"
                )
    with_rows = () if rows is None else rows.arguments
    mesh, parts = next(iter(tensors.values())).device_mesh, list(args)
    for i, tensor in tensors.items():
        if i in with_rows:  # where it is whole, its own rows are at hand
            parts[i] = tensor.redistribute(mesh, _placements(cut)).to_local()
        else:
            sums = [Replicate() if d is None else Partial() for d in cut]
            parts[i] = tensor.to_local(grad_placements=sums)
    outputs = call(*parts)
    sizes = torch.Size(()) if rows is None else tensors[rows.arguments[0]].shape

    def wrap(at: int, output: torch.Tensor) -> torch.Tensor:
        kind, shape = ROWS if rows is None else rows.outputs[at], list(output.shape)
        placements: list[Any] = [Replicate()] * len(cut)
        for axis, d in enumerate(cut):
            if d is None:
                continue
            if kind == SUM:
                placements[axis] = Partial()
            elif kind == GROUPING and output.numel():
                raise ValueError(
                    f"{name}: rows must not be cut where the grouping of all rows is asked for, "
                    f"got {tuple(_placements(cut))}; {_REMEDY}"
                )
            elif kind == ROWS and d < output.dim() - (output.dim() == 1):
                placements[axis], shape[d] = _placements(cut)[axis], sizes[d]
        stride = torch.empty(shape, device="meta").stride()
        wrapped: torch.Tensor = DTensor.from_local(
            output, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )
        return wrapped

    if isinstance(outputs, tuple):
        return tuple(wrap(at, output) for at, output in enumerate(outputs))
    return None if outputs is None else wrap(0, outputs)


def _check_kinds(name: str, names: list[str], tensors: dict[int, Any]) -> None:
    """Raise unless all tensors are DTensors of one mesh."""
    placed = {names[i]: tensor for i, tensor in tensors.items() if has_dtensors((tensor,))}
    plain = [names[i] for i in tensors if names[i] not in placed]
    if plain:
        raise TypeError(
            f"{name}: all tensors must be DTensors or none, got plain {', '.join(plain)} and "
            f"DTensors {', '.join(placed)}; {_WHOLE_MODULE}"
        )
    meshes = {tensor.device_mesh for tensor in placed.values()}
    if len(meshes) > 1:
        raise ValueError(f"{name}: all DTensors must be of one mesh, got {meshes}")


def _cut_dimensions(
    name: str,
    names: list[str],
    rows: Rows | None,
    args: tuple[Any, ...],
    tensors: dict[int, Any],
) -> list[int | None]:
    """Return, for each dimension of the mesh, along which dimension the rows are cut, or None."""
    from torch.distributed.tensor import Replicate, Shard

    cut: list[int | None] = [None] * next(iter(tensors.values())).device_mesh.ndim
    for i, tensor in tensors.items():
        for axis, placement in enumerate(tensor.placements):
            if type(placement) is Replicate:
                continue
            got = f"{name}: {names[i]} must be "
            found = f"got {list(tensor.shape)} placed {tuple(tensor.placements)}; {_REMEDY}"
            if rows is None or i not in rows.arguments:
                raise ValueError(f"{got}whole in every process (Replicate()), {found}")
            if type(placement) is not Shard:
                raise ValueError(f"{got}whole or cut along rows (Shard), {found}")
            d = placement.dim % tensor.dim()
            kept = rows.whole_dim if rows.whole_dim in (None, -1) else args[rows.whole_dim]
            if kept is not None and d == kept % tensor.dim():
                raise ValueError(f"{got}whole along dimension {d}, {found}")
            if cut[axis] not in (None, d):
                raise ValueError(f"{got}cut along dimension {cut[axis]} as the others are, {found}")
            cut[axis] = d
    return cut


def _placements(cut: list[int | None]) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if d is None else Shard(d) for d in cut]
