"""Our own format: one safetensors file with the state_dict.

The constructor's arguments are in its header under ``sparsekern``, in JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._tensor_files import SavedTensors
from ...nn import BatchTopK, JumpReLU, TopK
from .configs import check_config, flag, refuse
from .contents import Checkpoint, WriteFile
from .weights import check_tensors, finite, safetensors_file

NAME = "sparsekern"
FILE = "sparsekern.safetensors"
FORMAT = 1
_FLAGS = ("distributed", "tied", "scale_scores", "subtract_bias", "normalize_rows")
_WEIGHTS = ("sparsity_weight", "auxk_weight", "multi_weight")
OPTIONS = (
    *_FLAGS, *_WEIGHTS, "target_l0", "prefixes", "auxk", "multi_k", "dead_after",
)  # fmt: skip
_KEYS = ("format", "features", "latents", "activation", "options", "metadata")
_COUNTS = "counter.rows_since_fired"
# Saved where k was changed after construction; the header has it, too.
_CURRENT_K = "activation.current_k"


def recognises(path: Path) -> bool:
    """Tell whether this is the file, or a folder with it."""
    return path.name == FILE or (path / FILE).exists()


def read(path: Path) -> Checkpoint:
    """Read the file, or that of the folder."""
    path = path / FILE if path.is_dir() else path
    tensors = SavedTensors(path)
    try:
        config = _config(path, tensors.metadata.get(NAME))
        n, d = config["latents"], config["features"]
        layer = _activation(path, config["activation"], n)
        shapes = {"dictionary": (n, d), "encoder": (n, d), "encoder_bias": (n,)}
        shapes["decoder_bias"] = (d,)
        if config["options"]["tied"]:
            del shapes["encoder"]
        inner = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        others = {f"activation.{name}": shape for name, shape in inner.items()} | {_COUNTS: (n,)}
        check_tensors(path, tensors, shapes, {*others, _CURRENT_K})
        for name, shape in others.items():
            if name not in tensors:
                raise ValueError(f"{path}: {name} is missing")
            if tuple(tensors.shape(name)) != shape:
                refuse(path, name, tensors.shape(name), f"must have shape {list(shape)}")
        state = {
            name: finite(path, tensors, name) if name in shapes else tensors[name]
            for name in tensors
        }
    finally:
        tensors.close()
    layer.load_state_dict({name: state[f"activation.{name}"] for name in inner}, assign=True)
    return Checkpoint(layer, state, config["options"], config["metadata"])


def files(checkpoint: Checkpoint) -> dict[str, WriteFile]:
    """Make the file."""
    layer = checkpoint.activation
    arguments: dict[str, Any] = {"type": type(layer).__name__}
    if isinstance(layer, TopK):
        arguments |= {"k": layer.k, "groups": layer.groups}
    elif isinstance(layer, BatchTopK):
        arguments |= {"k": layer.k, "momentum": layer.momentum}
    elif isinstance(layer, JumpReLU):
        arguments |= {"bandwidth": layer.bandwidth}
    config = {
        "format": FORMAT,
        "features": checkpoint.features,
        "latents": checkpoint.latents,
        "activation": arguments,
        "options": {"tied": "encoder" not in checkpoint.tensors, **checkpoint.options},
        "metadata": checkpoint.metadata,
    }
    state = {f"activation.{name}": tensor for name, tensor in layer.state_dict().items()}
    state[_COUNTS] = torch.zeros(checkpoint.latents, dtype=torch.int64)
    content = safetensors_file(state | checkpoint.tensors, {NAME: json.dumps(config)})
    return {FILE: content}


def _config(path: Path, text: Any) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the header's {NAME} must be JSON, got {text!r}") from error
    if not isinstance(config, dict):
        refuse(path, NAME, config, "must be an object")
    check_config(path, config, _KEYS, _KEYS)
    if config["format"] != FORMAT:
        refuse(path, "format", config["format"], f"must be {FORMAT}")
    for key in ("activation", "options", "metadata"):
        if not isinstance(config[key], dict):
            refuse(path, key, config[key], "must be an object")
    options = config["options"]
    check_config(path, options, ("tied",), OPTIONS)
    for key in options:
        if key in _FLAGS:
            flag(path, options, key)
        if key in _WEIGHTS and type(options[key]) not in (int, float):
            refuse(path, key, options[key], "must be a number")
    return config


def _activation(path: Path, arguments: dict[str, Any], n: int) -> nn.Module:
    """Make the layer; its tensors come from the file."""
    arguments = dict(arguments)
    kind = arguments.pop("type", None)
    try:
        if kind == "TopK":
            return TopK(**arguments)
        if kind == "BatchTopK":
            return BatchTopK(**arguments)
        if kind == "JumpReLU":
            return JumpReLU(n, **arguments)
        if kind == "ReLU":
            return nn.ReLU(**arguments)
    except (TypeError, ValueError) as error:
        refuse(path, "activation", arguments, f"must be arguments of {kind} ({error})")
    refuse(path, "activation.type", kind, "must be TopK, BatchTopK, JumpReLU or ReLU")
