"""The study's images: both data sets as uint8 [n, C, side, side] in 0..255."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...data import CountError, DSprites, Shapes3D
from ...data.images.factor_images import FactorImages
from .config import VAESAEConfig

SETS: dict[str, type[FactorImages]] = {"dsprites": DSprites, "shapes3d": Shapes3D}


@dataclass(frozen=True)
class Part:
    """Images with the classes of their factors."""

    images: Tensor
    """uint8 [n, C, side, side], 0..255."""
    classes: Tensor
    """int64 [n, factors]; on the CPU."""


@dataclass(frozen=True)
class Parts:
    """The disjoint parts of a run."""

    training: Part
    held_out: Part
    test: Part
    source: str
    """Where the images come from, for reports."""
    digest: str
    """Of all images."""


def check_file(config: VAESAEConfig) -> None:
    """Check that the data file of a run can be one.

    Raises:
        DataError: it is missing, damaged, laid out otherwise, or has too few images.
    """
    if config.data is not None:
        SETS[config.dataset].check(config.data, _part_sizes(config).total())


def _part_sizes(config: VAESAEConfig) -> Counter[str]:
    """Count the images of each part of a run."""
    names = ("images", "eval_images", "test_images")
    return Counter({name: getattr(config, name) for name in names})


def read(config: VAESAEConfig, device: torch.device) -> Parts:
    """Read the images of a run: a random subset, in a random order, that follows from the seed.

    Raises:
        CountError: the set has fewer images than the parts of the run need together.
        DataError: see sparsekern.data.
    """
    images = SETS[config.dataset]
    sizes = _part_sizes(config)
    total = sizes.total()
    try:
        if config.data is None:
            data = images.rendered(total, config.seed)
        else:
            data = images.load(config.data, total, config.seed)
    except CountError as error:
        flags = (f"--{name.replace('_', '-')} {size}" for name, size in sizes.items())
        raise CountError(f"{error} ({' + '.join(flags)})") from error
    digest = hashlib.sha256(np.ascontiguousarray(data.images).data).hexdigest()[:16]
    training, held_out, test = (
        _make_part(part, config.side, device) for part in data.split(*sizes.values())
    )
    return Parts(training, held_out, test, data.source, digest)


def _make_part(data: FactorImages, side: int, device: torch.device) -> Part:
    """Convert a part of a set."""
    return Part(planes(data.images, side, device), torch.from_numpy(data.classes))


def planes(images: np.ndarray, side: int, device: torch.device) -> Tensor:
    """Convert a set's images to uint8 [n, C, side, side] in 0..255.

    They are [n, 64, 64] of 0 and 1 or [n, 64, 64, 3] of 0..255.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    if tensor.dim() == 3:
        tensor = tensor.unsqueeze(1) * 255
    else:
        tensor = tensor.permute(0, 3, 1, 2).contiguous()
    return shrunk(tensor, side)


def shrunk(images: Tensor, side: int) -> Tensor:
    """Shrink uint8 [n, C, 64, 64] -> [n, C, side, side]: means of squares, rounded half up."""
    factor = images.shape[-1] // side
    if factor == 1:
        return images
    n, channels = images.shape[:2]
    squares = images.view(n, channels, side, factor, side, factor)
    sums = squares.sum((3, 5), dtype=torch.int32)
    return ((sums + factor**2 // 2) // factor**2).to(torch.uint8)


def mean_pixel(images: Tensor) -> float:
    """Compute the mean of uint8 0..255 as a share of 255, without a copy in another type."""
    return int(images.sum(dtype=torch.int64)) / (255 * images.numel())


def pixels(images: Tensor) -> Tensor:
    """Convert uint8 0..255 to float32 0..1."""
    return images.float() / 255
