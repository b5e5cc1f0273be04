"""Codes grouped by latent, as every gradient of a dictionary needs them.

Definition: positions = the flat positions of the codes, ordered by index and then by position;
offsets[i] = how many codes have an index below i. Integers, so there is no gradient.

Built when it is needed, or once for all the products of a training step that share their indices.
"""

from __future__ import annotations

import torch

from ..checks import check_codes, check_count
from ..codes import Transposition
from . import operation

__all__ = ["Transposition", "transpose_codes"]


def transpose_codes(indices: torch.Tensor, n: int) -> Transposition:
    """Group codes by latent, by a stable counting sort.

    Equivalent PyTorch::

        latents, positions = indices.flatten().sort(stable=True)
        offsets = torch.searchsorted(latents, torch.arange(n + 1))

    Args:
        indices: [...] int64 or int32, in 0..n-1, fewer than 2^31.
        n: number of latents.

    Returns:
        Transposition(offsets int64 [n + 1], positions int32 [codes]), not differentiable, to be
        given to every `sparse_matmul` that takes these very indices. Its `counts` are the firing
        counts of codes without zeros.

    Raises:
        TypeError: indices are not integers, or n is not one.
        ValueError: 2^31 codes or more.
        IndexError: an index outside 0..n-1 (on the CPU; on other devices only with
            SPARSEKERN_DEBUG=1, and such codes are left out otherwise).

    Example:
        >>> import torch, sparsekern
        >>> sparsekern.transpose_codes(torch.tensor([[0, 2], [2, 1]]), 4).positions.tolist()
        [0, 3, 1, 2]
    """
    check_codes("transpose_codes", None, indices)
    n = check_count("transpose_codes", "n", n, 2**31 - 1, "the number of latents")
    if indices.numel() >= 2**31:
        raise ValueError(
            "transpose_codes: indices must hold fewer than 2^31 codes, "
            f"got {indices.numel()}; split the batch"
        )
    return Transposition(*operation.transpose_codes(indices, n))
