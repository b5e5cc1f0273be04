"""SAELens 6: ``cfg.json`` and ``sae_weights.safetensors``.

    scores         = (x - b_dec) @ W_enc + b_enc, or x @ W_enc + b_enc where apply_b_dec_to_input
                     is false
    topk           : the k largest of scores * |W_dec rows|, after ReLU; |W_dec rows| is 1 without
                     rescale_acts_by_decoder_norm, and codes are divided by it before decoding
    jumprelu       : relu(scores) where scores > threshold
    standard       : relu(scores)
    reconstruction = codes @ W_dec + b_dec

``W_enc`` [D, N] is the transpose of our encoder: reading and writing copy that matrix once, so that
no step does. ``W_dec`` [N, D], ``b_enc`` [N], ``b_dec`` [D] and ``threshold`` [N] are as ours. Its
BatchTopK autoencoders are saved as ``jumprelu`` with one threshold, and so are ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._tensor_files import SavedTensors
from ...nn import BatchTopK, JumpReLU, TopK
from .contents import (
    Checkpoint,
    check_config,
    check_options,
    check_tensors,
    count,
    finite,
    jumprelu_with,
    read_config,
    refuse,
    write_config,
    write_file,
)  # fmt: skip

NAME = "saelens"
CONFIG = "cfg.json"
TENSORS = "sae_weights.safetensors"
# Of the format: its reader takes a config without a version for one of before 6.
VERSION = "6.0.0"
# dtype and device say where the library puts tensors, not what the file holds.
_KEYS = (
    "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input",
    "normalize_activations", "reshape_activations", "metadata",
)  # fmt: skip
_TOPK_KEYS = ("k", "rescale_acts_by_decoder_norm")
_SUPPORTED = {"normalize_activations": "none", "reshape_activations": "none"}


def recognises(path: Path) -> bool:
    """Tell whether this is a folder with the file of tensors."""
    return (path / TENSORS).exists()


def read(path: Path) -> Checkpoint:
    """Read the two files of a folder."""
    config_path, tensors_path = path / CONFIG, path / TENSORS
    config = read_config(config_path)
    if "architecture" not in config:
        raise ValueError(f"{config_path}: architecture is missing (SAELens before version 6)")
    kind = config["architecture"]
    if kind not in ("topk", "jumprelu", "standard"):
        refuse(config_path, "architecture", kind, "must be 'topk', 'jumprelu' or 'standard'")
    topk_keys = _TOPK_KEYS if kind == "topk" else ()
    check_config(config_path, config, ("d_in", "d_sae", *topk_keys[:1]), (*_KEYS, *topk_keys))
    check_options(config_path, config, _SUPPORTED)
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        refuse(config_path, "metadata", metadata, "must be an object")
    d, n = count(config_path, config, "d_in"), count(config_path, config, "d_sae")
    shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,)}
    if kind == "jumprelu":
        shapes["threshold"] = (n,)
    tensors = SavedTensors(tensors_path)
    try:
        check_tensors(tensors_path, tensors, shapes)
        layer = _activation(config_path, config, tensors_path, tensors)
        state = {
            "encoder": finite(tensors_path, tensors, "W_enc").t().contiguous(),
            "encoder_bias": finite(tensors_path, tensors, "b_enc"),
            "dictionary": finite(tensors_path, tensors, "W_dec"),
            "decoder_bias": finite(tensors_path, tensors, "b_dec"),
        }
    finally:
        tensors.close()
    options = {"subtract_bias": _flag(config_path, config, "apply_b_dec_to_input", True)}
    if kind == "topk":
        key = "rescale_acts_by_decoder_norm"
        options["scale_scores"] = _flag(config_path, config, key, False)
    return Checkpoint(layer, state, options, metadata)


def _flag(path: Path, config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        refuse(path, key, value, "must be true or false")
    return value


def _activation(
    config_path: Path, config: dict[str, Any], tensors_path: Path, tensors: Any
) -> nn.Module:
    kind = config["architecture"]
    if kind == "jumprelu":
        thresholds = finite(tensors_path, tensors, "threshold")
        return jumprelu_with(thresholds, tensors_path, "threshold")
    if kind == "standard":
        return nn.ReLU()
    k = count(config_path, config, "k")
    if k > config["d_sae"]:
        refuse(config_path, "k", k, f"must be at most d_sae, {config['d_sae']}")
    return TopK(k)


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the two files; BatchTopK becomes ``jumprelu`` with its threshold for all latents.

    Raises:
        ValueError: TopK in groups, scaled scores with an activation other than TopK, or BatchTopK
            whose threshold was never set.
    """
    layer, scaled = checkpoint.activation, bool(checkpoint.options.get("scale_scores"))
    encoder = checkpoint.encoder
    tensors = {
        "W_enc": encoder.t(),
        "b_enc": checkpoint.tensors["encoder_bias"],
        "W_dec": checkpoint.tensors["dictionary"],
        "b_dec": checkpoint.tensors["decoder_bias"],
    }
    config: dict[str, Any] = {
        "d_in": checkpoint.features,
        "d_sae": checkpoint.latents,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": bool(checkpoint.options.get("subtract_bias", True)),
        **_SUPPORTED,
        "metadata": {"sae_lens_version": VERSION, **checkpoint.metadata},
    }
    if isinstance(layer, TopK):
        if layer.groups != 1:
            raise ValueError(f"{NAME}: activation must be TopK without groups, got {layer}")
        config |= {
            "architecture": "topk", "k": layer.k, "rescale_acts_by_decoder_norm": scaled,
        }  # fmt: skip
    else:
        if scaled:
            raise ValueError(
                f"{NAME}: scale_scores must be False, which the format has for TopK alone, "
                f"got {layer}"
            )
        config["architecture"] = "standard" if isinstance(layer, nn.ReLU) else "jumprelu"
    if config["architecture"] == "jumprelu":
        tensors["threshold"] = _thresholds(layer, checkpoint.latents, encoder.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / TENSORS, tensors, {"format": "pt"})
    write_config(folder / CONFIG, config)


@torch.no_grad()
def _thresholds(layer: nn.Module, latents: int, dtype: torch.dtype) -> Tensor:
    """Return the thresholds [N] in the dtype of the other tensors."""
    if isinstance(layer, JumpReLU):
        return layer.threshold.to(dtype)
    if isinstance(layer, BatchTopK):
        if bool(layer.threshold.isnan()):
            raise ValueError(f"{NAME}: BatchTopK's threshold must be set (see calibrate), got nan")
        return layer.threshold.to(dtype).expand(latents)
    raise ValueError(f"{NAME}: activation must be TopK, BatchTopK, JumpReLU or ReLU, got {layer}")
