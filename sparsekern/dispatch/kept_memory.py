"""Memory of large outputs on the CPU, kept when they are freed for the next output of the same
size.

A training step makes the same large outputs every time: gradients of the weights, masked
activations. The C library returns blocks of their size to the system, which gives them anew, page
by page and cleared, in the next step. What is kept is a reference to torch's own storages, so that
outputs can be resized, shared and saved as any other tensor; a storage is free when nobody else
holds it.
"""

from __future__ import annotations

import os
import sys
import threading

import torch

# Storages are kept up to so many bytes together, those in use included.
LIMIT = 2 << 30

_storages: list[torch.UntypedStorage] = []  # the one given out longest ago first
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock  # another thread may have held it
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _holders(storages: list[torch.UntypedStorage], at: int) -> tuple[int, int]:
    """References to a storage from Python, and from tensors."""
    return sys.getrefcount(storages[at]), torch._C._storage_Use_Count(storages[at]._cdata)


def _holders_are_shown() -> bool:
    """Whether torch's private names tell who holds a storage; else nothing is kept."""
    try:
        storages = [torch.UntypedStorage(0)]
        alone = _holders(storages, 0)
        tensor = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storages[0])
        shared = _holders(storages, 0)
        del tensor
        return shared != alone == _holders(storages, 0)
    except (AttributeError, TypeError):
        return False


_known = _holders_are_shown()
_LIST_ALONE = _holders([torch.UntypedStorage(0)], 0) if _known else None


def _free(at: int) -> bool:
    return _holders(_storages, at) == _LIST_ALONE


def storage_of(size: int) -> torch.UntypedStorage:
    """A storage of so many bytes, its content undefined. If none of that size is free the sizes
    have changed: then all free ones go."""
    if not _known:
        return torch.UntypedStorage(size)
    with _lock:
        for at in range(len(_storages)):
            # One that was resized, or is shared with another process, is not taken again.
            if _free(at) and _storages[at].nbytes() == size and not _storages[at].is_shared():
                _storages.append(_storages.pop(at))
                return _storages[-1]
        _drop_free()
        storage = torch.UntypedStorage(size)
        if size <= LIMIT:
            _storages.append(storage)
            while sum(kept.nbytes() for kept in _storages) > LIMIT:
                del _storages[0]
        return storage


def _drop_free() -> None:
    for at in reversed(range(len(_storages))):
        if _free(at):
            del _storages[at]


def kept_bytes() -> int:
    """Bytes of freed storages that are kept now."""
    with _lock:
        return sum(_storages[at].nbytes() for at in range(len(_storages)) if _free(at))


def empty_cache() -> None:
    """Give the memory of freed large outputs on the CPU back to the system.

    Outputs of 32 MiB and more leave theirs, up to 2 GiB, to the next ones of the same sizes.
    torch.cuda.empty_cache() is the same for GPUs.

    Example:
        >>> import sparsekern
        >>> sparsekern.empty_cache()
    """
    with _lock:
        _drop_free()
