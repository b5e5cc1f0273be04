"""The study's images: both data sets as uint8 [n, C, side, side] in 0..255."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data import CountError, dsprites, shapes3d
from .config import VAESAEConfig

MODULES: dict[str, Any] = {"dsprites": dsprites, "shapes3d": shapes3d}


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


def read(config: VAESAEConfig, device: torch.device) -> Parts:
    """The images of a run: a random subset, in a random order, that follows from the seed.

    Raises:
        CountError: the set has fewer images than the parts of the run need together.
        DataError: see sparsekern.data.
    """
    module = MODULES[config.dataset]
    sizes = {name: getattr(config, name) for name in ("images", "eval_images", "test_images")}
    total = sum(sizes.values())
    try:
        if config.data is None:
            data = module.rendered(total, seed=config.seed)
        else:
            data = module.load(config.data, total, seed=config.seed)
    except CountError as error:
        flags = (f"--{name.replace('_', '-')} {size}" for name, size in sizes.items())
        raise CountError(f"{error} ({' + '.join(flags)})") from error
    digest = hashlib.sha256(data.images.tobytes()).hexdigest()[:16]
    training, held_out, test = (
        _part(part, config.side, device) for part in data.split(*sizes.values())
    )
    return Parts(training, held_out, test, data.source, digest)


def _part(data: Any, side: int, device: torch.device) -> Part:
    images = torch.from_numpy(np.ascontiguousarray(data.images)).to(device)
    if images.dim() == 3:
        images = images.unsqueeze(1) * 255
    else:
        images = images.permute(0, 3, 1, 2).contiguous()
    return Part(shrunk(images, side), torch.from_numpy(data.classes))


def shrunk(images: Tensor, side: int) -> Tensor:
    """uint8 [n, C, 64, 64] -> [n, C, side, side]: means of squares of pixels, rounded half up."""
    factor = images.shape[-1] // side
    if factor == 1:
        return images
    n, channels = images.shape[:2]
    squares = images.view(n, channels, side, factor, side, factor)
    sums = squares.sum((3, 5), dtype=torch.int32)
    return ((sums + factor**2 // 2) // factor**2).to(torch.uint8)


def pixels(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 0..1."""
    return images.float() / 255
