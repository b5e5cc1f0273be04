"""dSprites: 737,280 binary images of one sprite, each combination of six factors once.

Two sources with one result, a :class:`DSprites`:

* :func:`load` reads the published file (``.npz`` or its HDF5 twin) of
  https://github.com/google-deepmind/dsprites-dataset;
* :func:`rendered` draws a *dSprites-compatible, calibrated* set without any file. A pixel is on
  when its centre lies inside the sprite. The outlines are fitted to frames of the published
  animation: 80 % of its 320 frames come out bit for bit, the rest differ by 2 pixels on average.
  It is not the published data set, and results on it should say so.

The order of the images is that of the published file: ``index = sum(class * BASES)``, so the last
factor (posY) changes fastest.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import factors
from .factors import DataError, checked_classes, gather, subset

FACTORS = ("color", "shape", "scale", "orientation", "posX", "posY")
SIZES = (1, 3, 6, 40, 32, 32)
BASES = (737280, 245760, 40960, 1024, 32, 1)
COUNT = 737280
SIDE = 64
SHAPES = ("square", "ellipse", "heart")

# Outlines at scale 1, in pixels of the 64 x 64 image.
SQUARE_HALF_SIDE = 9.6
ELLIPSE_RADII = (12.76, 7.22)
# Radius of the heart at 0, 4, ..., 180 degrees from straight up; the left half mirrors the right.
HEART_RADII = (
    5.13, 6.34, 7.47, 8.31, 9.06, 9.69, 10.18, 10.56, 10.86, 11.05, 11.20, 11.26, 11.24, 11.23,
    11.16, 10.84, 10.70, 10.31, 10.00, 9.50, 9.17, 8.63, 8.43, 7.93, 7.56, 7.25, 6.95, 6.68, 6.56,
    6.24, 6.22, 6.07, 5.92, 5.94, 5.97, 5.89, 5.94, 6.03, 6.25, 6.30, 6.50, 6.76, 7.13, 7.58, 8.31,
    9.11,
)  # fmt: skip
HEART_STEP_DEGREES = 4.0

# Every sprite fits this window: the largest radius is the square's corner, 9.6 * sqrt(2) = 13.58.
WINDOW_MARGIN = 14
WINDOW = 29
RENDER_BLOCK = 2048
READ_BLOCK = 4096


@dataclass(frozen=True)
class DSprites:
    """Images with their factors.

    Attributes:
        images: uint8 ``[n, 64, 64]``, 0 or 1.
        classes: int64 ``[n, 6]``, one column per name in :data:`FACTORS`.
        source: where the images come from, for reports.
    """

    images: np.ndarray
    classes: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def values(self) -> np.ndarray:
        """Factor values, float64 ``[n, 6]``; see :func:`values_of`."""
        return values_of(self.classes)

    def split(self, *sizes: int) -> tuple[DSprites, ...]:
        """Consecutive, disjoint parts of the given sizes, from the front.

        Raises:
            ValueError: the sizes add up to more than there is.
        """
        if sum(sizes) > len(self):
            raise ValueError(
                f"DSprites.split: sizes must add up to at most {len(self)} (the number of images), "
                f"got {' + '.join(map(str, sizes))} = {sum(sizes)}"
            )
        ends = np.cumsum(sizes)
        return tuple(
            DSprites(self.images[end - size : end], self.classes[end - size : end], self.source)
            for size, end in zip(sizes, ends, strict=True)
        )

    def save(self, path: str | Path) -> None:
        """Writes a compressed ``.npz`` with the published fields, which :func:`load` reads back."""
        with open(path, "wb") as file:
            np.savez_compressed(
                file, imgs=self.images, latents_classes=self.classes, latents_values=self.values
            )


def classes_of(indices: np.ndarray) -> np.ndarray:
    """Factor classes int64 ``[n, 6]`` of image numbers ``[n]`` in 0..737279."""
    return factors.classes_of(indices, SIZES)


def index_of(classes: np.ndarray) -> np.ndarray:
    """Image numbers int64 ``[n]`` of factor classes ``[n, 6]``."""
    return checked_classes("index_of", classes, SIZES) @ np.array(BASES)


def values_of(classes: np.ndarray) -> np.ndarray:
    """Factor values float64 ``[n, 6]`` of factor classes ``[n, 6]``, as in the published file.

    color 1; shape 1 square, 2 ellipse, 3 heart; scale 0.5..1; orientation 0..2 pi in radians, both
    ends included (classes 0 and 39 look the same); posX and posY 0..1.
    """
    classes = checked_classes("values_of", classes, SIZES)
    tables = (
        np.array([1.0]),
        np.array([1.0, 2.0, 3.0]),
        np.linspace(0.5, 1.0, SIZES[2]),
        np.linspace(0.0, 2 * np.pi, SIZES[3]),
        np.linspace(0.0, 1.0, SIZES[4]),
        np.linspace(0.0, 1.0, SIZES[5]),
    )
    return np.stack([table[classes[:, i]] for i, table in enumerate(tables)], axis=1)


def render(classes: np.ndarray) -> np.ndarray:
    """Draws images uint8 ``[n, 64, 64]`` of factor classes ``[n, 6]``; about 50 us an image."""
    classes = checked_classes("render", classes, SIZES)
    images = np.zeros((len(classes), SIDE, SIDE), np.uint8)
    for shape, inside in enumerate((_in_square, _in_ellipse, _in_heart)):
        rows = np.flatnonzero(classes[:, 1] == shape)
        for start in range(0, len(rows), RENDER_BLOCK):
            block = rows[start : start + RENDER_BLOCK]
            _render_block(images, block, classes[block], inside)
    return images


def _render_block(
    images: np.ndarray,
    rows: np.ndarray,
    classes: np.ndarray,
    inside: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
    """Draws classes [b, 6] of one shape into images[rows]."""
    scale = values_of(classes)[:, 2]
    # The angle wraps at 39 steps, so that the first and last class give the very same numbers.
    angle = -2 * np.pi * (classes[:, 3] % (SIZES[3] - 1)) / (SIZES[3] - 1)
    centre_x = 16 + 32 * classes[:, 4] / (SIZES[4] - 1)
    centre_y = 16 + 32 * classes[:, 5] / (SIZES[5] - 1)
    left = np.floor(centre_x).astype(np.int64)[:, None] - WINDOW_MARGIN + np.arange(WINDOW)
    top = np.floor(centre_y).astype(np.int64)[:, None] - WINDOW_MARGIN + np.arange(WINDOW)
    dx = ((left + 0.5 - centre_x[:, None]) / scale[:, None])[:, None, :]  # [b, 1, window]
    dy = ((top + 0.5 - centre_y[:, None]) / scale[:, None])[:, :, None]  # [b, window, 1]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    images[rows[:, None, None], top[:, :, None], left[:, None, :]] = inside(
        cos * dx + sin * dy, cos * dy - sin * dx
    )


def _in_square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) <= SQUARE_HALF_SIDE


def _in_ellipse(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (u / ELLIPSE_RADII[0]) ** 2 + (v / ELLIPSE_RADII[1]) ** 2 <= 1


def _in_heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    square = u * u + v * v
    # Only the ring between the smallest and the largest radius needs the angle.
    inside = square <= min(HEART_RADII) ** 2
    ring = ~inside & (square <= max(HEART_RADII) ** 2)
    degrees = np.degrees(np.arctan2(np.abs(u[ring]), -v[ring]))
    knots = np.arange(len(HEART_RADII)) * HEART_STEP_DEGREES
    inside[ring] = square[ring] <= np.interp(degrees, knots, HEART_RADII) ** 2
    return inside


def rendered(count: int | None = None, *, seed: int = 0) -> DSprites:
    """Renders a random subset of the dSprites-compatible set, or all of it in its own order.

    Args:
        count: number of images, 1..737280; ``None`` for all, in the published order (3 GB).
        seed: chooses the subset. The subset of n images is the front of that of n + 1.

    Raises:
        CountError: count is out of range.
    """
    indices = subset("rendered", COUNT, count, seed)
    classes = classes_of(np.arange(COUNT) if indices is None else indices)
    return DSprites(render(classes), classes, "rendered dSprites-compatible images (calibrated)")


def load(path: str | Path, count: int | None = None, *, seed: int = 0) -> DSprites:
    """Reads the published dSprites file, ``.npz`` or HDF5, told apart by content.

    The file is streamed, so a subset needs memory only for itself.

    Args:
        path: the file. Needed fields: ``imgs`` uint8 ``[n, 64, 64]`` of 0 and 1,
            ``latents_classes`` integers ``[n, 6]``; in HDF5 ``imgs`` and ``latents/classes``.
            Pickled fields are not read.
        count: size of a random subset; ``None`` for the whole file in its own order.
        seed: chooses the subset, the same one as :func:`rendered` when the file is complete.

    Raises:
        DataError: the file is missing, truncated or damaged, or laid out otherwise.
        CountError: count is out of range; a DataError, too.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data file not found: {path}")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                return _read(path, _NpzFields(archive), count, seed)
        if start == b"\x89HDF\r\n\x1a\n":
            import h5py

            with h5py.File(path, "r") as file:
                return _read(path, _Hdf5Fields(file), count, seed)
    except KeyError as error:
        raise DataError(f"data file has another layout: {path} has no field {error}") from error
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"data file is truncated or damaged: {path} ({error})") from error
    raise DataError(f"data file has another layout: {path} is neither .npz nor HDF5")


class _NpzFields:
    """Shapes and row blocks of the arrays in an ``.npz``, without unpacking it whole."""

    names = ("imgs", "latents_classes")

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        with self._open(name) as stream:
            return self._header(name, stream)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        with self._open(name) as stream:
            shape, dtype = self._header(name, stream)
            width = dtype.itemsize * int(np.prod(shape[1:]))
            for start in range(0, shape[0], READ_BLOCK):
                rows = min(READ_BLOCK, shape[0] - start)
                data = stream.read(rows * width)
                if len(data) != rows * width:
                    raise EOFError(f"{name} ends after {start + len(data) // width} rows")
                yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])

    def _open(self, name: str):
        if f"{name}.npy" not in self.archive.namelist():
            raise KeyError(name)
        return self.archive.open(f"{name}.npy")

    @staticmethod
    def _header(name: str, stream) -> tuple[tuple[int, ...], np.dtype]:
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
            # Differs in the encoding of field names, which no number type has.
            (3, 0): np.lib.format.read_array_header_2_0,
        }
        try:
            version = np.lib.format.read_magic(stream)
            if version not in read:
                known = ", ".join(f"{major}.{minor}" for major, minor in read)
                major, minor = version
                raise ValueError(f"its header has version {major}.{minor}, known are {known}")
            shape, fortran, dtype = read[version](stream)
        except (SyntaxError, TypeError, ValueError, tokenize.TokenError) as error:
            # numpy reads the header as Python and lets some of Python's errors through.
            raise ValueError(f"{name}.npy: {error}") from error
        if fortran and len(shape) > 1:
            raise KeyError("in row-major order")
        return shape, dtype


class _Hdf5Fields:
    """The same for HDF5."""

    names = ("imgs", "latents/classes")

    def __init__(self, file) -> None:
        self.file = file

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        if name not in self.file or not hasattr(self.file[name], "dtype"):
            raise KeyError(name)
        return self.file[name].shape, self.file[name].dtype

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        field = self.file[name]
        for start in range(0, field.shape[0], READ_BLOCK):
            yield field[start : start + READ_BLOCK]


def _read(path: Path, fields: _NpzFields | _Hdf5Fields, count: int | None, seed: int) -> DSprites:
    images_name, classes_name = fields.names
    images_shape, images_dtype = fields.header(images_name)
    classes_shape, classes_dtype = fields.header(classes_name)
    if len(images_shape) != 3 or images_shape[1:] != (SIDE, SIDE) or images_dtype != np.uint8:
        raise DataError(
            f"data file has another layout: {path}: {images_name} must be uint8 "
            f"[n, {SIDE}, {SIDE}], got {images_dtype} {list(images_shape)}"
        )
    n = images_shape[0]
    if classes_shape != (n, len(SIZES)) or classes_dtype.kind not in "iu":
        raise DataError(
            f"data file has another layout: {path}: {classes_name} must be integers "
            f"[{n}, {len(SIZES)}], got {classes_dtype} {list(classes_shape)}"
        )
    wanted = subset(f"data file {path}", n, count, seed)
    images = gather(fields.blocks(images_name), wanted, images_shape[1:], images_dtype)
    classes = gather(fields.blocks(classes_name), wanted, classes_shape[1:], classes_dtype)
    classes = classes.astype(np.int64)
    if images.size and images.max() > 1:
        raise DataError(
            f"data file has another layout: {path}: {images_name} must hold 0 and 1, "
            f"got {images.max()}"
        )
    if ((classes < 0) | (classes >= np.array(SIZES))).any():
        raise DataError(
            f"data file has another layout: {path}: {classes_name} must lie below {list(SIZES)}"
        )
    return DSprites(images, classes, str(path))
