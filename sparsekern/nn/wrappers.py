"""The DistributedDataParallel whose forward pass is running.

torch has only private names for it. Where one is missing, none is seen.
"""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel

_active = getattr(DistributedDataParallel, "_get_active_ddp_module", lambda: None)


def active_wrapper() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass is running in this process."""
    wrapper: DistributedDataParallel | None = _active()
    return wrapper


def in_join() -> bool:
    """Whether processes may have different numbers of batches, so that what is sent in this forward
    pass must be what torch expects."""
    join: Any = getattr(active_wrapper(), "_join_config", None)
    return join is not None and bool(join.enable)
