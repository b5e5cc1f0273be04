"""What a checkpoint of any format contains, in our names, and checks that all formats share."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..._system import open_plain
from ..._tensor_files import TensorsOfFile, write_tensors
from ...nn import JumpReLU

T = TypeVar("T")
WriteFile = Callable[[BinaryIO], Any]
"""Writes the content of a file that is open for it."""
# Of SparseAutoencoder.
_DEFAULTS = {"scale_scores": False, "subtract_bias": True, "normalize_rows": False}
_FOLDS = {"scale_scores": "fold_norms", "subtract_bias": "fold_bias"}
# Elements that are looked at together for NaN and infinities.
_CHECKED = 1 << 18


class Unstated(nn.Module):
    """Stand for the activation where files do not say which it is."""


@dataclass
class Checkpoint:
    """A sparse autoencoder: what its constructor takes and what its state_dict holds.

    Attributes:
        activation: the layer, with its thresholds.
        tensors: ``dictionary`` [N, D], ``encoder`` [N, D] (absent if tied), ``encoder_bias`` [N],
            ``decoder_bias`` [D]; those of ``counter`` and ``activation`` may be absent.
        options: further arguments of `SparseAutoencoder`.
        metadata: what the library knows of the activations, in JSON types: ``model_name`` and
            ``hook_name`` (SAELens' words) if it does, and more of its own.
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
    raise ValueError(f"{path}: {key} {rule}, got {shortened(repr(value))}")


def shortened(text: Any) -> str:
    """Return the first line of a text, or 200 characters of it."""
    line = str(text).partition("\n")[0]
    return line if len(line) <= 200 else line[:200] + "..."


def check_flags(checkpoint: Checkpoint, name: str, needed: Mapping[str, bool]) -> None:
    """Check that options which a format lacks are what its library does."""
    for key, value in needed.items():
        if checkpoint.options.get(key, _DEFAULTS[key]) != value:
            how = f" (see SparseAutoencoder.{_FOLDS[key]})" if key in _FOLDS and not value else ""
            raise ValueError(f"{name}: {key} must be {value}, the format has no such option{how}")


def entry(metadata: Mapping[str, Any], key: str, kind: type[T], default: T) -> T:
    """Look up an entry of metadata, which may be anything; the default if it is no ``kind``."""
    value = metadata.get(key)
    return value if isinstance(value, kind) else default


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


def json_file(config: Mapping[str, Any]) -> WriteFile:
    """Make what writes a JSON file."""
    text = (json.dumps(config, indent=2) + "\n").encode()
    return lambda file: file.write(text)


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


def flag(path: Path, config: Mapping[str, Any], key: str, default: bool | None = None) -> bool:
    """Look up true or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        refuse(path, key, value, "must be true or false")
    return value


def choice(path: Path, config: Mapping[str, Any], key: str, known: Iterable[str]) -> str:
    """Look up one of several names."""
    value, names = config.get(key), list(known)
    if not isinstance(value, str) or value not in names:
        refuse(path, key, value, f"must be one of {', '.join(names)}")
    return value


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
    any_dtype: Collection[str] = (),
) -> None:
    """Check names and shapes of a file's tensors, and that those with shapes have one dtype.

    Tensors of a `TensorsOfFile` are not read for it.

    Args:
        path: the file.
        tensors: what it holds.
        shapes: of those that must be there.
        optional: names of others that may be there.
        any_dtype: of those with shapes, names of some whose dtype may differ.
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
        if dtype != dtypes[first] and name not in any_dtype:
            refuse(path, name, dtype, f"must have the dtype of {first}, {dtypes[first]}")


def _shape_and_dtype(
    tensors: Mapping[str, Tensor], name: str
) -> tuple[tuple[int, ...], torch.dtype]:
    if isinstance(tensors, TensorsOfFile):
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


def weight_shapes(
    names: Mapping[str, str], n: int, d: int, transposed: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that weights must have in a file.

    Args:
        names: of the file, by ours.
        n: latents.
        d: features.
        transposed: those of the file whose layout is the transpose of ours.
    """
    ours = {"encoder": (n, d), "encoder_bias": (n,), "dictionary": (n, d), "decoder_bias": (d,)}
    return {
        name: ours[key][::-1] if name in transposed else ours[key] for key, name in names.items()
    }


def matrix_shape(path: Path, tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Look up the shape of a matrix, without reading it."""
    if name not in tensors:
        raise ValueError(f"{path}: {name} is missing")
    shape, _ = _shape_and_dtype(tensors, name)
    if len(shape) != 2:
        refuse(path, name, list(shape), "must have two dimensions")
    return shape[0], shape[1]


def read_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    transposed: Collection[str] = (),
) -> dict[str, Tensor]:
    """Read finite weights by our names, contiguous and each in memory of its own.

    Args: as `weight_shapes`. The transposed ones are read first: the copy of one and the others
    never take more memory than all weights.
    """
    state = {}
    for key, name in sorted(names.items(), key=lambda item: item[1] not in transposed):
        tensor = finite(path, tensors, name)
        if name in transposed or not isinstance(tensors, TensorsOfFile):
            tensor = tensor.t() if name in transposed else tensor
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        state[key] = tensor
    return {key: state[key] for key in names}


def safetensors_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> WriteFile:
    """Make what writes a safetensors file."""
    return lambda file: write_tensors(file, tensors, metadata)


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


def jumprelu_with_logarithms(logarithms: Tensor, path: Path, key: str) -> JumpReLU:
    """Make the layer that keeps x > exp(logarithm), from logarithms [N], which it keeps."""
    thresholds = logarithms.exp()
    if not bool(thresholds.isfinite().all()):
        bad = logarithms[~thresholds.isfinite()][0].item()
        refuse(path, key, bad, "must be logarithms of finite thresholds")
    layer = JumpReLU(len(thresholds), device="meta")
    layer.log_threshold = nn.Parameter(logarithms)
    return layer
