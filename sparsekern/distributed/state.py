"""The state of a sharded model: parts of all latents, as torch and its checkpoints know them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .layout import Layout
from .sharding import DATA, LATENTS, Shards

COUNTS = "counter.rows_since_fired"


def wrap_counts(model: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Give the counts of the own latents in a state as a part of all (a hook of torch's)."""
    if f"{prefix}{COUNTS}" in state:
        shards: Shards = model.shards
        state[f"{prefix}{COUNTS}"] = shards.wrap(state[f"{prefix}{COUNTS}"])


def cut_state(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the own rows of a state, be it of one process or of several (a hook of torch's)."""
    shards: Shards = model.shards
    for name, current in model.state_dict(prefix=prefix).items():
        given = state.get(name)
        if not isinstance(current, DTensor) or given is None:
            continue
        if not isinstance(given, DTensor):
            given = given.to(shards.device)
            cut = current.dim() > 1 and given.shape[:1] == (shards.layout.latents,)
            given = (
                shards.wrap(shards.layout.cut(given)) if cut else shards.replicate(given.clone())
            )
        state[name] = shards.local(given) if name == f"{prefix}{COUNTS}" else given


def is_cut(value: Tensor) -> bool:
    """Tell whether each process has a part of a value."""
    return isinstance(value, DTensor) and any(p.is_shard() for p in value.placements)


def local_part(value: Tensor) -> Tensor:
    """Return what this process holds of a value, in memory that it shares."""
    if not isinstance(value, DTensor):
        return value
    local: Tensor = value.to_local()
    return local


def whole_shape(value: Tensor) -> list[int]:
    """Return the shape that a value has in one process."""
    shape = list(value.shape)
    return [shape[0] * shape[1], *shape[2:]] if is_cut(value) else shape


def gather_to_first(value: Tensor) -> Tensor:
    """Return a value with all latents on the CPU, in the first process of the job.

    All processes must call it; what the others get is of no use. The first needs memory for the
    whole value and a part. torch.distributed's default group must take tensors of the CPU.
    """
    if not isinstance(value, DTensor) or not is_cut(value):
        return local_part(value)
    mesh, layout = value.device_mesh, _layout(value)
    local = local_part(value.detach()).cpu().contiguous()
    if DATA in (mesh.mesh_dim_names or ()) and mesh.get_local_rank(DATA) > 0:
        return local
    if layout.rank > 0:
        dist.send(local, dst=0)
        return local
    whole = torch.empty(value.shape, dtype=value.dtype, device="cpu")
    for rank in range(layout.processes):
        its = Layout(layout.latents, layout.columns, layout.processes, rank)
        part = local
        if rank > 0:
            shape = (its.rows, its.width, *value.shape[2:])
            part = torch.empty(shape, dtype=value.dtype, device="cpu")
            dist.recv(part, src=int(mesh.mesh.flatten()[rank]))
        whole.narrow(1, its.first, its.width).copy_(part)
    return whole.flatten(0, 1)


def part_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return what belongs in place of `like` from a value with all latents; a copy where cut."""
    if not isinstance(like, DTensor):
        return whole
    local = whole
    if is_cut(like):
        layout = _layout(like)
        local = layout.cut(whole).unflatten(0, (layout.rows, layout.width))
    return DTensor.from_local(
        local.to(like.to_local().device), like.device_mesh, like.placements, run_check=False,
        shape=like.shape, stride=like.stride(),
    )  # fmt: skip


def _layout(value: DTensor) -> Layout:
    """Return which latents of a value that is cut this process has."""
    mesh = value.device_mesh
    rank = mesh.get_local_rank(LATENTS)
    processes = mesh[LATENTS].size()
    return Layout(value.shape[0] * value.shape[1], value.shape[1], processes, rank)


def gather_value(value: Any) -> Any:
    """Return a value of a state with all latents, on the CPU; all processes must call it."""
    if not isinstance(value, DTensor):
        return value.cpu() if isinstance(value, Tensor) else value
    whole = value.full_tensor().cpu()
    return whole.flatten(0, 1) if any(p.is_shard() for p in value.placements) else whole
