"""Google's Gemma Scope (2024, arXiv 2408.05147): ``params.npz``, which is read, not written.

    scores         = x @ W_enc + b_enc
    codes          = relu(scores) where scores > threshold
    reconstruction = codes @ W_dec + b_dec

``W_enc`` [D, N] is the transpose of our encoder, which reading copies once, so that no step does.
``W_dec`` [N, D], ``b_enc`` [N], ``b_dec`` [D] and ``threshold`` [N] are as ours.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..._system import open_plain
from .contents import Checkpoint, check_tensors, finite, jumprelu_with, refuse

NAME = "gemma_scope"
TENSORS = "params.npz"
_NAMES = {
    "encoder": "W_enc", "encoder_bias": "b_enc", "dictionary": "W_dec", "decoder_bias": "b_dec",
}  # fmt: skip


def recognises(path: Path) -> bool:
    """Tell whether this is the file, or a folder with it."""
    return path.name == TENSORS or (path / TENSORS).exists()


def read(path: Path) -> Checkpoint:
    """Read the file, or that of the folder."""
    path = path / TENSORS if path.is_dir() else path
    tensors = _tensors(path)
    if "W_enc" not in tensors:
        raise ValueError(f"{path}: W_enc is missing")
    if tensors["W_enc"].dim() != 2:
        refuse(path, "W_enc", list(tensors["W_enc"].shape), "must have two dimensions")
    d, n = tensors["W_enc"].shape
    shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,)}
    check_tensors(path, tensors, shapes)
    layer = jumprelu_with(finite(path, tensors, "threshold"), path, "threshold")
    state = {key: finite(path, tensors, name) for key, name in _NAMES.items()}
    state["encoder"] = state["encoder"].t().contiguous()
    return Checkpoint(layer, state, {"subtract_bias": False})


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read the arrays, each once; pickled ones are an error."""
    tensors = {}
    with open_plain(path) as file:
        try:
            archive = np.load(file, allow_pickle=False)
            arrays = dict(archive) if isinstance(archive, np.lib.npyio.NpzFile) else {}
            for name, array in arrays.items():
                tensors[name] = torch.from_numpy(array)
        except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{path}: the file must be an intact npz file of numbers: {error}"
            ) from error
    return tensors
