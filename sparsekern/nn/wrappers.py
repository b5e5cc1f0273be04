"""The wrapper of torch's whose forward pass is running: DistributedDataParallel or fully_shard.

torch has only private names for it. Where one is missing, there seems to be no
DistributedDataParallel, and fully_shard seems to be at work where parameters are whole.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_active = getattr(DistributedDataParallel, "_get_active_ddp_module", lambda: None)


def active_wrapper() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel whose forward pass is running in this process, or None."""
    wrapper: DistributedDataParallel | None = _active()
    return wrapper


def in_join() -> bool:
    """Return True in a forward pass under torch's Join.

    Processes may then have different numbers of batches, and Join allows no other collectives than
    its own.
    """
    join: Any = getattr(active_wrapper(), "_join_config", None)
    return join is not None and bool(join.enable)


def has_other_processes() -> bool:
    """Return True if there are other processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1


def is_fully_sharded(module: nn.Module) -> bool:
    """Return True if fully_shard was given this module; without importing it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def kinds_of(kind: type) -> set[type]:
    """Return a type with those derived from it."""
    return {kind}.union(*map(kinds_of, kind.__subclasses__()))


def fully_sharded_kinds() -> set[type]:
    """Return the types of the modules that fully_shard was given, which it makes for them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return set() if fsdp is None else kinds_of(fsdp.FSDPModule) - {fsdp.FSDPModule}


def is_cut(tensor: torch.Tensor) -> bool:
    """Return True if a process holds a part of a tensor (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def in_fully_sharded_forward(module: nn.Module) -> bool:
    """Return True in the forward pass of a module that fully_shard was given, or its second run.

    So it is in methods given to register_fsdp_forward_method.
    """
    state: Any = getattr(module, "_get_fsdp_state", lambda: None)()
    name = getattr(getattr(state, "_training_state", None), "name", None)
    if name is None:
        return not any(is_cut(parameter) for parameter in module.parameters())
    return bool(name in ("FORWARD", "PRE_BACKWARD"))
