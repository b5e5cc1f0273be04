"""Files of images with known factors, ``.npz`` and HDF5: read and written in blocks of rows.

The arrays of a set are the images and, per image, the classes or the values of its factors; how
they are called depends on the set and on the kind of file (:class:`Fields`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..._system import require
from ..hdf5 import check_stored, open_hdf5
from ..hdf5_writing import reserve, trim
from ..npy import read_header

NPZ, HDF5 = ".npz", ".h5"
# How each kind of file begins.
MAGIC = {NPZ: b"PK", HDF5: b"\x89HDF\r\n\x1a\n"}
READ_ROWS = 2048  # 8 MB of dSprites, 25 MB of Shapes3D
# Of deflate. Shapes3D takes 890 MB at 1, 670 at 4 in 1.3 times the time, 610 at 6 in 2.1 times.
LEVEL = 4
STORED_BYTES = 1 << 20  # of HDF5's chunks, which are unpacked as a whole


class Fields(NamedTuple):
    """Names of the arrays in one kind of file; ``None`` for what it does not hold."""

    images: str
    classes: str | None
    values: str | None


class NpzFields:
    """Shapes and row blocks of the arrays in an ``.npz``, without unpacking it whole."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)

    def __enter__(self) -> NpzFields:
        return self

    def __exit__(self, *error: object) -> None:
        self._archive.close()

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Read shape and dtype.

        Raises:
            KeyError: there is no such field, or it is not in row-major order.
            ValueError: its header is damaged.
            EOFError: it is shorter than its header says.
        """
        with self._open(name) as stream:
            shape, dtype = self._header(name, stream)
            # Before anybody makes room for what a damaged header promises.
            held = self._archive.getinfo(f"{name}.npy").file_size - stream.tell()
            width = dtype.itemsize * int(np.prod(shape[1:]))
            if shape and held < shape[0] * width:
                raise EOFError(f"{name} ends after {held // width} rows")
            return shape, dtype

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Read the rows in blocks, from first to last."""
        with self._open(name) as stream:
            shape, dtype = self._header(name, stream)
            width = dtype.itemsize * int(np.prod(shape[1:]))
            for start in range(0, shape[0], READ_ROWS):
                rows = min(READ_ROWS, shape[0] - start)
                data = stream.read(rows * width)
                if len(data) != rows * width:
                    raise EOFError(f"{name} ends after {start + len(data) // width} rows")
                yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])

    def _open(self, name: str) -> Any:
        if f"{name}.npy" not in self._archive.namelist():
            raise KeyError(name)
        return self._archive.open(f"{name}.npy")

    @staticmethod
    def _header(name: str, stream: Any) -> tuple[tuple[int, ...], np.dtype]:
        try:
            shape, fortran, dtype = read_header(stream)
        except ValueError as error:
            raise ValueError(f"{name}.npy: {error}") from error
        if fortran and len(shape) > 1:
            raise KeyError("in row-major order")
        return shape, dtype


class Hdf5Fields:
    """The same for HDF5."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_hdf5(path, "data file")

    def __enter__(self) -> Hdf5Fields:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Read shape and dtype; KeyError if there is no such field."""
        if name not in self._file or not hasattr(self._file[name], "dtype"):
            raise KeyError(name)
        field = self._file[name]
        if field.shape is None:
            raise KeyError(f"{name} with values")
        where = f"data file is truncated or damaged: {self._path}: {name}"
        check_stored(field, self._path, where)
        return field.shape, field.dtype

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Read the rows in blocks, from first to last."""
        field = self._file[name]
        for start in range(0, field.shape[0], READ_ROWS):
            yield field[start : start + READ_ROWS]


READERS: dict[str, Callable[[Path], NpzFields | Hdf5Fields]] = {NPZ: NpzFields, HDF5: Hdf5Fields}


def kind_of(path: Path) -> str | None:
    """Tell NPZ or HDF5 by the first bytes; ``None`` for anything else."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((kind for kind, magic in MAGIC.items() if start.startswith(magic)), None)


def suffix_kind(path: Path) -> str:
    """Tell NPZ or HDF5 (``.h5`` or ``.hdf5``) by the suffix; else return the suffix itself."""
    suffix = path.suffix.lower()
    return HDF5 if suffix == ".hdf5" else suffix


class Column(NamedTuple):
    """An array to write: its rows come in blocks, as they are needed."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Iterable[np.ndarray]


def pack(
    path: Path, kind: str, arrays: Mapping[str, Column], metadata: Mapping[str, Any] | None
) -> None:
    """Write a new file of the given kind; the same arrays give the same bytes.

    Args:
        path: the file.
        kind: NPZ or HDF5.
        arrays: by name.
        metadata: an ``.npz`` gets it as the published one has it, a pickled mapping in a field
            ``metadata``, which :class:`NpzFields` never opens; HDF5 as attributes, for which
            mappings are too much and left out.
    """
    (_pack_npz if kind == NPZ else _pack_hdf5)(path, arrays, metadata or {})


def _pack_npz(path: Path, arrays: Mapping[str, Column], metadata: Mapping[str, Any]) -> None:
    write_header = np.lib.format.write_array_header_1_0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as archive:
        for name, array in arrays.items():
            descr = np.lib.format.dtype_to_descr(array.dtype)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                write_header(stream, {"descr": descr, "fortran_order": False, "shape": array.shape})
                for block in array.blocks:
                    stream.write(np.ascontiguousarray(block).data)
        if metadata:
            with archive.open("metadata.npy", "w") as stream:
                np.lib.format.write_array(stream, np.array(dict(metadata), dtype=object))


def _pack_hdf5(path: Path, arrays: Mapping[str, Column], metadata: Mapping[str, Any]) -> None:
    h5py = require("h5py", f"writing {path}")
    # Without a lock, which some file systems lack: only the caller knows this name.
    with h5py.File(path, "w", locking=False) as file, open(path, "r+b", buffering=0) as raw:
        for name, array in arrays.items():
            width = array.dtype.itemsize * int(np.prod(array.shape[1:]))
            rows = max(1, min(array.shape[0], STORED_BYTES // width))
            field = file.create_dataset(
                name, array.shape, array.dtype, chunks=(rows, *array.shape[1:]),
                compression="gzip", compression_opts=LEVEL,
            )  # fmt: skip
            start = 0
            for block in array.blocks:
                # HDF5 can crash on a full disk.
                reserve(file, raw, block.nbytes)
                field[start : start + len(block)] = block
                start += len(block)
        for name, value in metadata.items():
            if not isinstance(value, Mapping):
                file.attrs[name] = value
    with open(path, "r+b", buffering=0) as raw:
        trim(raw)
