"""Tensors of checkpoints, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..._tensor_files import TensorsOfFile, shape_and_dtype, write_tensors
from ...nn import JumpReLU
from .configs import refuse
from .contents import WriteFile

# Elements that are looked at together for NaN and infinities.
_CHECKED = 1 << 18


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
        shape, dtype = shape_and_dtype(tensors, name)
        if name not in shapes:
            if name not in optional:
                refuse(path, name, shape, "is not known, a tensor of shape")
            continue
        if shape != list(shapes[name]):
            refuse(path, name, shape, f"must have shape {list(shapes[name])}")
        if not dtype.is_floating_point or dtype.itemsize < 2:
            refuse(path, name, dtype, "must be of 16, 32 or 64 bits floating point")
        dtypes[name] = dtype
    first = next(iter(shapes))
    for name, dtype in dtypes.items():
        if dtype != dtypes[first] and name not in any_dtype:
            refuse(path, name, dtype, f"must have the dtype of {first}, {dtypes[first]}")


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
    shape, _ = shape_and_dtype(tensors, name)
    if len(shape) != 2:
        refuse(path, name, shape, "must have two dimensions")
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
