"""New HDF5 files, under a temporary name until everything is on the disk.

HDF5 does not survive a full disk: it crashes as the file is closed, or when the process ends. So
the space for what is about to be written, and for what closing the file will write, is taken from
the system first: where that fails, HDF5 has written nothing, and the file closes in good order.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .._system import lock_file, require, sync
from .errors import DataError
from .hdf5 import one_line

# What writing takes beside the values: what HDF5 still holds of chunks (HDF5 2: 8 MiB), tables of
# chunks, and more when closing.
SPARE_BYTES = 16 << 20
# All metadata of that layout have checksums, and a chunk is found without a walk.
LAYOUT = ("v110", "v110")


class NewFile:
    """An HDF5 file that is being written.

    Attributes:
        file: of h5py.
        path: its name when it is complete; may be changed until then.
    """

    def __init__(self, file: Any, raw: BinaryIO, path: Path, function: str) -> None:
        self.file, self.path = file, path
        self._raw, self._function = raw, function

    def reserve(self, size: int) -> None:
        """Take space for so many bytes more, and some, from the system.

        Raises:
            DataError: the disk is full, or the file would be larger than files may be.
        """
        with self.writing():
            if hasattr(os, "posix_fallocate"):
                reserve(self.file, self._raw, size)
            else:
                check_space(self.path, size + SPARE_BYTES, self._function)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn errors of the disk, in HDF5's words or the system's, into a DataError."""
        try:
            yield
        except DataError:
            raise
        except (OSError, RuntimeError) as error:
            raise _cannot_write(self.path, self._function, error) from error


@contextmanager
def new_hdf5(path: Path, function: str) -> Iterator[NewFile]:
    """Open a file that gets its name when the block ends, and is removed when it raises.

    Args:
        path: the name it gets.
        function: how messages begin.

    Raises:
        DataError: another process writes it, or it cannot be written.
    """
    h5py = require("h5py", f"writing {path}")
    temporary = path.with_name(f".{path.name}.new")
    try:
        # HDF5 would empty the file of another writer before it looks whether it is locked.
        unlock = lock_file(temporary)
    except OSError as error:
        raise _cannot_write(path, function, error) from error
    if unlock is None:
        raise DataError(f"{function}: another process is writing {path}")
    try:
        # Under the lock: another process may have finished just now.
        check_new(path, function)
        try:
            raw = open(temporary, "r+b", buffering=0)
            # Without a cache: what is written is in the file, and the next end is known.
            file = h5py.File(temporary, "w", libver=LAYOUT, locking=False, rdcc_nbytes=0)
        except OSError as error:
            raise _cannot_write(path, function, error) from error
        with raw:
            new = NewFile(file, raw, path, function)
            try:
                new.reserve(0)
                yield new
            except BaseException:
                with suppress(OSError, RuntimeError):
                    file.close()
                raise
            with new.writing():
                file.close()
            with new.writing():
                trim(raw)
                os.fsync(raw.fileno())
                os.replace(temporary, new.path)
                sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        unlock()


def reserve(file: Any, raw: BinaryIO, size: int) -> None:
    """Take space for so many bytes more, and some; :func:`trim` gives it back.

    Args:
        file: of h5py.
        raw: the same file, open for writing.
        size: bytes.

    Raises:
        OSError: the disk is full, or the file would be larger than files may be.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(raw.fileno(), file.id.get_filesize(), size + SPARE_BYTES)


def check_new(path: Path, function: str) -> None:
    """Raise DataError where a file of that name is there, or its folder is not."""
    if os.path.lexists(path):
        raise DataError(f"{function}: {path} exists already (remove it or name another)")
    if not path.parent.is_dir():
        raise DataError(f"{function}: folder not found: {path.parent}")


def check_space(path: Path, size: int, function: str) -> None:
    """Raise DataError where a file of so many bytes will not fit."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise DataError(
            f"{function}: cannot write {path}: No space left on device ({size / 1e6:.0f} MB are "
            f"needed, {free / 1e6:.0f} MB are free)"
        )


def trim(raw: BinaryIO) -> None:
    """Give back the space after the end of a closed file, which its superblock states.

    Superblocks begin with 8 bytes of signature and the version. Version 0: sizes, flags, two
    offsets, and the end at byte 40; from version 2 on the end lies at byte 28
    (https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html#Superblock).
    """
    raw.seek(0)
    start = raw.read(48)
    end_position, size_of_offsets = {0: (40, 13), 2: (28, 9), 3: (28, 9)}.get(start[8], (0, 0))
    if start[:8] == b"\x89HDF\r\n\x1a\n" and end_position and start[size_of_offsets] == 8:
        raw.truncate(int.from_bytes(start[end_position : end_position + 8], "little"))


def _cannot_write(path: Path, function: str, error: BaseException) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
    return DataError(f"{function}: cannot write {path}: {reason}")
