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
from torch import Tensor, nn

from .contents import Checkpoint, check_defaults, check_tensors, finite, refuse
from .torch_files import is_torch_file, open_torch_file, write_torch_file

NAME = "openai"
TENSORS = "autoencoder.pt"
_NAMES = {
    "encoder": "encoder.weight", "encoder_bias": "latent_bias",
    "dictionary": "decoder.weight", "decoder_bias": "pre_bias",
}  # fmt: skip
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
    for name, value in content.items():
        if not isinstance(value, Tensor):
            refuse(path, name, value, "must be a tensor")
    weight = content.get("encoder.weight")
    if weight is None:
        raise ValueError(f"{path}: encoder.weight is missing")
    if weight.dim() != 2:
        refuse(path, "encoder.weight", list(weight.shape), "must have two dimensions")
    n, d = weight.shape
    shapes = {
        "encoder.weight": (n, d), "latent_bias": (n,), "decoder.weight": (d, n), "pre_bias": (d,),
    }  # fmt: skip
    check_tensors(path, content, shapes, _STATISTICS)
    state = {}
    for key, name in _NAMES.items():
        tensor = finite(path, content, name)
        # Into memory, since the file is only mapped.
        state[key] = (tensor.t() if key == "dictionary" else tensor).clone(
            memory_format=torch.contiguous_format
        )
    return Checkpoint(nn.ReLU(), state)


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the file, with statistics of latents that no batch has reached yet.

    Raises:
        ValueError: an activation other than ReLU, or options that the format lacks.
    """
    layer, n = checkpoint.activation, checkpoint.latents
    if not isinstance(layer, nn.ReLU):
        raise ValueError(
            f"{NAME}: activation must be ReLU, since the library normalizes activations for TopK, "
            f"got {layer}"
        )
    check_defaults(checkpoint, NAME, {"scale_scores": False, "subtract_bias": True})
    content = {
        "pre_bias": checkpoint.tensors["decoder_bias"],
        "latent_bias": checkpoint.tensors["encoder_bias"],
        "stats_last_nonzero": torch.zeros(n, dtype=torch.int64),
        "latents_activation_frequency": torch.ones(n),
        "latents_mean_square": torch.zeros(n),
        "encoder.weight": checkpoint.encoder,
        "decoder.weight": checkpoint.tensors["dictionary"].t(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_torch_file(folder / TENSORS, content, {"activation": "ReLU", "activation_state_dict": {}})
