"""Memory of large outputs on the CPU, kept for the next output of the same size.

A training step makes the same large outputs every time: gradients of the weights, masked
activations. The C library returns blocks of their size to the system, which maps and clears them
page by page in the next step. Here a reference keeps torch's own storages alive, so outputs can be
resized, shared and saved as any other tensor. A storage is free when nothing else refers to it.
"""

from __future__ import annotations

import os
import sys
import threading

import torch

# Largest number of bytes in storages together, those in use included.
LIMIT = 2 << 30

_storages: list[torch.UntypedStorage] = []  # least recently used first
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock  # another thread may have held it
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _reference_counts(storages: list[torch.UntypedStorage], i: int) -> tuple[int, int]:
    """Return the numbers of references to a storage from Python and from tensors."""
    return sys.getrefcount(storages[i]), torch._C._storage_Use_Count(storages[i]._cdata)


def _private_names_work() -> bool:
    """Return True if references are counted as expected; else nothing is kept."""
    try:
        storages = [torch.UntypedStorage(0)]
        alone = _reference_counts(storages, 0)
        tensor = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storages[0])
        shared = _reference_counts(storages, 0)
        del tensor
        return shared != alone == _reference_counts(storages, 0)
    except (AttributeError, TypeError):
        return False


_known = _private_names_work()
_UNUSED = _reference_counts([torch.UntypedStorage(0)], 0) if _known else None


def _is_free(i: int) -> bool:
    return _reference_counts(_storages, i) == _UNUSED


def storage_of(size: int) -> torch.UntypedStorage:
    """Return a storage of so many bytes with undefined content.

    If none of that size is free, sizes have changed: then all free ones are released.
    """
    if not _known:
        return torch.UntypedStorage(size)
    with _lock:
        for i in range(len(_storages)):
            # One that was resized, or is shared with another process, is not taken again.
            if _is_free(i) and _storages[i].nbytes() == size and not _storages[i].is_shared():
                _storages.append(_storages.pop(i))
                return _storages[-1]
        _release_free()
        storage = torch.UntypedStorage(size)
        if size <= LIMIT:
            _storages.append(storage)
            while sum(kept.nbytes() for kept in _storages) > LIMIT:
                del _storages[0]
        return storage


def _release_free() -> None:
    for i in reversed(range(len(_storages))):
        if _is_free(i):
            del _storages[i]


def kept_bytes() -> int:
    """Return the number of bytes in free storages that are kept now."""
    with _lock:
        return sum(_storages[i].nbytes() for i in range(len(_storages)) if _is_free(i))


def empty_cache() -> None:
    """Give the memory of freed large outputs on the CPU back to the system.

    Outputs of 4 MiB and more leave theirs, up to 2 GiB, to the next ones of the same sizes.
    torch.cuda.empty_cache() is the same for GPUs.

    Example:
        >>> import sparsekern
        >>> sparsekern.empty_cache()
    """
    with _lock:
        _release_free()
