"""Codes grouped by latent: what every gradient of a dictionary needs.

Definition: positions = the flat positions of the codes, ordered by index and then by position;
offsets[i] = how many codes have an index below i. Integers, so there is no gradient.

Built when it is needed, or once for all the products of a training step that share their indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import _library
from .batching import one_by_one
from .checks import check_codes, check_count, check_range, check_same_device


class Transposition(NamedTuple):
    """Codes grouped by latent: positions[offsets[i] : offsets[i + 1]] are the flat positions of the
    codes with index i, ascending. offsets int64 [N + 1], positions int32 [codes]."""

    offsets: torch.Tensor
    positions: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """How often each latent is selected: int64 [N]."""
        return self.offsets.diff()


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
    return Transposition(*_transpose_codes(indices, n))


def check_transposition(
    op: str, transposition: Transposition | None, indices: torch.Tensor, n: int
) -> None:
    """The sizes of a transposition of these indices; what it holds is trusted."""
    if transposition is None:
        return
    sizes = [list(tensor.shape) for tensor in transposition]
    if sizes != [[n + 1], [indices.numel()]]:
        raise ValueError(
            f"{op}: transposition must come from transpose_codes(indices, {n}), so have sizes "
            f"[{n + 1}] and [{indices.numel()}], got {sizes[0]} and {sizes[1]}"
        )
    check_same_device(op, indices=indices, transposition=transposition.offsets)


def transpose_codes_reference(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_range("transpose_codes", indices, n)
    latents, positions = indices.reshape(-1).sort(stable=True)
    bounds = torch.arange(n + 1, dtype=latents.dtype, device=indices.device)
    return torch.searchsorted(latents, bounds), positions.to(torch.int32)


def _transpose_fake(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = indices.new_empty(n + 1, dtype=torch.int64)
    return offsets, indices.new_empty(indices.numel(), dtype=torch.int32)


def _transpose_vector(backend: str) -> Any:
    def run(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        if backend != "native" or indices.device.type != "cpu":
            check_range("transpose_codes", indices, n)
        kernels = _library.kernels(backend, "sparse_matmul")
        return kernels.transpose_codes(indices.reshape(-1).contiguous(), n)

    return run


_transpose_codes: Callable[..., Any] = _library.define(
    "transpose_codes",
    "(Tensor indices, SymInt n) -> (Tensor offsets, Tensor positions)",
    reference=transpose_codes_reference,
    implementations={
        "native": _transpose_vector("native"),
        "triton": _transpose_vector("triton"),
    },
    fake=_transpose_fake,
    vmap=one_by_one(lambda: _transpose_codes),
)
