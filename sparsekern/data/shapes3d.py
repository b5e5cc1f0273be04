"""Shapes3D: 480,000 colour images of an object in a room, each combination of six factors once.

Two sources with one result, a :class:`Shapes3D`:

* :func:`load` reads the published HDF5 file of https://github.com/google-deepmind/3d-shapes;
* :func:`rendered` draws a *Shapes3D-compatible, calibrated* set without any file. The scene in
  ``shapes3d_scene.py`` is fitted to 25 frames of the published animation, whose channels it
  misses by 4.6 of 255 on average; 3.1 when each frame may be moved by about half a pixel, by
  which their cropping displaced them. It has no textures, and the frames do not tell which end
  of the orientations is -30 degrees. It is not the published data set, and results on it should
  say so.

The order of the images is that of the published file: ``index = sum(class * BASES)``, so the last
factor (orientation) changes fastest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import factors, shapes3d_scene
from .factors import DataError, checked_classes, gather, subset
from .shapes3d_scene import FLOOR, OBJECT, SIDE, SKY, WALL

FACTORS = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
SIZES = (10, 10, 10, 8, 4, 15)
BASES = (48000, 4800, 480, 60, 15, 1)
COUNT = 480000
SHAPES = ("cube", "cylinder", "sphere", "capsule")
# The labels of each factor, by class.
VALUES = (
    np.arange(10) / 10,
    np.arange(10) / 10,
    np.arange(10) / 10,
    np.linspace(0.75, 1.25, 8),
    np.arange(4.0),
    np.linspace(-30.0, 30.0, 15),
)

SKY_COLOUR = (153, 226, 249)
SAMPLES = 3  # rays per pixel are its square
READ_BLOCK = 2048  # 25 MB of images
LABEL_TOLERANCE = 1e-5  # labels may have passed through float32


@dataclass(frozen=True)
class Shapes3D:
    """Images with their factors.

    Attributes:
        images: uint8 ``[n, 64, 64, 3]``, red, green, blue.
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


def classes_of(indices: np.ndarray) -> np.ndarray:
    """Factor classes int64 ``[n, 6]`` of image numbers ``[n]`` in 0..479999."""
    return factors.classes_of(indices, SIZES)


def index_of(classes: np.ndarray) -> np.ndarray:
    """Image numbers int64 ``[n]`` of factor classes ``[n, 6]``."""
    return checked_classes("index_of", classes, SIZES) @ np.array(BASES)


def values_of(classes: np.ndarray) -> np.ndarray:
    """Factor values float64 ``[n, 6]`` of factor classes ``[n, 6]``, as in the published file.

    Hues 0, 0.1, ..., 0.9; scale 0.75..1.25; shape 0 cube, 1 cylinder, 2 sphere, 3 capsule;
    orientation -30..30 degrees.
    """
    classes = checked_classes("values_of", classes, SIZES)
    return np.stack([table[classes[:, i]] for i, table in enumerate(VALUES)], axis=1)


def render(classes: np.ndarray) -> np.ndarray:
    """Draws images uint8 ``[n, 64, 64, 3]`` of factor classes ``[n, 6]``.

    What depends on scale, shape and orientation alone is traced once per process (about 10 ms
    and 0.13 MB for each of their 480 combinations, 63 MB for all) and kept.
    """
    classes = checked_classes("render", classes, SIZES)
    images = np.empty((len(classes), SIDE, SIDE, 3), np.uint8)
    geometry = classes[:, 3:] @ np.array(BASES[3:])
    order = np.argsort(geometry, kind="stable")
    starts = np.flatnonzero(np.diff(geometry[order], prepend=-1))
    for rows in np.split(order, starts[1:]) if len(order) else ():
        _render_same_geometry(images, rows, classes[rows])
    return images


def _render_same_geometry(images: np.ndarray, rows: np.ndarray, classes: np.ndarray) -> None:
    """Draws classes [b, 6] that differ only in hues into images[rows]."""
    share, factor, white = _layers(*classes[0, 3:].tolist())
    # 0.5 for rounding, since the sum is truncated to uint8.
    sky = share[SKY] * np.array(SKY_COLOUR, np.float32) + np.float32(0.5)
    spans, layers = [], []
    for column, region in enumerate((FLOOR, WALL, OBJECT)):
        seen = np.flatnonzero(share[region])
        span = slice(seen[0], seen[-1] + 1)
        spans.append(span)
        layers.append(
            {
                hue: share[region, span]
                * np.minimum(_colours()[hue] * factor[region, span] + white[region, span], 255)
                for hue in np.unique(classes[:, column]).tolist()
            }
        )
    total = np.empty_like(sky)
    for row, hues in zip(rows.tolist(), classes[:, :3].tolist(), strict=True):
        total[:] = sky
        for span, layer, hue in zip(spans, layers, hues, strict=True):
            total[span] += layer[hue]
        images[row] = total.reshape(SIDE, SIDE, 3)


@functools.cache
def _colours() -> np.ndarray:
    """float32 [10, 3] in 0..255: full saturation and brightness at each hue."""
    distance = np.abs((VALUES[0][:, None] * 6 - np.array([3, 2, 4]) + 3) % 6 - 3)
    rising = np.array([-1, 1, 1])
    return np.clip(rising * (2 - distance) + np.array([1, 0, 0]), 0, 1).astype(np.float32) * 255


@functools.cache
def _layers(scale: int, shape: int, orientation: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How the regions sky, floor, wall and object make up the 4096 pixels.

    Returns:
        share of the pixel, factor of the region's colour, white added: float32 ``[4, 4096, 1]``.
    """
    traced = shapes3d_scene.trace(VALUES[5][orientation], shape, VALUES[3][scale], SAMPLES)
    share = np.zeros((4, SIDE * SIDE, 1), np.float32)
    factor, white = np.zeros_like(share), np.zeros_like(share)
    for region in (SKY, FLOOR, WALL, OBJECT):
        inside = traced.region == region
        count = np.maximum(inside.sum(1), 1)
        share[region, :, 0] = inside.mean(1)
        factor[region, :, 0] = (traced.factor * inside).sum(1) / count
        white[region, :, 0] = 255 * (traced.white * inside).sum(1) / count
    return share, factor, white


def rendered(count: int | None = None, *, seed: int = 0) -> Shapes3D:
    """Renders a random subset of the Shapes3D-compatible set, or all of it in its own order.

    Args:
        count: number of images, 1..480000; ``None`` for all, in the published order (5.9 GB).
        seed: chooses the subset. The subset of n images is the front of that of n + 1.

    Raises:
        CountError: count is out of range.
    """
    indices = subset("rendered", COUNT, count, seed)
    classes = classes_of(np.arange(COUNT) if indices is None else indices)
    return Shapes3D(render(classes), classes, "rendered Shapes3D-compatible images (calibrated)")


def load(path: str | Path, count: int | None = None, *, seed: int = 0) -> Shapes3D:
    """Reads the published HDF5 file, 3dshapes.h5.

    The file is streamed, so a subset needs memory only for itself.

    Args:
        path: the file. Needed fields: ``images`` uint8 ``[n, 64, 64, 3]``, ``labels`` floats
            ``[n, 6]`` with the values of :func:`values_of`.
        count: size of a random subset; ``None`` for the whole file in its own order (5.9 GB).
        seed: chooses the subset, the same one as :func:`rendered` when the file is complete.

    Raises:
        DataError: the file is missing, truncated or damaged, or laid out otherwise.
        CountError: count is out of range; a DataError, too.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data file not found: {path}")
    with open(path, "rb") as stream:
        if stream.read(8) != b"\x89HDF\r\n\x1a\n":
            raise DataError(f"data file has another layout: {path} is not HDF5")
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return _read(path, file, count, seed)
    except KeyError as error:
        raise DataError(f"data file has another layout: {path} has no field {error}") from error
    except OSError as error:
        raise DataError(f"data file is truncated or damaged: {path} ({error})") from error


def _read(path: Path, file, count: int | None, seed: int) -> Shapes3D:
    for name in ("images", "labels"):
        if name not in file or not hasattr(file[name], "dtype"):
            raise KeyError(name)
    images, labels = file["images"], file["labels"]
    if images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
        raise DataError(
            f"data file has another layout: {path}: images must be uint8 "
            f"[n, {SIDE}, {SIDE}, 3], got {images.dtype} {list(images.shape)}"
        )
    n = len(images)
    if labels.shape != (n, len(SIZES)) or labels.dtype.kind != "f":
        raise DataError(
            f"data file has another layout: {path}: labels must be floats "
            f"[{n}, {len(SIZES)}], got {labels.dtype} {list(labels.shape)}"
        )
    wanted = subset(f"data file {path}", n, count, seed)
    values = gather(_blocks(labels), wanted, labels.shape[1:], labels.dtype)
    classes = _classes_of_values(path, values)
    return Shapes3D(
        gather(_blocks(images), wanted, images.shape[1:], images.dtype), classes, str(path)
    )


def _blocks(field) -> Iterator[np.ndarray]:
    for start in range(0, len(field), READ_BLOCK):
        yield field[start : start + READ_BLOCK]


def _classes_of_values(path: Path, values: np.ndarray) -> np.ndarray:
    classes = np.empty(values.shape, np.int64)
    for i, (name, table) in enumerate(zip(FACTORS, VALUES, strict=True)):
        step = table[1] - table[0]
        nearest = np.nan_to_num(np.rint((values[:, i] - table[0]) / step))
        classes[:, i] = np.clip(nearest, 0, SIZES[i] - 1)
        wrong = ~(np.abs(values[:, i] - table[classes[:, i]]) <= LABEL_TOLERANCE)
        if wrong.any():
            raise DataError(
                f"data file has another layout: {path}: labels of {name} must lie on "
                f"{table[0]:g}, {table[1]:g}, ..., {table[-1]:g}, got {values[wrong, i][0]:g}"
            )
    return classes
