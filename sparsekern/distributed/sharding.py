"""Tensors that are cut by latents: what this process computes with, and what torch knows of them.

Kernels get plain tensors, the rows of this process. Parameters are DTensors, so that optimizers,
clipping of gradients and checkpoints know that each process holds a part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .collectives import Group
from .layout import Layout, columns_for

DATA, LATENTS = "data", "latents"


class Shards:
    """The processes of a mesh and the latents of this one.

    Args:
        mesh: with a dimension "latents" and, maybe, one "data".
        latents: N.
        groups: of consecutive latents, each of which all processes share out; divides N.
        columns: see layout.py; None takes the least divisor of at least 64.

    Raises:
        TypeError, ValueError: they do not fit each other.
    """

    def __init__(self, mesh: DeviceMesh, latents: int, groups: int, columns: int | None) -> None:
        names = _dimensions(mesh)
        self.mesh = mesh
        self.latents = Group(mesh[LATENTS].get_group())
        self.data = Group(mesh[DATA].get_group() if DATA in names else None)
        if columns is None:
            columns = columns_for(latents // groups)
        if (latents // groups) % columns:
            within = f"latents / groups = {latents // groups}" if groups > 1 else str(latents)
            raise ValueError(
                f"ShardedAutoencoder: columns must divide {within} (the latents), got {columns}"
            )
        self.layout = Layout(latents, columns, self.latents.size, self.latents.rank)
        if latents < self.latents.size:
            raise ValueError(
                f"ShardedAutoencoder: latents must be at least the {self.latents.size} processes "
                f"that share them, got {latents}"
            )
        if self.layout.widest * (self.latents.size - 1) >= columns:
            raise ValueError(
                f"ShardedAutoencoder: columns must be so many that each of {self.latents.size} "
                f"processes gets some, got {columns}"
            )
        self._cut = [Replicate() if name == DATA else Shard(1) for name in names]
        self._whole = [Replicate() for _ in names]

    def __deepcopy__(self, memo: Any) -> Shards:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "ShardedAutoencoder: it must not be pickled, since it belongs to processes: use "
            "save_pretrained or torch.distributed.checkpoint"
        )

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        kind = self.mesh.device_type
        index = torch.get_device_module(kind).current_device() if kind != "cpu" else None
        return torch.device(kind) if index is None else torch.device(kind, index)

    def wrap(self, own: Tensor) -> DTensor:
        """Return the tensor [N / V, V, ...] of which this process has the rows own [n, ...]."""
        layout = self.layout
        shape = torch.Size((layout.rows, layout.columns, *own.shape[1:]))
        local = own.contiguous().unflatten(0, (layout.rows, layout.width))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self._cut, run_check=False, shape=shape, stride=stride
        )

    def replicate(self, tensor: Tensor) -> DTensor:
        """Return a tensor that every process holds whole."""
        return DTensor.from_local(tensor, self.mesh, self._whole, run_check=False)

    def local(self, tensor: Tensor) -> Tensor:
        """Return what this process holds of a tensor: rows [n, ...] where it is cut, else all.

        It is differentiable: where `tensor` gets a gradient, that is a DTensor as it is.
        """
        if not isinstance(tensor, DTensor):
            return tensor
        local = tensor.to_local()
        return local.flatten(0, 1) if Shard(1) in tensor.placements else local


def _dimensions(mesh: DeviceMesh) -> tuple[str, ...]:
    """Return the names of a mesh's dimensions; raise unless they are those known here."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"ShardedAutoencoder: mesh must be a DeviceMesh, got {type(mesh).__name__}")
    names = tuple(mesh.mesh_dim_names or ())
    if LATENTS not in names or set(names) - {LATENTS, DATA}:
        raise ValueError(
            "ShardedAutoencoder: mesh must have the dimension 'latents' and may have 'data', "
            f"got {names or 'no names'}"
        )
    return names
