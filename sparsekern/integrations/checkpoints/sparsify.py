"""EleutherAI's sparsify (eai-sparsify 1.3): ``cfg.json`` and ``sae.safetensors``.

    codes          = top-k of relu((x - b_dec) @ encoder.weight.T + encoder.bias)
    reconstruction = codes @ W_dec + b_dec

``encoder.weight`` [N, D], ``encoder.bias`` [N], ``W_dec`` [N, D], ``b_dec`` [D] are laid out as
ours are. ``activation`` is ``topk`` or ``groupmax``, which takes the largest of each of k groups of
neighbouring latents.
"""

from __future__ import annotations

from pathlib import Path

from ..._tensor_files import SavedTensors
from ...nn import TopK
from .configs import check_config, check_options, count, json_file, read_config, refuse
from .contents import Checkpoint, WriteFile, check_flags
from .weights import check_tensors, read_weights, safetensors_file, weight_shapes

NAME = "sparsify"
CONFIG = "cfg.json"
TENSORS = "sae.safetensors"
_NAMES = {
    "encoder": "encoder.weight", "encoder_bias": "encoder.bias",
    "dictionary": "W_dec", "decoder_bias": "b_dec",
}  # fmt: skip
# normalize_decoder, multi_topk and expansion_factor say how it was trained or made. `signed` is of
# earlier versions.
_KEYS = (
    "d_in", "k", "activation", "expansion_factor", "normalize_decoder", "num_latents", "multi_topk",
    "skip_connection", "transcode", "signed",
)  # fmt: skip


def recognises(path: Path) -> bool:
    """Tell whether this is a folder with the file of tensors."""
    return (path / TENSORS).exists()


def read(path: Path) -> Checkpoint:
    """Read the two files of a folder; without ``num_latents`` the latents are those of the file."""
    config_path, tensors_path = path / CONFIG, path / TENSORS
    config = read_config(config_path)
    check_config(config_path, config, ("d_in", "k"), _KEYS)
    check_options(
        config_path, config, {"skip_connection": False, "transcode": False, "signed": False}
    )
    d, k = count(config_path, config, "d_in"), count(config_path, config, "k")
    if config.get("num_latents"):
        n = count(config_path, config, "num_latents")
    else:
        n = d * count(config_path, {"expansion_factor": 32} | config, "expansion_factor")
    kind = config.get("activation", "topk")
    if kind not in ("topk", "groupmax"):
        refuse(config_path, "activation", kind, "must be 'topk' or 'groupmax'")
    if k > n or (kind == "groupmax" and n % k):
        rule = "at most" if k > n else "a divisor of"
        refuse(config_path, "k", k, f"must be {rule} the number of latents, {n}")
    tensors = SavedTensors(tensors_path)
    try:
        check_tensors(tensors_path, tensors, weight_shapes(_NAMES, n, d))
        state = read_weights(tensors_path, tensors, _NAMES)
    finally:
        tensors.close()
    return Checkpoint(TopK(k, groups=k if kind == "groupmax" else 1), state)


def files(checkpoint: Checkpoint) -> dict[str, WriteFile]:
    """Make the two files.

    Raises:
        ValueError: an activation other than TopK in 1 or k groups, or options that the format
            lacks.
    """
    layer = checkpoint.activation
    if not isinstance(layer, TopK) or layer.groups not in (1, layer.k):
        raise ValueError(f"{NAME}: activation must be TopK in 1 or k groups, got {layer}")
    check_flags(
        checkpoint, NAME, {"scale_scores": False, "normalize_rows": False, "subtract_bias": True}
    )
    tensors = {
        name: checkpoint.encoder if ours == "encoder" else checkpoint.tensors[ours]
        for ours, name in _NAMES.items()
    }
    config = {
        "activation": "topk" if layer.groups == 1 else "groupmax",
        "expansion_factor": max(1, checkpoint.latents // checkpoint.features),
        "normalize_decoder": True,
        "num_latents": checkpoint.latents,
        "k": layer.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": checkpoint.features,
    }
    return {TENSORS: safetensors_file(tensors, {"format": "pt"}), CONFIG: json_file(config)}
