"""Reconstructions and latent traversals of a trained cell, from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....data.images.factors import subset
from ....models.vae_sae import VAESAE
from ....training.checkpoints import CheckpointError, load_model, read_checkpoint
from ...figures import as_png
from ..config import VAESAEConfig
from ..images import SETS as IMAGE_SETS
from ..images import pixels, planes, read
from ..task import CheckpointedModel, make_model
from .figures import new_figure
from .names import SETS

SHOWN = 6
LATENTS = 5
STEPS = 7
MEASURED = 128
"""Test images from which the latents' KL is estimated."""


@dataclass(frozen=True)
class ModelPictures:
    """What a model makes of test images; pixels in 0..1."""

    images: Tensor
    """[n, C, side, side]."""
    reconstructions: Tensor
    """[n, C, side, side]."""
    latents: list[int]
    """Those with the largest mean KL, largest first."""
    divergences: list[float]
    """Their KL in nats per image."""
    traversals: Tensor
    """[latents, steps, C, side, side]: one latent at a time from -2 to 2."""


def test_images(config: VAESAEConfig, count: int) -> Tensor:
    """Make the first test images of a run, uint8 [count, C, side, side]: those of images.read."""
    if config.data is not None:
        return read(config, torch.device("cpu")).test.images[:count]
    # Those before them, up to 700,000, need not be rendered.
    images = IMAGE_SETS[config.dataset]
    start = config.images + config.eval_images
    chosen = subset("test_images", images.factors.count, start + count, config.seed)
    classes = images.factors.classes_of(np.asarray(chosen)[start:])
    return planes(np.asarray(images.render(classes)), config.side, torch.device("cpu"))


@torch.no_grad()
def picture_model(model: VAESAE, images: Tensor) -> ModelPictures:
    """Reconstruct the first images, and traverse the latents from the first one's code.

    Args:
        model: in evaluation mode.
        images: uint8 [n, C, side, side].
    """
    output = model(pixels(images), sample=False)
    mean, log_variance = output.mean, output.log_variance
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(0)
    latents = kl.argsort(descending=True)[:LATENTS].tolist()
    rows = []
    for latent in latents:
        codes = mean[:1].repeat(STEPS, 1)
        codes[:, latent] = torch.linspace(-2, 2, STEPS)
        rows.append(model.decode(codes).sigmoid())
    return ModelPictures(
        pixels(images[:SHOWN]),
        output.logits[:SHOWN].sigmoid(),
        latents,
        kl[latents].tolist(),
        torch.stack(rows),
    )


def picture_run(content: Mapping[str, Any], folder: Path) -> ModelPictures:
    """Load the model in a run folder and look at its test images, on the CPU.

    Args:
        content: config and results of the cell.
        folder: of the run.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged, or of another model.
        sparsekern.data.DataError: the images cannot.
    """
    config = VAESAEConfig(**content["config"])
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise CheckpointError(f"no checkpoint in {folder}")
    images = test_images(config, min(MEASURED, config.test_images))
    trained = CheckpointedModel(make_model(config, images.shape[1], 0.5), config)
    load_model(folder, trained, checkpoint.tensors)
    model = trained.vae.eval()
    model.k = content["results"]["k"]
    return picture_model(model, images)


def _draw_picture(panel: Any, picture: Tensor) -> None:
    """Draw a picture [C, side, side]."""
    shown = picture.permute(1, 2, 0).numpy()
    panel.imshow(shown.squeeze(-1) if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=1)
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)


def reconstructions(seen: ModelPictures, dataset: str) -> bytes:
    """Draw images above what the model makes of them."""
    count = len(seen.images)
    figure, panels = new_figure(2.7, 2, count)
    for row, (label, pictures) in enumerate(
        (("test image", seen.images), ("output", seen.reconstructions))
    ):
        for panel, picture in zip(panels[row], pictures, strict=True):
            _draw_picture(panel, picture)
        panels[row, 0].set_ylabel(label, fontsize=8)
    figure.suptitle(SETS[dataset], fontsize=10)
    return as_png(figure)


def traversals(seen: ModelPictures, dataset: str) -> bytes:
    """Draw one row a latent, its value from -2 to 2."""
    rows, steps = seen.traversals.shape[:2]
    figure, panels = new_figure(0.5 + 0.9 * rows, rows, steps)
    for row, (latent, divergence) in enumerate(zip(seen.latents, seen.divergences, strict=True)):
        for panel, picture in zip(panels[row], seen.traversals[row], strict=True):
            _draw_picture(panel, picture)
        panels[row, 0].set_ylabel(f"z{latent}\nKL {divergence:.2f}", fontsize=8)
    for panel, value in zip(panels[-1], np.linspace(-2, 2, steps), strict=True):
        panel.set_xlabel(f"{value:.1f}", fontsize=8)
    figure.suptitle(SETS[dataset], fontsize=10)
    return as_png(figure)
