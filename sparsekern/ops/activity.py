"""How often each latent fired.

Definition: counts[i] = number of codes (b, j) with indices[b, j] = i, and, where values are given,
values[b, j] != 0. Integers, so the order of counting does not matter, and there is no gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dispatch import library
from .checks import check_codes, check_count, check_range, check_size


def count_active(indices: torch.Tensor, n: int, values: torch.Tensor | None = None) -> torch.Tensor:
    """Return how often each of n latents fired in a batch of codes.

    Equivalent PyTorch: ``torch.bincount(indices[values != 0], minlength=n)``, without its host
    synchronisation.

    Args:
        indices: [...] int64 or int32, in 0..n-1.
        n: number of latents, at least 1.
        values: [...] floating point, same shape; a code whose value is zero (after ReLU, say) does
            not count.

    Returns:
        counts [n] int64, not differentiable.

    Raises:
        TypeError: indices are not integers, values not floating point, n not an integer.
        ValueError: shapes or devices differ, or n < 1.
        IndexError: an index outside 0..n-1 (on the CPU; on other devices only with
            SPARSEKERN_DEBUG=1, and such codes are left out of the counts otherwise).

    Example:
        >>> import torch, sparsekern
        >>> sparsekern.count_active(torch.tensor([[0, 2], [2, 1]]), 4).tolist()
        [1, 1, 2, 0]
    """
    check_codes("count_active", values, indices)
    n = check_count("count_active", "n", n, 2**31 - 1, "the number of latents")
    return _count_active(indices, n, values)


def counts_reference(
    indices: torch.Tensor, n: int, values: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition, for indices already known to lie in 0..n-1."""
    fired = torch.ones_like(indices) if values is None else (values != 0).to(indices.dtype)
    counts = indices.new_zeros(n, dtype=torch.int64)
    return counts.scatter_add(0, indices.reshape(-1).long(), fired.reshape(-1).long())


def count_active_reference(
    indices: torch.Tensor, n: int, values: torch.Tensor | None
) -> torch.Tensor:
    check_range("count_active", indices, n)
    return counts_reference(indices, n, values)


def _fake(indices: torch.Tensor, n: int, values: torch.Tensor | None) -> torch.Tensor:
    return indices.new_empty(n, dtype=torch.int64)


def _check(indices: torch.Tensor, n: int, values: torch.Tensor | None = None) -> None:
    check_codes("count_active", values, indices)
    check_size("count_active", "n", n)


def _flat(backend: str) -> Any:
    """An implementation for any shape from a backend's function of contiguous vectors."""

    def run(indices: torch.Tensor, n: int, values: torch.Tensor | None) -> torch.Tensor:
        flat_values = None if values is None else values.reshape(-1).contiguous()
        return library.kernels(backend, "activity").count_active(
            indices.reshape(-1).contiguous(), n, flat_values
        )

    return run


def _triton(indices: torch.Tensor, n: int, values: torch.Tensor | None) -> torch.Tensor:
    check_range("count_active", indices, n)
    return _flat("triton")(indices, n, values)


def _vmap(info: Any, in_dims: Any, indices: Any, n: int, values: Any) -> Any:
    """Batch entry b counts into its own n latents: indices shifted by b*n, one call."""

    def front(tensor: torch.Tensor | None, dim: int | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if dim is None:
            return tensor.expand(info.batch_size, *tensor.shape)
        return tensor.movedim(dim, 0)

    indices, values = front(indices, in_dims[0]), front(values, in_dims[2])
    steps = torch.arange(info.batch_size, device=indices.device) * n
    shifted = indices + steps.view(-1, *[1] * (indices.dim() - 1))
    return _count_active(shifted, n * info.batch_size, values).view(-1, n), 0


_count_active = library.define(
    "count_active",
    "(Tensor indices, SymInt n, Tensor? values) -> Tensor",
    reference=count_active_reference,
    implementations={"native": _flat("native"), "triton": _triton},
    fake=_fake,
    check=_check,
    vmap=_vmap,
)
