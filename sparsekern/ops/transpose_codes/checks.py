"""Checks of a transposition that a caller hands over."""

from __future__ import annotations

import torch

from ..checks import check_same_device, debug_checks
from ..codes import Transposition
from .reference import transpose_codes_reference


def check_transposition(
    op: str, transposition: Transposition | None, indices: torch.Tensor, n: int
) -> None:
    """Check dtypes, sizes and devices of a transposition of these indices.

    Its contents are checked where it is used, since they may change until then.
    """
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
    """Check offsets int64 [n + 1] and positions int32 [codes], on the device of the indices."""
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
    named = {"transposition.offsets": offsets, "transposition.positions": positions}
    check_same_device(op, indices=indices, **named)


def not_grouped(op: str) -> ValueError:
    """Return the error for a transposition of other indices."""
    return ValueError(
        f"{op}: transposition must be transpose_codes(indices, n) of these very indices, got one "
        "that does not group them by latent (were they, or it, changed since?)"
    )


def usable_grouping(
    op: str,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    indices: torch.Tensor,
    n: int,
    *,
    kernel_checks: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return offsets and positions as kernels take them: checked as far as they are, contiguous.

    kernel_checks: the kernel itself finds a transposition of other indices.
    """
    check_grouping(op, offsets, positions, indices, n)
    if not kernel_checks:
        check_grouped(op, offsets, positions, indices, n)
    if not indices.is_cpu:  # not checked, but no address may lie outside the codes
        codes = indices.numel()
        offsets, positions = offsets.clamp(0, codes), positions.clamp(0, codes - 1)
    return offsets.contiguous(), positions.contiguous()


def check_grouped(
    op: str, offsets: torch.Tensor, positions: torch.Tensor, indices: torch.Tensor, n: int
) -> None:
    """Check that offsets and positions are the transposition of the indices.

    On devices other than the CPU the check synchronises, so it is made in debug mode only.
    """
    if indices.device.type != "cpu" and not debug_checks():
        return
    correct = transpose_codes_reference(indices, n)
    if not (torch.equal(offsets, correct[0]) and torch.equal(positions, correct[1])):
        raise not_grouped(op)
