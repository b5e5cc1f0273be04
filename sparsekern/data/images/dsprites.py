"""dSprites: 737,280 binary images of one sprite, each combination of six factors once.

Two sources with one result, a :class:`DSprites`:

* :func:`load` reads the published file (``.npz`` or its HDF5 twin) of
  https://github.com/google-deepmind/dsprites-dataset;
* :func:`rendered` draws a *dSprites-compatible, calibrated* set without any file. A pixel is on
  when its centre lies inside the sprite. The outlines are fitted to frames of the published
  animation: 80 % of its 320 frames come out bit for bit, the rest differ by 2 pixels on average.
  It is not the published data set, and results on it should say so. :func:`write` makes a file
  of it in the published layout.

The order of the images is that of the published file: ``index = sum(class * BASES)``, so the last
factor (posY) changes fastest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from . import writing as image_writing
from .factor_images import FactorImages
from .factors import Factors
from .files import HDF5, NPZ, Fields

FACTORS = ("color", "shape", "scale", "orientation", "posX", "posY")
SIZES = (1, 3, 6, 40, 32, 32)
BASES = (737280, 245760, 40960, 1024, 32, 1)
COUNT = 737280
SIDE = 64
SHAPES = ("square", "ellipse", "heart")
# The values of each factor, by class.
VALUES = (
    np.array([1.0]),
    np.array([1.0, 2.0, 3.0]),
    np.linspace(0.5, 1.0, SIZES[2]),
    np.linspace(0.0, 2 * np.pi, SIZES[3]),
    np.linspace(0.0, 1.0, SIZES[4]),
    np.linspace(0.0, 1.0, SIZES[5]),
)

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
# Images drawn at a time: what they need fits a CPU's cache, or fills a GPU.
CPU_BLOCK, GPU_BLOCK = 256, 16384

Array = TypeVar("Array", np.ndarray, Tensor)


class DSprites(FactorImages):
    """Images with their factors.

    Attributes:
        images: uint8 ``[n, 64, 64]``, 0 or 1.
        classes: int64 ``[n, 6]``, one column per name in :data:`FACTORS`.
        source: where the images come from, for reports.
    """

    title = "dSprites"
    factors = Factors(FACTORS, VALUES)
    image_shape = (SIDE, SIDE)
    largest = 1
    fields = {  # noqa: RUF012  # of the base, where it is a ClassVar
        NPZ: Fields("imgs", "latents_classes", "latents_values"),
        HDF5: Fields("imgs", "latents/classes", "latents/values"),
    }
    metadata = {  # noqa: RUF012
        "title": "dSprites-compatible images, rendered and calibrated",
        "description": (
            "Not the published dSprites: images with its factors, order and layout, rendered by "
            "sparsekern, whose outlines are fitted to frames of the published animation."
        ),
        "author": "sparsekern",
        "version": 1,
        "latents_names": FACTORS,
        "latents_sizes": np.array(SIZES),
        "latents_possible_values": dict(zip(FACTORS, VALUES, strict=True)),
    }

    @staticmethod
    def draw(classes: Tensor) -> Tensor:
        """Draw uint8 ``[n, 64, 64]`` of valid classes int64 ``[n, 6]``, on their device."""
        images = torch.zeros(len(classes) * SIDE * SIDE, dtype=torch.uint8, device=classes.device)
        size = CPU_BLOCK if classes.device.type == "cpu" else GPU_BLOCK
        for shape, inside in enumerate((_in_square, _in_ellipse, _in_heart)):
            for rows in (classes[:, 1] == shape).nonzero()[:, 0].split(size):
                _draw_block(images, rows, classes[rows], inside)
        return images.view(-1, SIDE, SIDE)


def classes_of(indices: np.ndarray) -> np.ndarray:
    """Convert image numbers ``[...]`` in 0..737279 to factor classes int64 ``[..., 6]``."""
    return DSprites.factors.classes_of(indices)


def index_of(classes: np.ndarray) -> np.ndarray:
    """Convert factor classes ``[..., 6]`` to image numbers int64 ``[...]``."""
    return DSprites.factors.index_of(classes)


def values_of(classes: np.ndarray) -> np.ndarray:
    """Look up the factor values float64 ``[..., 6]`` of classes ``[..., 6]``, as published.

    color 1; shape 1 square, 2 ellipse, 3 heart; scale 0.5..1; orientation 0..2 pi in radians, both
    ends included (classes 0 and 39 look the same); posX and posY 0..1.
    """
    return DSprites.factors.values_of(classes)


def render(classes: Array) -> Array:
    """Draw images uint8 ``[..., 64, 64]``, 0 or 1, of factor classes ``[..., 6]``.

    Args:
        classes: integers, any leading dimensions, in numpy or torch.

    Returns:
        An array for an array, drawn on the CPU; a tensor for a tensor, drawn on its device.

    Raises:
        ValueError: the classes are not integers ``[..., 6]``, or out of range.
    """
    return DSprites.render(classes)  # type: ignore[return-value]


def _draw_block(
    images: Tensor, rows: Tensor, classes: Tensor, inside: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Draw classes [b, 6] of one shape into the pixels [n * 64 * 64], as images ``rows``."""
    device = classes.device
    scale = torch.from_numpy(VALUES[2]).to(device)[classes[:, 2], None]
    # The angle wraps at 39 steps, so that the first and last class give the very same numbers.
    # It and all below is float64: in float32, pixels on the outline change.
    steps = SIZES[3] - 1
    angles = -2 * np.pi * (np.arange(SIZES[3]) % steps) / steps
    cos = torch.from_numpy(np.cos(angles)).to(device)[classes[:, 3], None]
    sin = torch.from_numpy(np.sin(angles)).to(device)[classes[:, 3], None]
    window = torch.arange(WINDOW, device=device)
    centre_x, centre_y = 16 + 32 * classes[:, 4:].double().T / (SIZES[4] - 1)
    left, top = centre_x.long() - WINDOW_MARGIN, centre_y.long() - WINDOW_MARGIN
    dx = (left[:, None] + window + 0.5 - centre_x[:, None]) / scale  # [b, window]
    dy = (top[:, None] + window + 0.5 - centre_y[:, None]) / scale
    on = inside(
        (cos * dx)[:, None, :] + (sin * dy)[:, :, None],
        (cos * dy)[:, :, None] - (sin * dx)[:, None, :],
    )
    first = (rows * SIDE + top) * SIDE + left
    pixels = first[:, None] + (window[:, None] * SIDE + window).view(-1)
    images.scatter_(0, pixels.view(-1), on.view(-1).to(torch.uint8))


def _in_square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) <= SQUARE_HALF_SIDE


def _in_ellipse(u: Tensor, v: Tensor) -> Tensor:
    return (u / ELLIPSE_RADII[0]).square_() + (v / ELLIPSE_RADII[1]).square_() <= 1


def _in_heart(u: Tensor, v: Tensor) -> Tensor:
    square = u * u + v * v
    # Only the ring between the smallest and the largest radius needs the angle.
    inside = square <= min(HEART_RADII) ** 2
    ring = (~inside & (square <= max(HEART_RADII) ** 2)).view(-1).nonzero()[:, 0]
    angle = torch.atan2(u.reshape(-1)[ring].abs_(), v.reshape(-1)[ring].neg_())
    position = angle * (180 / math.pi / HEART_STEP_DEGREES)
    # The last knot is at 180 degrees itself: it needs a neighbour, which gets no weight.
    knots = torch.tensor((*HEART_RADII, HEART_RADII[-1]), dtype=u.dtype, device=u.device)
    knot = position.long()
    radius = torch.lerp(knots[knot], knots[knot + 1], position - knot)
    inside.view(-1)[ring] = square.view(-1)[ring] <= radius.square_()
    return inside


def rendered(count: int | None = None, *, seed: int = 0) -> DSprites:
    """Render a random subset of the dSprites-compatible set, or all of it in its own order.

    Args:
        count: number of images, 1..737280; ``None`` for all, in the published order (3 GB).
        seed: chooses the subset. The subset of n images is the front of that of n + 1.

    Raises:
        CountError: count is out of range.
    """
    return DSprites.rendered(count, seed)


def load(path: str | Path, count: int | None = None, *, seed: int = 0) -> DSprites:
    """Read the published dSprites file, ``.npz`` or HDF5, told apart by content.

    The file is streamed, so memory is needed for the result only.

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
    return DSprites.load(path, count, seed)


def write(
    path: str | Path,
    count: int | None = None,
    *,
    seed: int = 0,
    chunk_rows: int = image_writing.CHUNK_ROWS,
) -> int:
    """Write the images of :func:`rendered` to a new file in the published layout.

    The fields are those of the published file, ``imgs`` uint8 ``[n, 64, 64]``, ``latents_values``
    float64 ``[n, 6]``, ``latents_classes`` int64 ``[n, 6]`` and ``metadata`` (which says that the
    images are rendered), or in HDF5 ``imgs``, ``latents/values`` and ``latents/classes``. Killed at
    any moment, the same call goes on; see :mod:`sparsekern.data.images.writing`.

    Args:
        path: the file, ``.npz``, ``.h5`` or ``.hdf5``; it must not exist.
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
    return image_writing.write(DSprites, path, count, seed=seed, chunk_rows=chunk_rows)
