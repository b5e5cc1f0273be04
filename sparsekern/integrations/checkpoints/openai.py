"""OpenAI's sparse_autoencoder (2024): one torch file, a state_dict with the activation's name.

    codes          = relu((x - pre_bias) @ encoder.weight.T + latent_bias)
    reconstruction = codes @ decoder.weight.T + pre_bias

``encoder.weight`` [N, D] is laid out as ours is; ``decoder.weight`` [D, N] is the transpose of our
dictionary, which reading and writing copy once, so that no step does. Statistics of the latents
(``stats_last_nonzero``, ``latents_activation_frequency``, ``latents_mean_square``) do not change
the result and are left out.

``activation`` is ``ReLU``, or ``TopK``, which ranks before ReLU and has its k in
``activation_state_dict``. With ``TopK`` the library normalizes rows x, and gives reconstructions
their scale and mean back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...nn import TopK
from .configs import refuse
from .contents import Checkpoint, WriteFile, check_flags
from .torch_files import is_torch_file, open_torch_file, tensors_of, torch_file
from .weights import check_tensors, matrix_shape, read_weights, weight_shapes

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
    settings = content.pop("activation_state_dict", {})
    if kind not in ("ReLU", "TopK"):
        refuse(path, "activation", kind, "must be 'ReLU' or 'TopK'")
    if kind == "ReLU" and settings != {}:
        refuse(path, "activation_state_dict", settings, "must be empty for ReLU")
    for key in ("k", "postact_fn"):  # of the layer within the model, again
        if kind == "TopK" and isinstance(settings, dict) and key in settings:
            value = content.pop(f"activation.{key}", settings[key])
            if value != settings[key]:
                refuse(path, f"activation.{key}", value, f"must be {settings[key]!r}")
    tensors = tensors_of(path, content)
    n, d = matrix_shape(path, tensors, "encoder.weight")
    check_tensors(path, tensors, weight_shapes(_NAMES, n, d, _TRANSPOSED), _STATISTICS)
    layer = nn.ReLU() if kind == "ReLU" else _topk(path, settings, n)
    state = read_weights(path, tensors, _NAMES, _TRANSPOSED)
    return Checkpoint(layer, state, {"normalize_rows": kind == "TopK"})


def _topk(path: Path, settings: Any, n: int) -> TopK:
    """Make the layer from its state_dict in the file."""
    where = "activation_state_dict"
    if not isinstance(settings, dict) or settings.keys() != {"k", "postact_fn"}:
        refuse(path, where, settings, "must hold k and postact_fn for TopK")
    if settings["postact_fn"] != "ReLU":
        refuse(path, f"{where}.postact_fn", settings["postact_fn"], "must be 'ReLU'")
    k = settings["k"]
    if type(k) is not int or not 1 <= k <= n:
        refuse(path, f"{where}.k", k, f"must be an integer in 1..{n}")
    return TopK(k)


def files(checkpoint: Checkpoint) -> dict[str, WriteFile]:
    """Make the file, with statistics of latents that no batch has reached yet.

    Raises:
        ValueError: an activation other than ReLU and TopK, TopK in groups or without normalized
            rows, ReLU with them, or options that the format lacks.
    """
    layer, n = checkpoint.activation, checkpoint.latents
    settings: dict[str, Any] = {}
    if isinstance(layer, TopK) and layer.groups == 1:
        settings = {"k": layer.k, "postact_fn": "ReLU"}
    elif not isinstance(layer, nn.ReLU):
        raise ValueError(f"{NAME}: activation must be ReLU, or TopK without groups, got {layer}")
    normalized = checkpoint.options.get("normalize_rows", False)
    if normalized != isinstance(layer, TopK):
        raise ValueError(
            f"{NAME}: normalize_rows must be {not normalized} with {type(layer).__name__}, as in "
            "the library"
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
    others = {"activation": type(layer).__name__, "activation_state_dict": settings}
    return {TENSORS: torch_file(content, others)}
