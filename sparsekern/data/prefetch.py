"""A generator that a thread runs ahead of its consumer."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Generator
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def prefetched(source: Generator[Item], ahead: int) -> Generator[Item]:
    """Yield the items of ``source``, made by a thread while the consumer works.

    The thread starts with the first item asked for. It has ended, and ``source`` is closed, when
    this iterator is exhausted, closed, or raises.

    Raises:
        RuntimeError: another process, forked since, goes on with it: the thread is not there.

    Args:
        source: run by the thread only. What it raises is raised here.
        ahead: items that exist beyond the one the consumer holds, the one being made included.
    """
    # Unbounded: the permits bound it, and the thread never blocks on putting.
    items: queue.SimpleQueue[tuple[object, BaseException | None]] = queue.SimpleQueue()
    permits = threading.Semaphore(ahead)
    stop = threading.Event()
    thread = threading.Thread(
        target=_produce,
        args=(source, items, permits, stop),
        name="sparsekern-prefetch",
        daemon=True,
    )
    thread.start()
    owner = os.getpid()
    try:
        while True:
            if os.getpid() != owner:
                raise RuntimeError(
                    "batches: a forked process cannot go on with its parent's iterator (call "
                    "batches in the process that takes them)"
                )
            item, error = items.get()
            if error is not None:
                raise error
            if item is _END:
                return
            # The consumer takes the item: the thread may make another.
            permits.release()
            yield item  # type: ignore[misc]
            item = None
    finally:
        # In a forked process there is no thread, and its locks may be held for ever.
        if os.getpid() == owner:
            stop.set()
            permits.release()
            thread.join()


def _produce(
    source: Generator[Item],
    items: queue.SimpleQueue[tuple[object, BaseException | None]],
    permits: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        while True:
            permits.acquire()
            if stop.is_set():
                return
            try:
                item = next(source)
            except StopIteration:
                items.put((_END, None))
                return
            items.put((item, None))
            del item
    except BaseException as error:
        items.put((None, error))
    finally:
        source.close()
