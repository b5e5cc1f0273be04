"""SAELens 6, and 3 to 5: ``cfg.json`` and ``sae_weights.safetensors``.

    scores         = (x - b_dec) @ W_enc + b_enc, or x @ W_enc + b_enc where apply_b_dec_to_input
                     is false
    topk           : the k largest of scores * |W_dec rows|, after ReLU; |W_dec rows| is 1 without
                     rescale_acts_by_decoder_norm, and codes are divided by it before decoding
    jumprelu       : relu(scores) where scores > threshold
    standard       : relu(scores)
    reconstruction = codes @ W_dec + b_dec

With ``normalize_activations`` of ``layer_norm``, rows x are normalized, and reconstructions get
their scale and mean back.

``W_enc`` [D, N] is the transpose of our encoder: reading and writing copy that matrix once, so that
no step does. ``W_dec`` [N, D], ``b_enc`` [N], ``b_dec`` [D] and ``threshold`` [N] are as ours.

Checkpoints of training have further keys, which say how it trains, and two architectures of their
own, ``batchtopk`` and ``matryoshka_batchtopk``, with ``topk_threshold`` [] instead of thresholds.
The library saves what it has trained as ``jumprelu`` with one threshold, and so we write BatchTopK.
Configs from before version 6 mix the run with the model and are read, not written.
"""

from __future__ import annotations

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
    flag,
    json_file,
    read_config,
    refuse,
)
from .contents import Checkpoint, WriteFile
from .weights import (
    check_tensors,
    finite,
    jumprelu_with,
    read_weights,
    safetensors_file,
    weight_shapes,
)

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
_TOPK_TRAINING = ("use_sparse_activations", "aux_loss_coefficient")
_BATCH_KEYS = (*_TOPK_KEYS, *_TOPK_TRAINING, "topk_threshold_lr")
# Of each architecture, those of training included.
_MORE_KEYS = {
    "standard": ("l1_coefficient", "lp_norm", "l1_warm_up_steps"),
    "topk": (*_TOPK_KEYS, *_TOPK_TRAINING),
    "batchtopk": _BATCH_KEYS,
    "matryoshka_batchtopk": (*_BATCH_KEYS, "matryoshka_widths", "use_matryoshka_aux_loss"),
    "jumprelu": (
        "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode",
        "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_tanh_scale",
        "jumprelu_ste_to_input", "target_l0",
    ),
}  # fmt: skip
_NEEDED = {"topk": ("k",), "batchtopk": ("k",), "matryoshka_batchtopk": ("k", "matryoshka_widths")}
_SUPPORTED = {"reshape_activations": "none"}
_NORMALIZATIONS = ("none", "layer_norm")
_NAMES = {
    "encoder": "W_enc", "encoder_bias": "b_enc", "dictionary": "W_dec", "decoder_bias": "b_dec",
}  # fmt: skip
_TRANSPOSED = ("W_enc",)
_BATCH_THRESHOLD = "topk_threshold"
# Configs before version 6: other names of keys, and those that go to the metadata.
_RENAMED = {
    "hook_point": "hook_name", "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}  # fmt: skip
_METADATA = (
    "model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "dataset_path",
    "seqpos_slice", "model_class_name", "model_from_pretrained_kwargs", "neuronpedia_id",
    "sae_lens_training_version",
)  # fmt: skip
_SCALING = "scaling_factor"


def recognises(path: Path) -> bool:
    """Tell whether this is a folder with the file of tensors."""
    return (path / TENSORS).exists()


def read(path: Path) -> Checkpoint:
    """Read the two files of a folder."""
    config_path, tensors_path = path / CONFIG, path / TENSORS
    config = read_config(config_path)
    optional: tuple[str, ...] = ()
    if _is_old(config_path, config):
        config = _upgraded(config_path, config)
        optional = (_SCALING,)
    kind = choice(config_path, config, "architecture", _MORE_KEYS)
    needed = ("d_in", "d_sae", *_NEEDED.get(kind, ()))
    check_config(config_path, config, needed, (*_KEYS, "decoder_init_norm", *_MORE_KEYS[kind]))
    check_options(config_path, config, _SUPPORTED)
    normalization = config.get("normalize_activations", "none")
    if normalization not in _NORMALIZATIONS:
        rule = "must be 'none' or 'layer_norm', nothing else is supported"
        refuse(config_path, "normalize_activations", normalization, rule)
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        refuse(config_path, "metadata", metadata, "must be an object")
    d, n = count(config_path, config, "d_in"), count(config_path, config, "d_sae")
    shapes = weight_shapes(_NAMES, n, d, _TRANSPOSED)
    if kind == "jumprelu":
        shapes["threshold"] = (n,)
    elif kind.endswith("batchtopk"):
        shapes[_BATCH_THRESHOLD] = ()
    tensors = SavedTensors(tensors_path)
    try:
        check_tensors(tensors_path, tensors, shapes, optional, ("threshold", _BATCH_THRESHOLD))
        if _SCALING in tensors and bool((tensors[_SCALING] != 1).any()):
            refuse(tensors_path, _SCALING, "another number", "must be 1, nothing else is supported")
        layer, options = _activation(config_path, config, n, tensors_path, tensors)
        state = read_weights(tensors_path, tensors, _NAMES, _TRANSPOSED)
    finally:
        tensors.close()
    options["normalize_rows"] = normalization == "layer_norm"
    options["subtract_bias"] = flag(config_path, config, "apply_b_dec_to_input", True)
    if "k" in config:
        key = "rescale_acts_by_decoder_norm"
        options["scale_scores"] = flag(config_path, config, key, False)
    return Checkpoint(layer, state, options, metadata)


def _is_old(path: Path, config: dict[str, Any]) -> bool:
    """Tell whether a config is of a version before 6, as the library does."""
    metadata = config.get("metadata")
    inner = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    version = config.get("sae_lens_version") or inner
    if version is None:
        return True
    major = str(version).partition(".")[0]
    if not major.isdecimal():
        refuse(path, "sae_lens_version", version, "must be a version")
    return int(major) < 6


def _upgraded(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Take from an old config what a new one has; the rest says how it was trained."""
    old = {_RENAMED.get(key, key): value for key, value in config.items()}
    check_options(path, old, {"finetuning_scaling_factor": False})
    new = {key: old[key] for key in _KEYS if key in old}
    new["architecture"] = old.get("architecture", "standard")
    function = old.get("activation_fn", "relu")
    if function == "topk":
        arguments = old.get("activation_fn_kwargs", {})
        if not isinstance(arguments, dict):
            refuse(path, "activation_fn_kwargs", arguments, "must be an object")
        new |= {"architecture": "topk", **arguments}
    elif function != "relu":
        refuse(path, "activation_fn", function, "must be 'relu' or 'topk'")
    if not old.get("normalize_activations"):
        new["normalize_activations"] = "none"
    if "k" in old:
        new["k"] = old["k"]
    metadata = old.get("metadata", {})
    if isinstance(metadata, dict):
        new["metadata"] = {key: old[key] for key in _METADATA if key in old} | metadata
        new["metadata"].pop("sae_lens_version", None)
    return new


def _activation(
    config_path: Path,
    config: dict[str, Any],
    n: int,
    tensors_path: Path,
    tensors: SavedTensors,
) -> tuple[nn.Module, dict[str, Any]]:
    """Make the layer, and the options of the model that come with it."""
    kind = config["architecture"]
    if kind == "jumprelu":
        thresholds = finite(tensors_path, tensors, "threshold")
        return jumprelu_with(thresholds, tensors_path, "threshold"), {}
    if kind == "standard":
        return nn.ReLU(), {}
    if kind == "topk":
        k = count(config_path, config, "k")
        if k > n:
            refuse(config_path, "k", k, f"must be at most d_sae, {n}")
        return TopK(k), {}
    k = config["k"]
    if type(k) not in (int, float) or not 0 < k <= n:
        refuse(config_path, "k", k, f"must be a number above 0 and at most d_sae, {n}")
    threshold = finite(tensors_path, tensors, _BATCH_THRESHOLD)
    if threshold < 0:
        refuse(tensors_path, _BATCH_THRESHOLD, threshold.item(), "must be at least 0")
    layer = BatchTopK(k)
    layer.threshold.copy_(threshold)
    widths = config.get("matryoshka_widths", [])
    if not isinstance(widths, list) or not all(type(w) is int and 0 < w <= n for w in widths):
        refuse(config_path, "matryoshka_widths", widths, f"must be integers in 1..{n}")
    return layer, {"prefixes": tuple(width for width in widths if width < n)}


def files(checkpoint: Checkpoint) -> dict[str, WriteFile]:
    """Make the two files; BatchTopK becomes ``jumprelu`` with its threshold for all latents.

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
        "normalize_activations": _NORMALIZATIONS[bool(checkpoint.options.get("normalize_rows"))],
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
                f"{NAME}: scale_scores must be False (see SparseAutoencoder.fold_norms), which the "
                f"format has for TopK alone, got {layer}"
            )
        config["architecture"] = "standard" if isinstance(layer, nn.ReLU) else "jumprelu"
    if config["architecture"] == "jumprelu":
        tensors["threshold"] = _thresholds(layer, checkpoint.latents, encoder.dtype)
    return {TENSORS: safetensors_file(tensors, {"format": "pt"}), CONFIG: json_file(config)}


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
