"""OpenMOSS' Language-Model-SAEs (lm_saes 1, llamascopium 2) and Llama Scope (arXiv 2410.20526).

    scores         = x @ W_E + b_E
    codes          = act_fn(scores * |W_D rows|) / |W_D rows|, or act_fn(scores) where
                     sparsity_include_decoder_norm is false
    act_fn         : relu, topk, batchtopk, or jumprelu, which keeps what is above its threshold
    reconstruction = codes @ W_D + b_D

==================  =====================================  ========================================
files               ``config.json``,                       ``hyperparams.json``,
                    ``sae_weights.safetensors``            ``checkpoints/final.safetensors``
tensors             ``W_E`` [D, N], ``b_E`` [N],           ``encoder.weight`` [N, D],
                    ``W_D`` [N, D], ``b_D`` [D]            ``encoder.bias`` [N],
                                                           ``decoder.weight`` [D, N],
                                                           ``decoder.bias`` [D]
thresholds          logarithms [N], in                     ``log_jumprelu_threshold`` [N], or
                    ``activation_function.``               ``jump_relu_threshold`` of the config,
                    ``log_jumprelu_threshold``             one for all latents
==================  =====================================  ========================================

Both are read in either file, the first is written. Our values are the codes times the norms, and
are divided by them in decoding. ``W_E`` and ``decoder.weight`` are transposes, which reading and
writing copy once, so that no step does.

x has the mean norm sqrt(D) where ``norm_activation`` is ``dataset-wise``: the library multiplies
activations by sqrt(D) / ``dataset_average_activation_norm`` before it encodes them, and so does the
caller here (or `SparseAutoencoder.fold_normalization` by that number, once). That norm and the
config are kept among the metadata.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._tensor_files import SavedTensors
from ...nn import BatchTopK, JumpReLU, TopK
from .configs import (
    check_config,
    check_options,
    choice,
    count,
    entry,
    flag,
    json_file,
    read_config,
    refuse,
)
from .contents import Checkpoint, WriteFile, check_flags
from .weights import (
    check_tensors,
    jumprelu_with,
    jumprelu_with_logarithms,
    read_weights,
    safetensors_file,
    weight_shapes,
)

NAME = "openmoss"
CONFIG = "config.json"
OLD_CONFIG = "hyperparams.json"
TENSORS = "sae_weights.safetensors"
# In the order in which the library looks for them.
_PLACES = (TENSORS, "checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
_NAMES = {
    "encoder": "W_E", "encoder_bias": "b_E", "dictionary": "W_D", "decoder_bias": "b_D",
}  # fmt: skip
_OLD_NAMES = {
    "encoder": "encoder.weight", "encoder_bias": "encoder.bias",
    "dictionary": "decoder.weight", "decoder_bias": "decoder.bias",
}  # fmt: skip
_TRANSPOSED = ("W_E", "decoder.weight")
_LOGARITHMS = "activation_function.log_jumprelu_threshold"
_OLD_LOGARITHMS = "log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm"
_ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu")
# The library's own, where a config lacks them.
_DEFAULTS = {
    "use_decoder_bias": True, "act_fn": "relu", "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True, "top_k": 50,
}  # fmt: skip


def recognises(path: Path) -> bool:
    """Tell whether this is a folder with a config and a file of tensors of the library."""
    if (path / OLD_CONFIG).exists():
        return True
    config = (path / CONFIG).exists() and not (path / "cfg.json").exists()
    return config and any((path / place).exists() for place in _PLACES)


def read(path: Path) -> Checkpoint:
    """Read the two files of a folder."""
    config_path = path / (CONFIG if (path / CONFIG).exists() else OLD_CONFIG)
    tensors_path = path / next((place for place in _PLACES if (path / place).exists()), TENSORS)
    config = _DEFAULTS | read_config(config_path)
    d, n = _sizes(config_path, config)
    tensors = SavedTensors(tensors_path)
    try:
        names = dict(_NAMES if "W_E" in tensors or "W_D" in tensors else _OLD_NAMES)
        if not flag(config_path, config, "use_decoder_bias"):
            del names["decoder_bias"]
        shapes = weight_shapes(names, n, d, _TRANSPOSED)
        logarithms = next((key for key in (_LOGARITHMS, _OLD_LOGARITHMS) if key in tensors), None)
        if config["act_fn"] == "jumprelu" and (logarithms or "jump_relu_threshold" not in config):
            shapes[logarithms or _LOGARITHMS] = (n,)
        norms = [name for name in tensors if name.startswith(f"{_NORM}.")]
        check_tensors(tensors_path, tensors, shapes, norms)
        layer = _activation(config_path, config, n, tensors_path, tensors, logarithms)
        state = read_weights(tensors_path, tensors, names, _TRANSPOSED)
        metadata: dict[str, Any] = {NAME: config}
        if hook := entry(config, "hook_point_in", str, ""):
            metadata["hook_name"] = hook
        for name in norms:
            if tensors.shape(name):
                refuse(tensors_path, name, tensors.shape(name), "must have shape []")
            place = name.removeprefix(f"{_NORM}.")
            metadata.setdefault(_NORM, {})[place] = tensors[name].item()
    finally:
        tensors.close()
    state.setdefault("decoder_bias", state["dictionary"].new_zeros(d))
    options = {
        "subtract_bias": flag(config_path, config, "apply_decoder_bias_to_pre_encoder", False),
        "scale_scores": flag(config_path, config, "sparsity_include_decoder_norm"),
    }
    return Checkpoint(layer, state, options, metadata)


def _sizes(path: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Check the options that matter, and return features and latents."""
    check_config(path, config, ("d_model", "expansion_factor"), config)
    check_options(path, config, {"sae_type": "sae", "use_glu_encoder": False})
    if config.get("hook_point_in") != config.get("hook_point_out"):
        rule = "must be hook_point_in, a transcoder is not supported"
        refuse(path, "hook_point_out", config.get("hook_point_out"), rule)
    choice(path, config, "act_fn", _ACTIVATIONS)
    if config["norm_activation"] not in ("dataset-wise", "inference"):
        rule = "must be 'dataset-wise' or 'inference', since others divide each row by its norm"
        refuse(path, "norm_activation", config["norm_activation"], rule)
    d, factor = count(path, config, "d_model"), config["expansion_factor"]
    if type(factor) not in (int, float) or not 1 <= factor * d < 2**31:
        refuse(path, "expansion_factor", factor, "must be a number that gives 1..2^31 latents")
    return d, int(d * factor)


def _activation(
    config_path: Path,
    config: dict[str, Any],
    n: int,
    path: Path,
    tensors: Mapping[str, Tensor],
    logarithms: str | None,
) -> nn.Module:
    kind = config["act_fn"]
    if kind == "relu":
        return nn.ReLU()
    if kind != "jumprelu":
        k = count(config_path, config, "top_k")
        if k > n:
            refuse(config_path, "top_k", k, f"must be at most the number of latents, {n}")
        return TopK(k) if kind == "topk" else BatchTopK(k)
    if logarithms is not None:
        return jumprelu_with_logarithms(tensors[logarithms], path, logarithms)
    threshold = config["jump_relu_threshold"]
    if type(threshold) not in (int, float) or not 0 <= threshold < math.inf:
        refuse(config_path, "jump_relu_threshold", threshold, "must be a number of at least 0")
    return jumprelu_with(torch.full((n,), threshold), config_path, "jump_relu_threshold")


def files(checkpoint: Checkpoint) -> dict[str, WriteFile]:
    """Make the two files; BatchTopK with a threshold becomes ``jumprelu``.

    The logarithms of thresholds are rounded to the dtype of the weights.

    Raises:
        ValueError: TopK in groups, a k with a fraction, or options that the format lacks.
    """
    check_flags(checkpoint, NAME, {"subtract_bias": False, "normalize_rows": False})
    saved = entry(checkpoint.metadata, NAME, dict, {})
    hook = entry(checkpoint.metadata, "hook_name", str, "")
    act_fn, changes, logarithms = _act_fn(checkpoint)
    config = {
        "sae_type": "sae",
        "d_model": checkpoint.features,
        "hook_point_in": hook,
        "hook_point_out": hook,
        "norm_activation": "inference",
        **saved,
        **changes,
        "expansion_factor": _expansion(checkpoint),
        "act_fn": act_fn,
        "sparsity_include_decoder_norm": bool(checkpoint.options.get("scale_scores")),
    }
    tensors = {
        "W_E": checkpoint.encoder.t(),
        "b_E": checkpoint.tensors["encoder_bias"],
        "W_D": checkpoint.tensors["dictionary"],
        "b_D": checkpoint.tensors["decoder_bias"],
    }
    if config.get("use_decoder_bias") is False:
        if bool(tensors["b_D"].any()):
            config["use_decoder_bias"] = True
        else:
            del tensors["b_D"]
    if logarithms is not None:
        tensors[_LOGARITHMS] = logarithms
    for place, norm in entry(checkpoint.metadata, _NORM, dict, {}).items():
        if isinstance(norm, float):
            tensors[f"{_NORM}.{place}"] = torch.tensor(norm, dtype=tensors["W_D"].dtype)
    return {TENSORS: safetensors_file(tensors, {"format": "pt"}), CONFIG: json_file(config)}


def _expansion(checkpoint: Checkpoint) -> float:
    """Return the factor whose product with D is N, rounded down as the library does."""
    factor = checkpoint.latents / checkpoint.features
    saved = entry(checkpoint.metadata, NAME, dict, {})
    if saved.get("expansion_factor") == factor:
        return entry(saved, "expansion_factor", int, factor)
    if int(checkpoint.features * factor) != checkpoint.latents:
        factor = math.nextafter(factor, math.inf)
    return factor


@torch.no_grad()
def _act_fn(checkpoint: Checkpoint) -> tuple[str, dict[str, Any], Tensor | None]:
    """Choose act_fn, its options, and the logarithms of thresholds [N]."""
    layer, dtype = checkpoint.activation, checkpoint.encoder.dtype
    if isinstance(layer, nn.ReLU):
        return "relu", {}, None
    if isinstance(layer, JumpReLU):
        return "jumprelu", {}, layer.log_threshold.to(dtype)
    if isinstance(layer, BatchTopK) and not bool(layer.threshold.isnan()):
        thresholds = layer.threshold.double().log().to(dtype).expand(checkpoint.latents)
        return "jumprelu", {}, thresholds
    if isinstance(layer, TopK) and layer.groups == 1:
        return "topk", {"top_k": layer.k}, None
    if isinstance(layer, BatchTopK) and int(layer.k) == layer.k:
        return "batchtopk", {"top_k": int(layer.k)}, None
    raise ValueError(
        f"{NAME}: activation must be TopK without groups, BatchTopK with an integer k or a "
        f"threshold, JumpReLU or ReLU, got {layer}"
    )
