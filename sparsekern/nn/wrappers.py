"""The DistributedDataParallel whose forward pass is running.

torch has only private names for it. Where one is missing, there seems to be none.
"""

from __future__ import annotations

from typing import Any

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
