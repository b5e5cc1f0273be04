"""Checks of the arguments of operations on a linear layer."""

from __future__ import annotations

import torch

from ..checks import (
    check_count,
    check_floating,
    check_range,
    check_same_device,
    check_weight_dtype,
    debug_checks,
)


def check_layer(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pre_bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    latents: torch.Tensor | None,
) -> None:
    """Check the tensors of a linear layer: dtypes, shapes, one device."""
    check_floating(op, "x", x)
    check_floating(op, "weight", weight)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must be [latents, {x.shape[-1]}] for x {list(x.shape)}, "
            f"got shape {list(weight.shape)}"
        )
    check_weight_dtype(op, x, weight, "x", "x's", "a 16-bit x")
    n, d = weight.shape
    for name, vector, size in (("bias", bias, n), ("pre_bias", pre_bias, d), ("scale", scale, n)):
        if vector is None:
            continue
        check_floating(op, name, vector)
        if vector.shape != (size,):
            raise ValueError(f"{op}: {name} must be [{size}], got {list(vector.shape)}")
        if vector.dtype != weight.dtype:
            raise TypeError(
                f"{op}: {name} must have weight's dtype {weight.dtype}, got {vector.dtype}"
            )
    if latents is not None:
        if not isinstance(latents, torch.Tensor):
            raise TypeError(f"{op}: latents must be a tensor, got {type(latents).__name__}")
        if latents.dtype != torch.int64 or latents.dim() != 1:
            raise ValueError(
                f"{op}: latents must be [M] int64, got {list(latents.shape)} of {latents.dtype}"
            )
    check_same_device(
        op, x=x, weight=weight, bias=bias, pre_bias=pre_bias, scale=scale, latents=latents
    )


def check_groups(op: str, groups: int, k: int, width: int, latents: torch.Tensor | None) -> int:
    """Return a number of groups as an int; check that it divides k and the width."""
    if groups == 1:
        return 1
    groups = check_count(op, "groups", groups, k, "k")
    if k % groups or width % groups:
        raise ValueError(
            f"{op}: groups must divide k = {k} and the number of latents {width}, got {groups}"
        )
    if latents is not None:
        raise ValueError(f"{op}: groups must be 1 when latents is given, got {groups}")
    return groups


def check_latents(latents: torch.Tensor | None, n: int) -> None:
    """Check that latents ascend and lie in 0..n-1: on the CPU, elsewhere only in debug mode."""
    if latents is None or (latents.device.type != "cpu" and not debug_checks()):
        return
    check_range("linear_topk", latents, n, "latents")
    if bool((latents.diff() <= 0).any()):
        i = int((latents.diff() <= 0).to(torch.uint8).argmax())
        raise ValueError(
            f"linear_topk: latents must ascend, each once, got {latents[i]} before {latents[i + 1]}"
        )
