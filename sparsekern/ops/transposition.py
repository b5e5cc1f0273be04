"""Codes grouped by latent: what every gradient of a dictionary needs.

Definition: positions = the flat positions of the codes, ordered by index and then by position;
offsets[i] = how many codes have an index below i. Integers, so there is no gradient.

Built when it is needed, or once for all the products of a training step that share their indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..dispatch import library
from .batching import one_by_one
from .checks import (
    check_codes,
    check_count,
    check_range,
    check_same_device,
    check_size,
    debug_checks,
)
from .exported import exported


@exported("sparsekern.ops.transposition.Transposition")
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
    """The dtypes, sizes and devices of a transposition of these indices. What it holds is checked
    where it is used, since it may change until then."""
    if transposition is None:
        return
    if not isinstance(transposition, tuple) or len(transposition) != 2:
        raise TypeError(
            f"{op}: transposition must be a Transposition, got {type(transposition).__name__}"
        )
    check_grouping(op, *transposition, indices, n)


def check_grouping(
    op: str, offsets: torch.Tensor, positions: torch.Tensor, indices: torch.Tensor, n: int
) -> None:
    """offsets int64 [n + 1] and positions int32 [codes], on the device of the indices."""
    for name, tensor, dtype, size in (
        ("offsets", offsets, torch.int64, n + 1),
        ("positions", positions, torch.int32, indices.numel()),
    ):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{op}: transposition.{name} must be a tensor, got {type(tensor).__name__}"
            )
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: transposition.{name} must be {dtype}, got {tensor.dtype}")
        if tensor.dim() != 1 or tensor.shape[0] != size:
            raise ValueError(
                f"{op}: transposition must come from transpose_codes(indices, {n}), so its {name} "
                f"have size [{size}], got {list(tensor.shape)}"
            )
    parts = {"transposition.offsets": offsets, "transposition.positions": positions}
    check_same_device(op, indices=indices, **parts)


def not_grouped(op: str) -> ValueError:
    """The error for a transposition of other indices."""
    return ValueError(
        f"{op}: transposition must be transpose_codes(indices, n) of these very indices, got one "
        "that does not group them by latent (were they, or it, changed since?)"
    )


def check_grouped(
    op: str, offsets: torch.Tensor, positions: torch.Tensor, indices: torch.Tensor, n: int
) -> None:
    """That they are the transposition of the indices: always on the CPU; on other devices, where it
    synchronises, only in debug mode."""
    if indices.device.type != "cpu" and not debug_checks():
        return
    right = transpose_codes_reference(indices, n)
    if not (torch.equal(offsets, right[0]) and torch.equal(positions, right[1])):
        raise not_grouped(op)


def transpose_codes_reference(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_range("transpose_codes", indices, n)
    latents, positions = indices.reshape(-1).sort(stable=True)
    bounds = torch.arange(n + 1, dtype=latents.dtype, device=indices.device)
    return torch.searchsorted(latents, bounds), positions.to(torch.int32)


def _transpose_fake(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = indices.new_empty(n + 1, dtype=torch.int64)
    return offsets, indices.new_empty(indices.numel(), dtype=torch.int32)


def _check(indices: torch.Tensor, n: int) -> None:
    check_codes("transpose_codes", None, indices)
    check_size("transpose_codes", "n", n)


def _transpose_vector(backend: str) -> Any:
    def run(indices: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        if backend != "native" or indices.device.type != "cpu":
            check_range("transpose_codes", indices, n)
        kernels = library.kernels(backend, "sparse_matmul")
        return kernels.transpose_codes(indices.reshape(-1).contiguous(), n)

    return run


_transpose_codes: Callable[..., Any] = library.define(
    "transpose_codes",
    "(Tensor indices, SymInt n) -> (Tensor offsets, Tensor positions)",
    reference=transpose_codes_reference,
    implementations={
        "native": _transpose_vector("native"),
        "triton": _transpose_vector("triton"),
    },
    fake=_transpose_fake,
    check=_check,
    vmap=one_by_one(lambda: _transpose_codes),
)
