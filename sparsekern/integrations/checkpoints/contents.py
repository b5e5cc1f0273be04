"""What a checkpoint of any format contains, in our names, and checks that all formats share."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..._system import open_plain, replaced
from ..._tensor_files import SavedTensors, write_tensors
from ...nn import JumpReLU

# Elements that are looked at together for NaN and infinities.
_CHECKED = 1 << 20


@dataclass
class Checkpoint:
    """A sparse autoencoder: what its constructor takes and what its state_dict holds.

    Attributes:
        activation: the layer, with its thresholds.
        tensors: ``dictionary`` [N, D], ``encoder`` [N, D] (absent if tied), ``encoder_bias`` [N],
            ``decoder_bias`` [D]; those of ``counter`` and ``activation`` may be absent.
        options: further arguments of `SparseAutoencoder`.
        metadata: what the library knows of the activations, such as a model's name; JSON types.
    """

    activation: nn.Module
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def latents(self) -> int:
        """N, width of the sparse layer."""
        return self.tensors["dictionary"].shape[0]

    @property
    def features(self) -> int:
        """D, width of the activations."""
        return self.tensors["dictionary"].shape[1]

    @property
    def encoder(self) -> Tensor:
        """Encoder [N, D]; the dictionary if they are tied."""
        return self.tensors.get("encoder", self.tensors["dictionary"])


def refuse(path: Path, key: str, value: Any, rule: str) -> NoReturn:
    """Raise the error for a key in a file."""
    text = repr(value)
    raise ValueError(f"{path}: {key} {rule}, got {text if len(text) < 200 else text[:200] + '...'}")


def check_defaults(checkpoint: Checkpoint, name: str, defaults: Mapping[str, Any]) -> None:
    """Check that options which a format lacks have their defaults."""
    for key, value in defaults.items():
        if checkpoint.options.get(key, value) != value:
            raise ValueError(f"{name}: {key} must be {value}, the format has no such option")


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    with open_plain(path) as file:
        text = file.read()
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: the file must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the file must hold a JSON object, got {type(config).__name__}")
    return config


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    with replaced(path) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())


def check_config(
    path: Path, config: Mapping[str, Any], needed: Iterable[str], known: Collection[str]
) -> None:
    """Check that a config has all that is needed and nothing that is not known."""
    for key in needed:
        if key not in config:
            raise ValueError(f"{path}: {key} is missing")
    for key, value in config.items():
        if key not in known:
            refuse(path, key, value, "is not known")


def check_options(path: Path, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that options, where they are there, have the only values that are supported."""
    for key, value in expected.items():
        if key in config and config[key] != value:
            refuse(path, key, config[key], f"must be {value!r}, nothing else is supported")


def count(path: Path, config: Mapping[str, Any], key: str) -> int:
    """Look up an integer of at least 1."""
    value = config[key]
    if type(value) is not int or value < 1:
        refuse(path, key, value, "must be an integer of at least 1")
    return int(value)


def check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
) -> None:
    """Check names and shapes of a file's tensors, and that those with shapes have one dtype.

    Tensors of a safetensors file are not read for it.
    """
    for name in shapes:
        if name not in tensors:
            raise ValueError(f"{path}: {name} is missing")
    dtypes = {}
    for name in tensors:
        shape, dtype = _shape_and_dtype(tensors, name)
        if name not in shapes:
            if name not in optional:
                refuse(path, name, shape, "is not known, a tensor of shape")
            continue
        if shape != shapes[name]:
            refuse(path, name, list(shape), f"must have shape {list(shapes[name])}")
        if not dtype.is_floating_point or dtype.itemsize < 2:
            refuse(path, name, dtype, "must be of 16, 32 or 64 bits floating point")
        dtypes[name] = dtype
    first = next(iter(shapes))
    for name, dtype in dtypes.items():
        if dtype != dtypes[first]:
            refuse(path, name, dtype, f"must have the dtype of {first}, {dtypes[first]}")


def _shape_and_dtype(
    tensors: Mapping[str, Tensor], name: str
) -> tuple[tuple[int, ...], torch.dtype]:
    if isinstance(tensors, SavedTensors):
        return tuple(tensors.shape(name)), tensors.dtype(name)
    return tuple(tensors[name].shape), tensors[name].dtype


def finite(path: Path, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Read a tensor without NaN or infinities."""
    tensor = tensors[name]
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
    for part in flat.split(_CHECKED):
        bad = ~part.isfinite()
        if bad.any():
            refuse(path, name, part[bad][0].item(), "must be finite")
    return tensor


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, and give it its own."""
    with replaced(path) as file:
        write_tensors(file, tensors, metadata)


def jumprelu_with(thresholds: Tensor, path: Path, key: str) -> JumpReLU:
    """Make the layer that keeps x > threshold; thresholds [N] of at least 0.

    Our layer keeps logarithms. They are float64 here, and rounded up: `threshold`, converted back,
    is bit for bit what it was, and no x of a narrower dtype lies between the two.
    """
    if bool((thresholds < 0).any()):
        refuse(path, key, thresholds.min().item(), "must be at least 0")
    if thresholds.dtype == torch.float64:
        refuse(path, key, thresholds.dtype, "must be of 16 or 32 bits, for which logarithms exist")
    exact = thresholds.double()
    logarithms = exact.log()
    while bool((low := logarithms.exp() < exact).any()):
        next_up = torch.nextafter(logarithms, torch.full_like(logarithms, torch.inf))
        logarithms = torch.where(low, next_up, logarithms)
    layer = JumpReLU(len(thresholds), device="meta")
    layer.log_threshold = nn.Parameter(logarithms)
    return layer
