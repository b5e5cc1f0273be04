"""What several parts need of the system: files, locks, signals, modules of an extra."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

# What flock says on a file system without locks (Lustre without flock, some FUSE); 524 is Linux's
# ENOTSUPP, which NFS servers return.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, 524}
# Flags that Windows lacks count as none.
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)


def require(module: str, purpose: str) -> ModuleType:
    """Import a module of the extra ``sparsekern[data]``.

    Raises:
        ModuleNotFoundError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{purpose} needs {module}; install it with: pip install 'sparsekern[data]'",
            name=module,
        ) from error


def torch_missing(error: ModuleNotFoundError) -> BaseException:
    """Choose what to raise when the import of torch failed.

    For the command ``sparsekern`` its end, after a line that says so; for others an error that says
    what to install.
    """
    if error.name != "torch":
        return error
    text = "sparsekern needs torch, which is not installed (pip install torch)"
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # python -m sparsekern, before runpy has found the file
        arguments = sys.orig_argv
        started = arguments[arguments.index("-m") + 1]
    if Path(started).stem != "sparsekern":
        return ModuleNotFoundError(text, name="torch")
    sys.stderr.write(f"sparsekern: error: {text}\n")
    return SystemExit(2)


def sync(path: Path) -> None:
    """Make a file's content, or the renames in a folder, durable where the system can (POSIX)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends without an error.

    A crash at any moment leaves the old content or the new, never a mix. A symbolic link of that
    name is replaced itself, and what it points to stays as it is.
    """
    # One name for all: what a killed process left is removed by the next one's first write.
    temporary = path.with_name(".new")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _BINARY
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def open_plain(path: Path) -> BufferedReader:
    """Open a file to read.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is a folder, a pipe or a device, which could block or never end.
    """
    descriptor = os.open(path, os.O_RDONLY | _NONBLOCK | _BINARY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return os.fdopen(descriptor, "rb")


def open_appending(path: Path) -> BinaryIO:
    """Open a file to append to, and make it if there is none.

    Raises:
        OSError: it is a symbolic link, which could lead anywhere, or no plain file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | _NOFOLLOW | _NONBLOCK | _BINARY
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise OSError(error.errno, "is a symbolic link", str(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return os.fdopen(descriptor, "ab")


def lock_file(path: Path) -> Callable[[], None] | None:
    """Lock a file, which is made if there is none; return what unlocks it.

    It is unlocked when the function returned is called or dropped, or the process ends. None when
    another process (or another call) holds the lock.

    Where the file system has no locks, a warning says so and nothing is locked.

    Raises:
        OSError: the file cannot be written, or is a symbolic link.
    """
    file = open_appending(path)
    try:
        if _try_lock(file):
            return file.close
    except OSError as error:
        if error.errno in NO_LOCKS:
            warnings.warn(
                f"the file system of {path.parent} has no locks ({error.strerror}): nothing keeps "
                "two processes from writing there at once",
                stacklevel=2,
            )
            return file.close
        file.close()
        raise
    file.close()
    return None


def _try_lock(file: BinaryIO) -> bool:
    """Try to lock an open file; tell whether it got the lock, which it holds until it is closed."""
    # Not the package filelock: where flock is missing, its versions say that another process holds
    # the lock, raise NotImplementedError, or leave a file that a killed process never takes away.
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
            return False
        raise
    return True


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM in a list; a second one acts as usual.

    Only the main thread can listen; elsewhere the list stays empty.
    """
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        stop.append(number)
        restore()

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
