"""Google's Gemma Scope, which is read, not written: JumpReLU autoencoders.

    scores         = x @ W_enc + b_enc
    codes          = relu(scores) where scores > threshold
    reconstruction = codes @ W_dec + b_dec

The first (2024, arXiv 2408.05147) is ``params.npz``. The second (2025) is ``params.safetensors``,
with ``w_enc`` and ``w_dec``, and ``config.json``, which says where the activations come from and is
kept among the metadata. Each file may be read without its folder.

``W_enc`` [D, N] is the transpose of our encoder, which reading copies once, so that no step does.
``W_dec`` [N, D], ``b_enc`` [N], ``b_dec`` [D] and ``threshold`` [N] are as ours.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._system import open_plain
from ..._tensor_files import SavedTensors, TensorsOfFile
from .configs import check_options, entry, read_config, refuse, shortened
from .contents import Checkpoint
from .weights import check_tensors, finite, jumprelu_with, matrix_shape, read_weights, weight_shapes

NAME = "gemma_scope"
FIRST = "params.npz"
SECOND = "params.safetensors"
CONFIG = "config.json"
_BIASES = {"encoder_bias": "b_enc", "decoder_bias": "b_dec"}
_NAMES = {
    FIRST: _BIASES | {"encoder": "W_enc", "dictionary": "W_dec"},
    SECOND: _BIASES | {"encoder": "w_enc", "dictionary": "w_dec"},
}
_SUPPORTED = {"architecture": "jump_relu", "affine_connection": False}


def recognises(path: Path) -> bool:
    """Tell whether this is one of the files, or a folder with one."""
    return path.name in _NAMES or any((path / name).exists() for name in _NAMES)


def read(path: Path) -> Checkpoint:
    """Read a file, or that of the folder."""
    if path.is_dir():
        path = path / (FIRST if (path / FIRST).exists() else SECOND)
    names = _NAMES[path.name]
    config: dict[str, Any] = {}
    if path.name == SECOND and (path.parent / CONFIG).exists():
        config = read_config(path.parent / CONFIG)
        check_options(path.parent / CONFIG, config, _SUPPORTED)
        output = config.get("hf_hook_point_out")
        if output not in (None, config.get("hf_hook_point_in")):
            rule = "must be hf_hook_point_in, a transcoder is not supported"
            refuse(path.parent / CONFIG, "hf_hook_point_out", output, rule)
    tensors = _Arrays(path) if path.name == FIRST else SavedTensors(path)
    try:
        transposed = (names["encoder"],)
        d, n = matrix_shape(path, tensors, names["encoder"])
        shapes = weight_shapes(names, n, d, transposed) | {"threshold": (n,)}
        check_tensors(path, tensors, shapes)
        layer = jumprelu_with(finite(path, tensors, "threshold"), path, "threshold")
        state = read_weights(path, tensors, names, transposed)
    finally:
        tensors.close()
    metadata: dict[str, Any] = {NAME: config} if config else {}
    for key, theirs in (("model_name", "model_name"), ("hf_hook_name", "hf_hook_point_in")):
        if value := entry(config, theirs, str, ""):
            metadata[key] = value
    return Checkpoint(layer, state, {"subtract_bias": False}, metadata)


class _Arrays(TensorsOfFile):
    """The arrays of an npz file; pickled ones are an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_plain(path)
        try:
            self._archive = zipfile.ZipFile(self._file)
            self._headers = {
                name.removesuffix(".npy"): self._header(name) for name in self._archive.namelist()
            }
        except BaseException as error:
            self._file.close()
            raise self._damage(error) from error

    def _damage(self, error: BaseException) -> BaseException:
        """Choose what to raise for an error of reading."""
        damage = (
            EOFError, LookupError, NotImplementedError, OverflowError, RuntimeError, SyntaxError,
            TypeError, ValueError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
        )  # fmt: skip
        if not isinstance(error, damage):
            return error
        return ValueError(
            f"{self._path}: the file must be an intact npz file of numbers: {shortened(error)}"
        )

    def _header(self, name: str) -> tuple[list[int], torch.dtype]:
        """Read shape and dtype of an array."""
        with self._archive.open(name) as member:
            version = np.lib.format.read_magic(member)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(member)
        return list(shape), torch.from_numpy(np.empty(0, dtype)).dtype

    def shape(self, name: str) -> list[int]:
        return self._headers[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._headers[name][1]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._headers:
            raise KeyError(name)
        try:
            with self._archive.open(f"{name}.npy") as member:
                return torch.from_numpy(np.lib.format.read_array(member, allow_pickle=False))
        except BaseException as error:
            raise self._damage(error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def close(self) -> None:
        self._file.close()
