"""Shapes3D: 480,000 colour images of an object in a room, each combination of six factors once.

Two sources with one result, a :class:`Shapes3D`:

* :func:`load` reads the published HDF5 file of https://github.com/google-deepmind/3d-shapes;
* :func:`rendered` draws a *Shapes3D-compatible, calibrated* set without any file. The scene in
  ``shapes3d_scene.py`` is fitted to 25 frames of the published animation, whose channels it
  misses by 4.6 of 255 on average; 3.1 when each frame may be moved by about half a pixel, by
  which their cropping displaced them. It has no textures, and the frames do not tell which end
  of the orientations is -30 degrees. It is not the published data set, and results on it should
  say so. :func:`write` makes a file of it in the published layout.

The order of the images is that of the published file: ``index = sum(class * BASES)``, so the last
factor (orientation) changes fastest.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import shapes3d_scene
from . import writing as image_writing
from .factor_images import FactorImages
from .factors import Factors
from .files import HDF5, Fields
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

# A channel of a fully saturated hue that is a multiple of 0.1 has one of these levels.
LEVELS = 51.0 * np.arange(6)
# Rows of the table for each combination of scale, shape and orientation: what the sky adds to the
# three channels, what floor and wall add at each level but 0, where they add nothing, and what the
# object adds at each level.
FIRST_ROWS = {SKY: 0, FLOOR: 3 - 1, WALL: 3 + 5 - 1, OBJECT: 3 + 5 + 5}  # of level 0
TABLE_ROWS = 3 + 5 + 5 + 6
# Images drawn at a time: what they need fits a CPU's cache, or fills a GPU.
CPU_BLOCK, GPU_BLOCK = 64, 4096

Array = TypeVar("Array", np.ndarray, Tensor)


class Shapes3D(FactorImages):
    """Images with their factors.

    Attributes:
        images: uint8 ``[n, 64, 64, 3]``, red, green, blue.
        classes: int64 ``[n, 6]``, one column per name in :data:`FACTORS`.
        source: where the images come from, for reports.
    """

    title = "Shapes3D"
    factors = Factors(FACTORS, VALUES)
    image_shape = (SIDE, SIDE, 3)
    largest = 255
    fields = {HDF5: Fields("images", None, "labels")}  # noqa: RUF012  # a ClassVar in the base
    metadata = {  # noqa: RUF012
        "title": "Shapes3D-compatible images, rendered and calibrated",
        "description": (
            "Not the published Shapes3D: images with its factors, order and layout, rendered by "
            "sparsekern, whose scene is fitted to frames of the published animation."
        ),
        "author": "sparsekern",
        "version": 1,
    }

    @staticmethod
    def draw(classes: Tensor) -> Tensor:
        """Draw uint8 ``[n, 64, 64, 3]`` of valid classes int64 ``[n, 6]``, on their device."""
        device = classes.device
        images = torch.empty(len(classes), SIDE * SIDE, 3, dtype=torch.uint8, device=device)
        geometry = classes[:, 3:] @ torch.tensor(BASES[3:], device=device)
        table = _region_table(str(device))
        table.fill(geometry.unique().tolist())
        # Images of one geometry together: they read the same rows of the table.
        order = geometry.argsort(stable=True)
        for rows in order.split(CPU_BLOCK if device.type == "cpu" else GPU_BLOCK):
            bags = table.bags(geometry[rows], classes[rows, :3])
            channels = F.embedding_bag(bags.view(-1, 4), table.rows, mode="sum")
            channels = channels.to(torch.uint8).view(-1, 3, SIDE * SIDE)
            images.index_copy_(0, rows, torch.stack(channels.unbind(1), -1))
        return images.view(-1, SIDE, SIDE, 3)


def classes_of(indices: np.ndarray) -> np.ndarray:
    """Convert image numbers ``[...]`` in 0..479999 to factor classes int64 ``[..., 6]``."""
    return Shapes3D.factors.classes_of(indices)


def index_of(classes: np.ndarray) -> np.ndarray:
    """Convert factor classes ``[..., 6]`` to image numbers int64 ``[...]``."""
    return Shapes3D.factors.index_of(classes)


def values_of(classes: np.ndarray) -> np.ndarray:
    """Look up the factor values float64 ``[..., 6]`` of classes ``[..., 6]``, as published.

    Hues 0, 0.1, ..., 0.9; scale 0.75..1.25; shape 0 cube, 1 cylinder, 2 sphere, 3 capsule;
    orientation -30..30 degrees.
    """
    return Shapes3D.factors.values_of(classes)


def render(classes: Array) -> Array:
    """Draw images uint8 ``[..., 64, 64, 3]`` of factor classes ``[..., 6]``.

    What depends on scale, shape and orientation alone is traced once per process and device (about
    10 ms and 0.3 MB for each of their 480 combinations, 150 MB for all) and kept.

    Args:
        classes: integers, any leading dimensions, in numpy or torch.

    Returns:
        An array for an array, drawn on the CPU; a tensor for a tensor, drawn on its device.

    Raises:
        ValueError: the classes are not integers ``[..., 6]``, or out of range.
    """
    return Shapes3D.render(classes)  # type: ignore[return-value]


class _RegionTable:
    """What each region adds to the channels of an image: the sum of four rows is a channel.

    ``rows`` is float32 [480 * TABLE_ROWS + 1, 4096], filled where it was needed; the last is zero.
    """

    def __init__(self, device: str) -> None:
        combinations = SIZES[3] * SIZES[4] * SIZES[5]
        self.rows = torch.empty(combinations * TABLE_ROWS + 1, SIDE * SIDE, device=device)
        self.rows[-1] = 0
        self.filled = np.zeros(combinations, bool)
        self.levels = torch.from_numpy(_hue_levels()).to(device)
        regions = [FIRST_ROWS[region] for region in (FLOOR, WALL, OBJECT)]
        self.first_rows = torch.tensor(regions, device=device)[:, None]

    def fill(self, geometries: list[int]) -> None:
        """Trace what is still missing."""
        for geometry in geometries:
            if not self.filled[geometry]:
                scale, shape, orientation = np.unravel_index(geometry, SIZES[3:])
                rows = _traced_rows(int(scale), int(shape), int(orientation))
                first_row = geometry * TABLE_ROWS
                self.rows[first_row : first_row + TABLE_ROWS] = torch.from_numpy(rows)
                self.filled[geometry] = True

    def bags(self, geometry: Tensor, hues: Tensor) -> Tensor:
        """List the table's rows [b, 3, 4] for each channel of geometries [b] with hues [b, 3]."""
        levels = self.levels[hues]  # [b, region, channel]
        first = geometry[:, None, None] * TABLE_ROWS
        regions = first + self.first_rows + levels
        # Floor and wall add nothing at level 0. One row of zeros for all of them stays in a cache.
        regions[:, :2].masked_fill_(levels[:, :2] == 0, len(self.rows) - 1)
        sky = first + torch.arange(3, device=geometry.device)
        return torch.cat([sky, regions], 1).transpose(1, 2).contiguous()


@functools.cache
def _region_table(device: str) -> _RegionTable:
    return _RegionTable(device)


def _hue_levels() -> np.ndarray:
    """Compute the level of each channel at each hue, int64 [10, 3].

    At full saturation and brightness.
    """
    distance = np.abs((VALUES[0][:, None] * 6 - np.array([3, 2, 4]) + 3) % 6 - 3)
    rising = np.array([-1, 1, 1])
    share = np.clip(rising * (2 - distance) + np.array([1, 0, 0]), 0, 1)
    levels: np.ndarray = np.rint(share * (len(LEVELS) - 1))
    return levels.astype(np.int64)


def _traced_rows(scale: int, shape: int, orientation: int) -> np.ndarray:
    """Trace one combination of classes: its rows of the table, float32 [TABLE_ROWS, 4096].

    A region adds the share of the pixel that it takes up, times its colour times the brightness
    there, plus the white there, at most 255.
    """
    traced = shapes3d_scene.trace(VALUES[5][orientation], shape, VALUES[3][scale], SAMPLES)
    rows = []
    for region in (SKY, FLOOR, WALL, OBJECT):
        inside = traced.region == region
        count = np.maximum(inside.sum(1), 1)
        share = inside.mean(1, dtype=np.float32)
        factor = ((traced.factor * inside).sum(1) / count).astype(np.float32)
        white = (255 * (traced.white * inside).sum(1) / count).astype(np.float32)
        if region == SKY:
            # 0.5 for rounding, since the sum is truncated to uint8.
            rows += [share * np.float32(colour) + np.float32(0.5) for colour in SKY_COLOUR]
        else:
            levels = LEVELS if region == OBJECT else LEVELS[1:]
            rows += [
                share * np.minimum(np.float32(level) * factor + white, 255) for level in levels
            ]
    return np.stack(rows)


def rendered(count: int | None = None, *, seed: int = 0) -> Shapes3D:
    """Render a random subset of the Shapes3D-compatible set, or all of it in its own order.

    Args:
        count: number of images, 1..480000; ``None`` for all, in the published order (5.9 GB).
        seed: chooses the subset. The subset of n images is the front of that of n + 1.

    Raises:
        CountError: count is out of range.
    """
    return Shapes3D.rendered(count, seed)


def load(path: str | Path, count: int | None = None, *, seed: int = 0) -> Shapes3D:
    """Read the published HDF5 file, 3dshapes.h5.

    The file is streamed, so memory is needed for the result only.

    Args:
        path: the file. Needed fields: ``images`` uint8 ``[n, 64, 64, 3]``, ``labels`` floats
            ``[n, 6]`` with the values of :func:`values_of`.
        count: size of a random subset; ``None`` for the whole file in its own order (5.9 GB).
        seed: chooses the subset, the same one as :func:`rendered` when the file is complete.

    Raises:
        DataError: the file is missing, truncated or damaged, or laid out otherwise.
        CountError: count is out of range; a DataError, too.
    """
    return Shapes3D.load(path, count, seed)


def write(
    path: str | Path,
    count: int | None = None,
    *,
    seed: int = 0,
    chunk_rows: int = image_writing.CHUNK_ROWS,
) -> int:
    """Write the images of :func:`rendered` to a new file in the published layout.

    The fields are those of the published file: ``images`` uint8 ``[n, 64, 64, 3]`` and ``labels``
    float64 ``[n, 6]``; attributes say that the images are rendered. Killed at any moment, the same
    call goes on; see :mod:`sparsekern.data.images.writing`.

    Args:
        path: the file, ``.h5`` or ``.hdf5``; it must not exist.
        count: as for :func:`rendered`.
        seed: as for :func:`rendered`.
        chunk_rows: images that are drawn at a time and, once on the disk, not drawn again.

    Returns:
        The number of images.

    Raises:
        ValueError: the suffix, chunk_rows or seed are not possible.
        CountError: count is out of range.
        DataError: the file exists, is being written by another process, its folder is missing or
            cannot be written, or a part of it is there that was started otherwise.
        WritingInterrupted: by SIGINT or SIGTERM; what is complete is kept.
    """
    return image_writing.write(Shapes3D, path, count, seed=seed, chunk_rows=chunk_rows)
