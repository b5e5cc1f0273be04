"""OpenAI's sparse_autoencoder (2024): one torch file, a state_dict with the activation's name.

    codes          = relu((x - pre_bias) @ encoder.weight.T + latent_bias)
    reconstruction = codes @ decoder.weight.T + pre_bias

``encoder.weight`` [N, D] is laid out as ours is; ``decoder.weight`` [D, N] is the transpose of our
dictionary, which reading and writing copy once, so that no step does. Statistics of the latents
(``stats_last_nonzero``, ``latents_activation_frequency``, ``latents_mean_square``) do not change
the result and are left out.

``activation`` is ``ReLU``: the library normalizes the activations of each row for ``TopK`` (their
mean and standard deviation), which our model does not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .contents import (
    Checkpoint,
    WriteFile,
    check_flags,
    check_tensors,
    matrix_shape,
    read_weights,
    refuse,
    weight_shapes,
)
from .torch_files import is_torch_file, open_torch_file, tensors_of, torch_file

NAME = "openai"
TENSORS = "autoencoder.pt"
_NAMES = {
    "encoder": "encoder.weight", "encoder_bias": "latent_bias",
    "dictionary": "decoder.weight", "decoder_bias": "pre_bias",
}  # fmt: skip
_TRANSPOSED = ("decoder.weight",)
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def recognises(path: Path) -> bool:
    """Tell whether this is a torch file, or a folder with one of our name for it."""
    return is_torch_file(path) or (path / TENSORS).exists()


def read(path: Path) -> Checkpoint:
    """Read the file, or that of the folder."""
    path = path / TENSORS if path.is_dir() else path
    content = open_torch_file(path)
    kind = content.pop("activation", "ReLU")
    if kind != "ReLU":
        rule = "must be 'ReLU', since the library normalizes activations for 'TopK'"
        refuse(path, "activation", kind, rule)
    settings = content.pop("activation_state_dict", {})
    if settings != {}:
        refuse(path, "activation_state_dict", settings, "must be empty for ReLU")
    tensors = tensors_of(path, content)
    n, d = matrix_shape(path, tensors, "encoder.weight")
    check_tensors(path, tensors, weight_shapes(_NAMES, n, d, _TRANSPOSED), _STATISTICS)
    return Checkpoint(nn.ReLU(), read_weights(path, tensors, _NAMES, _TRANSPOSED))


def files(checkpoint: Checkpoint) -> dict[str, WriteFile]:
    """Make the file, with statistics of latents that no batch has reached yet.

    Raises:
        ValueError: an activation other than ReLU, or options that the format lacks.
    """
    layer, n = checkpoint.activation, checkpoint.latents
    if not isinstance(layer, nn.ReLU):
        raise ValueError(
            f"{NAME}: activation must be ReLU, since the library normalizes activations for TopK, "
            f"got {layer}"
        )
    check_flags(checkpoint, NAME, {"scale_scores": False, "subtract_bias": True})
    content = {
        "pre_bias": checkpoint.tensors["decoder_bias"],
        "latent_bias": checkpoint.tensors["encoder_bias"],
        "stats_last_nonzero": torch.zeros(n, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(n),
        "latents_mean_square": torch.zeros(n),
        "encoder.weight": checkpoint.encoder,
        "decoder.weight": checkpoint.tensors["dictionary"].t(),
    }
    return {TENSORS: torch_file(content, {"activation": "ReLU", "activation_state_dict": {}})}
