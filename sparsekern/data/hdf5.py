"""Opening HDF5 files to read them: locks, damage and claims, told apart in one line."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

from .._system import NO_LOCKS, require
from .errors import DataError

# Deflate packs zeros a thousand times; a file that claims more has never held what it claims.
LARGEST_RATIO = 1024
SMALLEST_STORED = 1 << 16
# What h5py and numpy raise about damaged files: HDF5 has no error codes.
DAMAGE = (
    OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError,
    AttributeError, IndexError, SystemError, NotImplementedError,
)  # fmt: skip


def open_hdf5(path: Path, what: str, **options: Any) -> Any:
    """Open an HDF5 file to read it; on a file system without locks, without one.

    Args:
        path: the file.
        what: how messages call the file.
        options: of h5py.File.

    Raises:
        DataError: it is not HDF5, damaged, or open for writing.
        ModuleNotFoundError: h5py is not installed.
    """
    h5py = require("h5py", f"reading {path}")
    try:
        try:
            file = h5py.File(path, "r", **options)
        except OSError as error:
            if lock_error_number(error) not in NO_LOCKS:
                raise
            # Nobody can hold a lock there, a writer neither.
            file = h5py.File(path, "r", locking=False, **options)
    except DAMAGE as error:
        raise DataError(_describe_failure(path, what, error)) from error
    if file.mode != "r":  # HDF5 shares it with a writer in this process
        file.close()
        raise DataError(_describe_lock(path, what, "it is open for writing in this process"))
    return file


def lock_error_number(error: OSError) -> int | None:
    """Find the number of the error that locking a file met; None if it was another step."""
    if "lock file" not in str(error):
        return None
    match = re.search(r"errno = (\d+)", str(error))
    return int(match[1]) if match else error.errno


def explain_no_locks(path: Path, error: object) -> str:
    """Explain that locks are needed and the file system has none."""
    return (
        f"the file system of {path} has no locks (set HDF5_USE_FILE_LOCKING=FALSE if no other "
        f"process writes it: {error})"
    )


def descriptor_of(dataset: Any) -> int | None:
    """Return the system's descriptor of the file that a dataset lives in; None without one.

    An external link may lead to another file than the one that was opened.
    """
    h5py = require("h5py", "reading HDF5")
    if dataset.file.id.get_access_plist().get_driver() != h5py.h5fd.SEC2:
        return None
    return int(dataset.file.id.get_vfd_handle())


def check_stored(dataset: Any, path: Path, where: str) -> None:
    """Raise DataError where a dataset is not what its file, or others, stored.

    HDF5 gives fill values for what it does not find: where a header promises far more than was
    ever written (so that nobody makes room, or plans, for it), and where the files of external
    storage or the sources of a virtual dataset are missing or too small.

    Args:
        dataset: of h5py.
        path: the file that was opened.
        where: how the message begins.
    """
    if dataset.is_virtual:
        _check_sources(dataset, path, where)
        return
    if dataset.external:
        _check_external(dataset, where)
        return
    stored, descriptor = dataset.id.get_storage_size(), descriptor_of(dataset)
    if descriptor is not None:
        stored = min(stored, os.fstat(descriptor).st_size)
    claimed = dataset.size * dataset.dtype.itemsize
    if claimed > LARGEST_RATIO * max(stored, SMALLEST_STORED):
        raise DataError(
            f"{where} claims {list(dataset.shape)}, {claimed} bytes, of which at most {stored} "
            f"were ever stored"
        )


def _check_external(dataset: Any, where: str) -> None:
    left = dataset.size * dataset.id.get_type().get_size()
    prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "")
    prefix = prefix.replace("${ORIGIN}", os.path.dirname(os.path.abspath(dataset.file.filename)))
    for name, offset, size in dataset.external:
        part, needed = os.path.join(prefix, name), min(left, size)
        if not os.path.isfile(part) or os.path.getsize(part) < offset + needed:
            raise DataError(f"{where} is kept in another file, which is missing or short: {part}")
        left -= needed
    if left > 0:
        raise DataError(f"{where} is kept in other files, which lack {left} bytes of it")


def _check_sources(dataset: Any, path: Path, where: str) -> None:
    h5py = require("h5py", f"reading {path}")
    sources = dataset.virtual_sources()
    mapped = sum(source.vspace.get_select_npoints() for source in sources)
    if dataset.size > LARGEST_RATIO * max(mapped, SMALLEST_STORED):
        raise DataError(
            f"{where} claims {list(dataset.shape)}, of which {mapped} values have sources"
        )
    for source in sources:
        name = source.file_name
        if "%" in name.replace("%%", "") or "%" in source.dset_name.replace("%%", ""):
            raise DataError(f"{where} is virtual with a pattern of sources, {one_line(name)!r}")
        part = path if name == "." else _source_file(name, dataset)
        if part is None:
            raise DataError(f"{where} is virtual, and its source is missing: {one_line(name)}")
        with open_hdf5(part, "activation file") as file:
            origin = file.get(source.dset_name)
            if not isinstance(origin, h5py.Dataset) or not _covers(origin, source):
                raise DataError(
                    f"{where} is virtual, and {one_line(source.dset_name)!r} is missing or too "
                    f"small in {part}"
                )
            if origin.is_virtual:
                raise DataError(f"{where} is a virtual dataset of virtual ones")
            check_stored(origin, part, f"{where}: {one_line(source.dset_name)} in {part}")


def _covers(dataset: Any, source: Any) -> bool:
    """Tell whether a dataset has all that a virtual one takes from it."""
    h5py = require("h5py", "reading HDF5")
    if source.src_space.get_select_type() == h5py.h5s.SEL_ALL:
        return bool(dataset.size == source.vspace.get_select_npoints())
    _, last = source.src_space.get_select_bounds()
    shape = dataset.shape or ()
    return len(shape) == len(last) and all(map(int.__lt__, map(int, last), shape))


def _source_file(name: str, dataset: Any) -> Path | None:
    """Find the file of a virtual dataset's source where HDF5 looks for it."""
    folder = os.path.dirname(os.path.abspath(dataset.file.filename))
    prefixes = os.environ.get("HDF5_VDS_PREFIX", "").replace("${ORIGIN}", folder).split(os.pathsep)
    candidates = [os.path.join(prefix, name) for prefix in prefixes if prefix]
    if os.path.isabs(name):
        candidates, name = [name, *candidates], os.path.basename(name)
    candidates += [os.path.join(folder, name), name]
    return next((Path(candidate) for candidate in candidates if os.path.isfile(candidate)), None)


def one_line(text: object) -> str:
    """Remove line breaks and control characters, which names in damaged files hold."""
    return "".join(
        character if character.isprintable() else " " for character in " ".join(str(text).split())
    )


def _describe_failure(path: Path, what: str, error: BaseException) -> str:
    text = one_line(error)
    number = lock_error_number(error) if isinstance(error, OSError) else None
    if number in NO_LOCKS:
        return f"{what} cannot be locked: {explain_no_locks(path, text)}"
    if isinstance(error, BlockingIOError) or number is not None or "already open for" in text:
        return _describe_lock(path, what, text)
    if "signature not found" in text:
        return f"{what} is not HDF5: {path}"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EMFILE):
        return f"{what} cannot be opened: {path} ({os.strerror(error.errno)})"
    return f"{what} is truncated or damaged: {path} ({text})"


def _describe_lock(path: Path, what: str, reason: str) -> str:
    killed = "; after one that was killed, h5clear -s frees it" if "h5clear" in reason else ""
    return (
        f"{what} is locked by a writer: {path} (wait until it has finished and closed the file"
        f"{killed}: {reason})"
    )
