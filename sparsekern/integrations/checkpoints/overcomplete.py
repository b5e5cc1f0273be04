"""Overcomplete 0.3: a state_dict in one torch file.

    scores         = x @ encoder.final_block.0.weight.T + encoder.final_block.0.bias
    codes          = relu(scores), of which ``TopKSAE`` keeps the k largest, and ``JumpSAE`` those
                     of at least exp(thresholds)
    reconstruction = codes @ dictionary

``dictionary._weights`` [N, D] and the encoder [N, D] are laid out as ours are. The library divides
the dictionary's rows by their norms when it evaluates, and multiplies them by
exp(``dictionary.multiplier``). So does reading; rows of norm 1 stay bit for bit. There is no bias
of the decoder. ``thresholds`` [N] of ``JumpSAE`` are logarithms; of other classes the file says
neither which it is nor k.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...nn import BatchTopK, JumpReLU, TopK
from .contents import Checkpoint, Unstated, WriteFile, check_flags
from .torch_files import is_torch_file, open_torch_file, tensors_of, torch_file
from .weights import (
    check_tensors,
    finite,
    jumprelu_with_logarithms,
    matrix_shape,
    read_weights,
    weight_shapes,
)

NAME = "overcomplete"
TENSORS = "sae.pt"
_DICTIONARY = "dictionary._weights"
_MULTIPLIER = "dictionary.multiplier"
_THRESHOLDS = "thresholds"
_NAMES = {
    "encoder": "encoder.final_block.0.weight", "encoder_bias": "encoder.final_block.0.bias",
    "dictionary": _DICTIONARY,
}  # fmt: skip
# Rounding of a norm; the library's division changes rows of such norms by no more.
_ROUNDING = 1e-6


def recognises(path: Path) -> bool:
    """Tell whether this is a torch file with such a dictionary, or a folder with ours."""
    if is_torch_file(path):
        return _DICTIONARY in open_torch_file(path)
    return (path / TENSORS).exists()


def read(path: Path) -> Checkpoint:
    """Read the file, or that of the folder."""
    path = path / TENSORS if path.is_dir() else path
    tensors = tensors_of(path, open_torch_file(path))
    n, d = matrix_shape(path, tensors, _DICTIONARY)
    shapes = weight_shapes(_NAMES, n, d) | {_MULTIPLIER: ()}
    layer: nn.Module = Unstated()
    if _THRESHOLDS in tensors:
        shapes[_THRESHOLDS] = (n,)
    check_tensors(path, tensors, shapes)
    if _THRESHOLDS in tensors:
        layer = jumprelu_with_logarithms(tensors[_THRESHOLDS].clone(), path, _THRESHOLDS)
    state = read_weights(path, tensors, _NAMES)
    state["dictionary"] = _as_evaluated(state["dictionary"], finite(path, tensors, _MULTIPLIER))
    state["decoder_bias"] = state["dictionary"].new_zeros(d)
    return Checkpoint(layer, state, {"subtract_bias": False})


def _as_evaluated(dictionary: Tensor, multiplier: Tensor) -> Tensor:
    """Give rows the norm 1 as the library does, in place, and multiply them."""
    norms = dictionary.norm(dim=1, keepdim=True)
    dictionary.div_(torch.where((norms - 1).abs() > _ROUNDING, norms + 1e-8, 1))
    return dictionary.mul_(multiplier.exp())


def files(checkpoint: Checkpoint) -> dict[str, WriteFile]:
    """Make the file.

    Raises:
        ValueError: TopK in groups, BatchTopK (whose threshold the library does not save), a decoder
            bias, rows of the dictionary whose norm is not 1, or options that the format lacks.
    """
    layer, dictionary = checkpoint.activation, checkpoint.tensors["dictionary"]
    if isinstance(layer, BatchTopK) or (isinstance(layer, TopK) and layer.groups != 1):
        raise ValueError(
            f"{NAME}: activation must be TopK without groups, JumpReLU or ReLU, got {layer}"
        )
    check_flags(
        checkpoint, NAME, {"scale_scores": False, "normalize_rows": False, "subtract_bias": False}
    )
    if bool(checkpoint.tensors["decoder_bias"].any()):
        raise ValueError(f"{NAME}: decoder_bias must be 0, the format has none")
    error = float((dictionary.norm(dim=1) - 1).abs().max())
    if error > _ROUNDING:
        raise ValueError(
            f"{NAME}: rows of the dictionary must have norm 1, which the library gives them, "
            f"got one that is {error:.2g} off"
        )
    tensors = {
        "encoder.final_block.0.weight": checkpoint.encoder,
        "encoder.final_block.0.bias": checkpoint.tensors["encoder_bias"],
        _DICTIONARY: dictionary,
        _MULTIPLIER: dictionary.new_zeros(()),
    }
    if isinstance(layer, JumpReLU):
        tensors = {_THRESHOLDS: layer.log_threshold.to(dictionary.dtype), **tensors}
    return {TENSORS: torch_file(tensors)}
