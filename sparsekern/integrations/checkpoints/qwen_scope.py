"""Qwen-Scope (2026, arXiv 2605.11887): one torch file a layer, which is read, not written.

    scores         = x @ W_enc.T + b_enc
    codes          = the k largest of relu(scores)
    reconstruction = codes @ W_dec.T + b_dec

``W_enc`` [N, D] is laid out as ours is; ``W_dec`` [D, N] is the transpose of our dictionary, which
reading copies once, so that no step does. k is not in the file: it is the number after ``L0_`` in
the name of its repository.
"""

from __future__ import annotations

from pathlib import Path

from .contents import Checkpoint, Unstated
from .torch_files import is_torch_file, open_torch_file, tensors_of
from .weights import check_tensors, matrix_shape, read_weights, weight_shapes

NAME = "qwen_scope"
_NAMES = {
    "encoder": "W_enc", "encoder_bias": "b_enc", "dictionary": "W_dec", "decoder_bias": "b_dec",
}  # fmt: skip
_TRANSPOSED = ("W_dec",)


def recognises(path: Path) -> bool:
    """Tell whether this is a torch file with such an encoder."""
    return is_torch_file(path) and "W_enc" in open_torch_file(path)


def read(path: Path) -> Checkpoint:
    """Read the file."""
    tensors = tensors_of(path, open_torch_file(path))
    n, d = matrix_shape(path, tensors, "W_enc")
    check_tensors(path, tensors, weight_shapes(_NAMES, n, d, _TRANSPOSED))
    state = read_weights(path, tensors, _NAMES, _TRANSPOSED)
    return Checkpoint(Unstated(), state, {"subtract_bias": False})
