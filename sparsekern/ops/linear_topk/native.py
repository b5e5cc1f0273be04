"""Calls of the native kernels of few rows, for the CPU, and that screen latents, also for CUDA."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...dispatch.launch import keyword_kernel, launch, matrix, module_for, pointer
from ..gather_dot.native import dots_of_listed
from ..transpose_codes.native import transpose_codes
from .candidates import Candidates, ErrorBound
from .rounded import Rounded
from .slices import Layer


def few_rows_kernel(x: torch.Tensor) -> Callable[..., None] | None:
    """Return the kernel for `few_rows`; None where the module of x's device has none."""
    return keyword_kernel("linear_topk", x)


def few_rows(
    kernel: Callable[..., None],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    k: int,
    sorted: bool,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and indices int64 [..., k] of the k largest scores of few rows.

    Each score's products are added in the order of `gather_dot`, wherever row and latent stand.

    Args:
        kernel: of `few_rows_kernel`.
        x: [rows, d] or contiguous [..., d], float32.
        weight: [n, d] float32, column stride 1.
        bias: [n] float32, contiguous, or None.
        scale: [n] float32, contiguous, or None.
        k: 1..n.
        sorted: the largest first; else by ascending index.
        relu: selected values <= 0 become 0.
    """
    shape = x.shape
    # a tuple takes longer to read
    values = x.new_empty(shape[0], k) if len(shape) == 2 else x.new_empty(*shape[:-1], k)
    indices = torch.empty_like(values, dtype=torch.int64)
    kernel(
        torch.get_num_threads(),
        x=matrix(x),
        weight=matrix(weight),
        bias=0 if bias is None else bias.data_ptr(),
        scale=0 if scale is None else scale.data_ptr(),
        k=k,
        sorted=sorted,
        relu=relu,
        values=values.data_ptr(),
        indices=indices.data_ptr(),
    )
    return values, indices


def round_rows(rows: torch.Tensor, rounded: torch.Tensor) -> Rounded:
    """Round float32 rows [n, d], one of whose strides is 1, into bfloat16 ones of the same order.

    rounded: [n, d], the stride of its rows n if that of `rows` is 1, without gaps.
    """
    lengths, errors = rows.new_empty(2, len(rows)).unbind()
    launch(
        "round_rows",
        rows,
        x=matrix(rows),
        rounded=rounded.data_ptr(),
        lengths=lengths.data_ptr(),
        errors=errors.data_ptr(),
    )
    return Rounded(rounded, lengths, errors)


def screen_scores(
    candidates: Candidates,
    scores: torch.Tensor,
    first: int,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    bound: ErrorBound,
    last: bool,
) -> None:
    """Bring the candidates of each row up to date with the scores of the next latents.

    Args:
        candidates: of all slices before; written.
        scores: [rows, width] bfloat16 or float32, without bias and scale.
        first: latent of the first column.
        bias: [width] float32, or None.
        scale: [width] float32, or None.
        bound: of the errors of the scores.
        last: there are no others.
    """
    launch(
        "screen_scores",
        scores,
        scores=matrix(scores),
        first=first,
        k=candidates.k,
        bias=pointer(bias),
        scale=pointer(scale),
        x_errors=bound.x_errors.data_ptr(),
        x_lengths=bound.x_lengths.data_ptr(),
        lengths=bound.lengths.data_ptr(),
        errors=bound.errors.data_ptr(),
        score_error=bound.of_score,
        bias_error=bound.of_bias,
        least_error=bound.least,
        last=last,
        capacity=candidates.capacity,
        latents=candidates.latents.data_ptr(),
        lower=candidates.lower.data_ptr(),
        upper=candidates.upper.data_ptr(),
        counts=candidates.counts.data_ptr(),
        thresholds=candidates.thresholds.data_ptr(),
    )


def score_candidates(
    layer: Layer, rows: torch.Tensor, latents: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Return the float32 scores [rows, columns] of some latents of each row, -inf elsewhere.

    Each dot product is added in the same order, wherever its latent stands.

    Args:
        layer: its weight is float32.
        rows: [rows, d] float32.
        latents: [rows, columns] int32, whose columns have stride 1.
        counts: [rows] int32, how many of them count: the first ones.
    """
    if not hasattr(module_for(rows), "score_candidates"):
        return _score_by_latent(layer, rows, latents, counts)
    scores = rows.new_empty(latents.shape)
    launch(
        "score_candidates",
        rows,
        x=matrix(rows),
        weight=matrix(layer.weight),
        bias=pointer(None if layer.bias is None else layer.bias.contiguous()),
        scale=pointer(None if layer.scale is None else layer.scale.contiguous()),
        latents=latents.data_ptr(),
        counts=counts.data_ptr(),
        capacity=latents.stride(0),
        columns=latents.shape[1],
        scores=scores.data_ptr(),
    )
    return scores


def _score_by_latent(
    layer: Layer, rows: torch.Tensor, latents: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Score latent by latent, whose row of the weight is then read once for all rows of x."""
    listed = torch.arange(latents.shape[1]) < counts.unsqueeze(1)
    chosen = latents.masked_fill(~listed, 0)
    places = listed.view(-1).nonzero().squeeze(1).to(torch.int32)
    offsets, order = transpose_codes(chosen[listed], len(layer.weight), "linear_topk")
    scores = dots_of_listed(rows, layer.weight, chosen, offsets, places[order])
    if layer.bias is not None:
        scores.add_(layer.bias[chosen])
    if layer.scale is not None:
        scores.mul_(layer.scale[chosen])
    return scores.masked_fill_(~listed, -torch.inf)
