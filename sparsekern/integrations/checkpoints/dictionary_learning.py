"""saprmarks' dictionary_learning 0.1: ``ae.pt``, a state_dict, and ``config.json``.

    scores         = (x - b_dec) @ encoder.weight.T + encoder.bias
    reconstruction = codes @ decoder.weight.T + b_dec

``b_dec`` is not subtracted by `AutoEncoderNew` and `JumpReluAutoEncoder`.

==========================  ======================================  ================================
``trainer.dict_class``      codes                                   names
==========================  ======================================  ================================
``AutoEncoderTopK``         the k largest of relu(scores)           as above, ``k``, ``threshold``
``BatchTopKSAE``            relu(scores) where above ``threshold``  as above, ``k``, ``threshold``
``MatryoshkaBatchTopKSAE``  relu(scores) where above ``threshold``  ``W_enc`` [D, N], ``b_enc``,
                                                                    ``W_dec`` [N, D], ``b_dec``,
                                                                    ``k``, ``threshold``,
                                                                    ``group_sizes``
``AutoEncoder``             relu(scores)                            ``bias`` in place of ``b_dec``
``AutoEncoderNew``          relu(scores)                            ``decoder.bias`` in its place
``JumpReluAutoEncoder``     relu(scores) where above ``threshold``  ``W_enc``, ``b_enc``, ``W_dec``,
                                                                    ``b_dec``, ``threshold`` [N]
==========================  ======================================  ================================

``encoder.weight`` [N, D] is laid out as ours is; ``decoder.weight`` [D, N] and ``W_enc`` are
transposes, which reading and writing copy once, so that no step does. A threshold of -1 was never
set. That of ``AutoEncoderTopK`` serves an option of its ``encode`` and not its result; it is kept
among the metadata, with ``config.json``. The library divides the rows of an ``AutoEncoder``'s
dictionary by their norms when it loads one; we read what is in the file. Its trainer of
``JumpReluAutoEncoder`` also leaves thresholds below 0: with the ReLU they are 0, and are read so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...nn import BatchTopK, JumpReLU, TopK
from .configs import (
    check_config,
    check_options,
    choice,
    count,
    entry,
    json_file,
    read_config,
    refuse,
)
from .contents import Checkpoint, WriteFile, check_flags
from .torch_files import open_torch_file, tensors_of, torch_file
from .weights import check_tensors, finite, jumprelu_with, read_weights, weight_shapes

NAME = "dictionary_learning"
CONFIG = "config.json"
TENSORS = "ae.pt"
_LINEAR = {
    "encoder": "encoder.weight", "encoder_bias": "encoder.bias",
    "dictionary": "decoder.weight", "decoder_bias": "b_dec",
}  # fmt: skip
_MATRICES = {
    "encoder": "W_enc", "encoder_bias": "b_enc", "dictionary": "W_dec", "decoder_bias": "b_dec",
}  # fmt: skip
_NAMES = {
    "AutoEncoderTopK": _LINEAR,
    "BatchTopKSAE": _LINEAR,
    "MatryoshkaBatchTopKSAE": _MATRICES,
    "AutoEncoder": _LINEAR | {"decoder_bias": "bias"},
    "AutoEncoderNew": _LINEAR | {"decoder_bias": "decoder.bias"},
    "JumpReluAutoEncoder": _MATRICES,
}
# They do not subtract the decoder's bias.
_UNBIASED = ("AutoEncoderNew", "JumpReluAutoEncoder")
_TRANSPOSED = ("decoder.weight", "W_enc")
_UNSET = -1.0
# Among the metadata: that of AutoEncoderTopK.
_THRESHOLD = f"{NAME}_threshold"


def recognises(path: Path) -> bool:
    """Tell whether this is a folder with the file of tensors."""
    return (path / TENSORS).exists()


def read(path: Path) -> Checkpoint:
    """Read the two files of a folder."""
    config_path, tensors_path = path / CONFIG, path / TENSORS
    config = read_config(config_path)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        refuse(config_path, "trainer", trainer, "must be an object")
    # The other entries say how it was trained.
    check_config(config_path, trainer, ("dict_class", "activation_dim", "dict_size"), trainer)
    kind = trainer["dict_class"]
    if kind == "GatedAutoEncoder":
        rule = "must be another class, a gate beside the encoder is not supported"
        refuse(config_path, "dict_class", kind, rule)
    kind = choice(config_path, trainer, "dict_class", _NAMES)
    d, n = (count(config_path, trainer, key) for key in ("activation_dim", "dict_size"))
    tensors = tensors_of(tensors_path, open_torch_file(tensors_path))
    shapes = weight_shapes(_NAMES[kind], n, d, _TRANSPOSED)
    others: tuple[str, ...] = ()
    if kind == "JumpReluAutoEncoder":
        shapes["threshold"] = (n,)
    elif kind not in ("AutoEncoder", "AutoEncoderNew"):
        others = ("k", "threshold")
    if kind == "MatryoshkaBatchTopKSAE":
        others = (*others, "group_sizes")
    check_tensors(tensors_path, tensors, shapes, others)
    metadata: dict[str, Any] = {NAME: config}
    if name := entry(trainer, "lm_name", str, ""):
        metadata["model_name"] = name
    layer, options = _activation(path, trainer, tensors, others, metadata)
    state = read_weights(tensors_path, tensors, _NAMES[kind], _TRANSPOSED)
    return Checkpoint(layer, state, {"subtract_bias": kind not in _UNBIASED, **options}, metadata)


def _activation(
    path: Path,
    trainer: dict[str, Any],
    tensors: dict[str, Any],
    others: tuple[str, ...],
    metadata: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any]]:
    """Make the layer, and the options of the model; add a threshold that serves neither."""
    file = path / TENSORS
    for name in others:
        if name not in tensors:
            raise ValueError(f"{file}: {name} is missing")
    if trainer["dict_class"] == "JumpReluAutoEncoder":
        thresholds = finite(file, tensors, "threshold").clamp_min(0)
        return jumprelu_with(thresholds, file, "threshold"), {}
    if "k" not in others:
        return nn.ReLU(), {}
    n = trainer["dict_size"]
    for name in ("k", "threshold"):
        if tensors[name].numel() != 1:
            refuse(file, name, list(tensors[name].shape), "must be a number, a tensor of shape []")
    k, threshold = tensors["k"].item(), tensors["threshold"].item()
    if type(k) is not int or not 1 <= k <= n:
        refuse(file, "k", k, f"must be an integer in 1..{n}")
    check_options(path / CONFIG, trainer, {"k": k})
    if threshold != _UNSET and not 0 <= threshold < float("inf"):
        refuse(file, "threshold", threshold, f"must be at least 0, or {_UNSET}, which means unset")
    if trainer["dict_class"] == "AutoEncoderTopK":
        metadata[_THRESHOLD] = threshold
        return TopK(k), {}
    layer = BatchTopK(k)
    layer.threshold.fill_(torch.nan if threshold == _UNSET else threshold)
    if "group_sizes" not in others:
        return layer, {}
    sizes = tensors["group_sizes"].tolist()
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        refuse(file, "group_sizes", sizes, "must be integers above 0")
    if sum(sizes) != n:
        refuse(file, "group_sizes", sizes, f"must have the sum {n}")
    ends = tensors["group_sizes"].cumsum(0).tolist()
    return layer, {"prefixes": tuple(ends[:-1])}


def files(checkpoint: Checkpoint) -> dict[str, WriteFile]:
    """Make the two files; BatchTopK with prefixes becomes ``MatryoshkaBatchTopKSAE``.

    Raises:
        ValueError: TopK in groups, a k with a fraction, or options that the format lacks.
    """
    layer = checkpoint.activation
    prefixes = checkpoint.options.get("prefixes", ())
    kind = _dict_class(checkpoint, matryoshka=bool(prefixes))
    needed = {
        "scale_scores": False,
        "normalize_rows": False,
        "subtract_bias": kind not in _UNBIASED,
    }
    check_flags(checkpoint, NAME, needed)
    tensors = {}
    for key, name in _NAMES[kind].items():
        tensor = checkpoint.encoder if key == "encoder" else checkpoint.tensors[key]
        tensors[name] = tensor.t() if name in _TRANSPOSED else tensor
    saved = entry(checkpoint.metadata, NAME, dict, {})
    trainer = dict(entry(saved, "trainer", dict, {}))
    if "lm_name" not in trainer and "model_name" in checkpoint.metadata:
        trainer["lm_name"] = checkpoint.metadata["model_name"]
    trainer |= {
        "dict_class": kind,
        "activation_dim": checkpoint.features,
        "dict_size": checkpoint.latents,
    }
    if isinstance(layer, TopK | BatchTopK):
        if isinstance(layer, TopK):
            threshold = torch.tensor(entry(checkpoint.metadata, _THRESHOLD, float, _UNSET))
        else:
            threshold = layer.threshold.detach().cpu()
            threshold = torch.where(threshold.isnan(), _UNSET, threshold)
        tensors |= {"k": torch.tensor(int(layer.k), dtype=torch.int32), "threshold": threshold}
        trainer["k"] = int(layer.k)
    if isinstance(layer, JumpReLU):
        tensors["threshold"] = layer.threshold.detach().to(checkpoint.encoder.dtype)
    if kind == "MatryoshkaBatchTopKSAE":
        ends = torch.tensor([0, *prefixes, checkpoint.latents])
        tensors["group_sizes"] = ends.diff()
        trainer["group_sizes"] = ends.diff().tolist()
    return {TENSORS: torch_file(tensors), CONFIG: json_file(saved | {"trainer": trainer})}


def _dict_class(checkpoint: Checkpoint, *, matryoshka: bool) -> str:
    """Choose the library's class."""
    layer = checkpoint.activation
    if isinstance(layer, nn.ReLU):
        biased = checkpoint.options.get("subtract_bias", True)
        return "AutoEncoder" if biased else "AutoEncoderNew"
    if isinstance(layer, JumpReLU):
        return "JumpReluAutoEncoder"
    if isinstance(layer, TopK) and layer.groups == 1:
        return "AutoEncoderTopK"
    if isinstance(layer, BatchTopK) and int(layer.k) == layer.k:
        return "MatryoshkaBatchTopKSAE" if matryoshka else "BatchTopKSAE"
    raise ValueError(
        f"{NAME}: activation must be TopK without groups, BatchTopK with an integer k, JumpReLU or "
        f"ReLU, got {layer}, k = {getattr(layer, 'k', None)}"
    )
