"""The Triton kernels that screen latents by scores known up to an error (see screen.py).

`round_kernel`: one program owns ROWS rows and walks them COLUMNS at a time; its tile is long in the
direction of the matrix's memory. Bound by memory: six bytes an element.

`maxima_kernel`: one program owns ROWS rows and BLOCK scores of each, whose lengths, errors and bias
it reads once for all of them, and writes the largest lower bound of each SPAN neighbours. The k-th
largest of these maxima and of the k largest of all slices before is the row's threshold: k latents
have exact scores that reach it. Bound by the one read of the scores.

`append_kernel`: one program owns a row. It drops the candidates whose upper bound lies below the
new threshold, and appends what reaches it of the slice's scores, BLOCK at a time. So the list never
holds more than the threshold of that moment lets through. Bound by the second read of the scores,
and by one prefix sum a block.

`score_kernel`: one program owns a row and LISTED of its candidates, and walks their rows of the
weight BLOCK features at a time. The tile depends on nothing but the number of features, so every
dot product is added in one order. Bound by the gathers of these rows.

A comparison with NaN never drops a candidate and never raises a threshold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...dispatch.launch import device_of
from ..block_sizes import cdiv, next_power_of_two
from ..topk.triton import topk
from ..topk.triton_groups import number_of
from .candidates import Candidates, ErrorBound
from .rounded import Rounded
from .slices import Layer

# On no device has it been measured that screening by these kernels pays.
ONLY_IF_ASKED = True
WARPS = 4
# Elements that a program rounds at a time, 16 a thread, and the most of one row; rows and columns
# of a tile where columns are contiguous.
ROUND_TILE = 2048
ROUND_COLUMNS = 512
COLUMN_MAJOR_TILE = (64, 16)
# Rows and scores of a program that looks for maxima: 16 scores a thread.
MAXIMA_ROWS = 4
MAXIMA_BLOCK = 512
# Groups for each of the k, and scores of a group. Among so many groups hardly any has two of the k
# largest, so that their maxima prove nearly the threshold that all lower bounds would.
GROUPS_PER_CODE = 8
MOST_SPAN = 32
APPEND_BLOCK = 1024
# Products that a program of candidates adds at a time, 16 a thread, and features of each candidate.
SCORE_TILE = 2048
SCORE_FEATURES = 256
# |bias| beyond which its own rounding is bounded by this: -inf + inf would be NaN.
LARGEST_BIAS_ERROR = tl.constexpr(1e38)
ROUNDING = tl.constexpr(2.0**-23)
LOST_SQUARES = tl.constexpr(2.0**-125)
OF_LENGTH = tl.constexpr(1 + 2.0**-22)


@triton.jit
def rounded_bits(x):
    """Return the bits of float32 numbers rounded to bfloat16, in the lower half of an int32.

    Ties go to even, results below 2^-126 to zero. NaN stays NaN.
    """
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nearest = tl.where((nearest & 0x7F80) == 0, 0, nearest)
    return tl.where(x == x, nearest, (bits >> 16) | 0x40)


@triton.jit
def length_of(squares, d):
    """Return an upper bound of the length of d numbers, whose squares were added in any order.

    Relative error: d roundings of the sum, one of each square, one of the root; absolute error:
    squares below 2^-126 may be lost. A sum that is not a number bounds nothing.
    """
    n = tl.cast(d, tl.float64)
    square = squares.to(tl.float64) * ((n + 4) * ROUNDING + 1) + n * LOST_SQUARES
    bound = tl.sqrt(square) * OF_LENGTH
    return tl.where(bound == bound, bound, float("inf")).to(tl.float32)


@triton.jit
def round_kernel(
    x,  # [n, d], any strides
    rounded,  # [n, d] bits of bfloat16, any strides
    lengths,  # [n]
    errors,  # [n]
    n,
    d,
    x_stride_n,
    x_stride_d,
    rounded_stride_n,
    rounded_stride_d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write rounded = x in bfloat16, lengths[i] >= |x[i]|, errors[i] >= |x[i] - rounded[i]|."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < n
    from_row = x + (row * x_stride_n)[:, None]
    to_row = rounded + (row * rounded_stride_n)[:, None]
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    lost_squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = there[:, None] & (column < d)[None, :]
        column = column.to(tl.int64)
        number = tl.load(from_row + (column * x_stride_d)[None, :], mask=inside, other=0.0)
        bits = rounded_bits(number)
        lost = number - (bits << 16).to(tl.float32, bitcast=True)
        squares += number * number
        lost_squares += lost * lost
        places = to_row + (column * rounded_stride_d)[None, :]
        tl.store(places, bits.to(tl.int16), mask=inside)
    tl.store(lengths + row, length_of(tl.sum(squares, 1), d), mask=there)
    tl.store(errors + row, length_of(tl.sum(lost_squares, 1), d), mask=there)


@triton.jit
def bounds_of(
    score,
    bias,  # these four of the latents begin at the first of the slice
    scale,
    lengths,
    errors,
    column,
    inside,
    x_error,
    x_length,
    score_error,
    bias_error,
    least_error,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """Return a - r and a + r of scores; a has bias and scale, r bounds its error (`ErrorBound`).

    column and inside tell the latents, in one dimension; the bounds have the shape of `score`, and
    latents run along its last axis.
    """
    a = score
    r = x_error * tl.load(lengths + column, mask=inside, other=0.0) + least_error
    r = x_length * tl.load(errors + column, mask=inside, other=0.0) + r
    r = score_error * tl.abs(a) + r
    if HAS_BIAS:
        added = tl.load(bias + column, mask=inside, other=0.0)
        a += added
        r += tl.minimum(tl.abs(added) * bias_error, LARGEST_BIAS_ERROR)
    if HAS_SCALE:
        factor = tl.load(scale + column, mask=inside, other=0.0)
        a *= factor
        r = r * tl.abs(factor) + least_error
    return a - r, a + r


@triton.jit
def maxima_kernel(
    scores,  # [rows, width]; bfloat16 as its bits, which keeps the interpreter's subnormals
    bias,  # [width], when HAS_BIAS
    scale,  # [width], when HAS_SCALE
    lengths,  # [width]
    errors,  # [width]
    x_errors,  # [rows]
    x_lengths,  # [rows]
    maxima,  # [rows, groups]
    rows,
    width,
    groups,
    row_stride,
    maxima_stride,
    score_error,
    bias_error,
    least_error,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write to maxima[b, g] the largest lower bound of scores[b, g * SPAN : (g + 1) * SPAN].

    One that is not a number counts as -inf.
    """
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(0) % blocks * BLOCK
    column = begin + tl.arange(0, BLOCK)
    there, inside = row < rows, column < width
    known = there[:, None] & inside[None, :]
    elements = scores + (row * row_stride)[:, None] + column[None, :]
    lower, _ = bounds_of(
        number_of(tl.load(elements, mask=known, other=0)),
        bias, scale, lengths, errors, column, inside,
        tl.load(x_errors + row, mask=there, other=0.0)[:, None],
        tl.load(x_lengths + row, mask=there, other=0.0)[:, None],
        score_error, bias_error, least_error, HAS_BIAS, HAS_SCALE,
    )  # fmt: skip
    lower = tl.where(known & (lower == lower), lower, -float("inf"))
    best = tl.max(tl.reshape(lower, [ROWS, BLOCK // SPAN, SPAN]), 2)
    group = begin // SPAN + tl.arange(0, BLOCK // SPAN)
    places = maxima + (row * maxima_stride)[:, None] + group[None, :]
    tl.store(places, best, mask=there[:, None] & (group < groups)[None, :])


@triton.jit
def append_kernel(
    scores,  # [rows, width]; bfloat16 as its bits
    bias,  # [width], when HAS_BIAS
    scale,  # [width], when HAS_SCALE
    lengths,  # [width]
    errors,  # [width]
    x_errors,  # [rows]
    x_lengths,  # [rows]
    thresholds,  # [rows]
    latents,  # [rows, capacity], ascending; counts[b] of them are there
    upper,  # [rows, capacity]
    counts,  # [rows]; -1 where there were too many
    width,
    first,
    capacity,
    row_stride,
    score_error,
    bias_error,
    least_error,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keep what reaches the threshold of a row's candidates and of the latents from `first` on."""
    row = tl.program_id(0).to(tl.int64)
    threshold = tl.load(thresholds + row)
    found = tl.load(counts + row)
    latents += row * capacity
    upper += row * capacity
    lanes = tl.arange(0, BLOCK)

    count = tl.full([], 0, tl.int32)
    for begin in range(0, found, BLOCK):
        place = begin + lanes
        latent = tl.load(latents + place, mask=place < found, other=-1)
        bound = tl.load(upper + place, mask=place < found, other=0.0)
        # The prefix sum needs what every thread has read, and what is kept goes no further than
        # what was read: no thread reads what another one wrote. (Latents there are never negative.)
        keep = (latent >= 0) & ((bound < threshold) == 0)
        kept = tl.cumsum(keep.to(tl.int32), 0)
        tl.store(latents + count + kept - 1, latent, mask=keep)
        tl.store(upper + count + kept - 1, bound, mask=keep)
        count += tl.sum(keep.to(tl.int32), 0)

    scores += row * row_stride
    x_error, x_length = tl.load(x_errors + row), tl.load(x_lengths + row)
    for begin in range(0, tl.where(found < 0, 0, width), BLOCK):
        column = begin + lanes
        inside = column < width
        _, bound = bounds_of(
            number_of(tl.load(scores + column, mask=inside, other=0)),
            bias, scale, lengths, errors, column, inside, x_error, x_length,
            score_error, bias_error, least_error, HAS_BIAS, HAS_SCALE,
        )  # fmt: skip
        take = inside & ((bound < threshold) == 0)
        place = count + tl.cumsum(take.to(tl.int32), 0) - 1
        fits = take & (place < capacity)
        tl.store(latents + place, first + column, mask=fits)
        tl.store(upper + place, bound, mask=fits)
        count += tl.sum(take.to(tl.int32), 0)
    tl.store(counts + row, tl.where((found < 0) | (count > capacity), -1, count))


# Whether x begins at a multiple of 16 bytes must not change the order of additions.
@triton.jit(do_not_specialize_on_alignment=["x"])
def score_kernel(
    x,  # [rows, d]
    weight,  # [n, d], any strides
    bias,  # [n], when HAS_BIAS
    scale,  # [n], when HAS_SCALE
    latents,  # [rows, columns], rows `list_stride` apart
    counts,  # [rows]
    scores,  # [rows, columns]
    d,
    columns,
    list_stride,
    weight_stride_n,
    weight_stride_d,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write scores[b, j] = (x[b] . weight[i] + bias[i]) * scale[i] with i = latents[b, j].

    From j = counts[b] on it is -inf.
    """
    parts = tl.cdiv(columns, LISTED)
    row = (tl.program_id(0) // parts).to(tl.int64)
    begin = tl.program_id(0) % parts * LISTED
    place = begin + tl.arange(0, LISTED)
    count = tl.minimum(tl.load(counts + row), columns)
    valid = place < count
    latent = tl.load(latents + row * list_stride + place, mask=valid, other=0).to(tl.int64)
    rows_of_weight = weight + (latent * weight_stride_n)[:, None]
    sums = tl.zeros([LISTED, BLOCK], tl.float32)
    for first in range(0, tl.where(begin < count, d, 0), BLOCK):
        feature = first + tl.arange(0, BLOCK)
        inside = feature < d
        number = tl.load(x + row * d + feature, mask=inside, other=0.0)
        elements = rows_of_weight + (feature.to(tl.int64) * weight_stride_d)[None, :]
        factors = tl.load(elements, mask=valid[:, None] & inside[None, :], other=0.0)
        sums = tl.fma(factors, number[None, :], sums)
    score = tl.sum(sums, 1)
    if HAS_BIAS:
        score += tl.load(bias + latent, mask=valid, other=0.0)
    if HAS_SCALE:
        score *= tl.load(scale + latent, mask=valid, other=0.0)
    score = tl.where(valid, score, -float("inf"))
    tl.store(scores + row * columns + place, score, mask=place < columns)


def round_tile(d: int, row_major: bool) -> tuple[int, int]:
    """Return rows and columns of a tile of `round_kernel`."""
    if not row_major:
        return COLUMN_MAJOR_TILE
    columns = min(ROUND_COLUMNS, max(16, next_power_of_two(d)))
    return ROUND_TILE // columns, columns


def group_span(width: int, k: int) -> int:
    """Return the number of neighbours whose largest lower bound is looked for, a power of two."""
    span = min(MOST_SPAN, width // (GROUPS_PER_CODE * k))
    return 1 << (span.bit_length() - 1) if span > 1 else 1


def score_tile(d: int) -> tuple[int, int]:
    """Return candidates and features of a tile of `score_kernel`."""
    features = min(SCORE_FEATURES, max(16, next_power_of_two(d)))
    return SCORE_TILE // features, features


def round_rows(rows: torch.Tensor, rounded: torch.Tensor) -> Rounded:
    """Round float32 rows [n, d] into bfloat16 ones [n, d], both of any strides."""
    n, d = rows.shape
    lengths, errors = rows.new_empty(2, n).unbind()
    tile_rows, tile_columns = round_tile(d, rows.stride(1) == 1 or d == 1)
    with device_of(rows):
        round_kernel[(cdiv(n, tile_rows),)](
            rows,
            rounded.view(torch.int16),
            lengths,
            errors,
            n,
            d,
            *rows.stride(),
            *rounded.stride(),
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            num_warps=WARPS,
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
        scores: [rows, width] bfloat16 or float32, without bias and scale, rows contiguous.
        first: latent of the first column.
        bias: [width] float32, or None.
        scale: [width] float32, or None.
        bound: of the errors of the scores.
        last: there are no others; candidates are up to date after each slice.
    """
    rows, width = scores.shape
    read_as = torch.int16 if scores.dtype == torch.bfloat16 else scores.dtype
    slice_of_scores = (
        scores.view(read_as),
        bound.lengths if bias is None else bias,
        bound.lengths if scale is None else scale,
        bound.lengths,
        bound.errors,
        bound.x_errors,
        bound.x_lengths,
    )
    relative = (bound.of_score, bound.of_bias, bound.least)
    given = {"HAS_BIAS": bias is not None, "HAS_SCALE": scale is not None}

    k, before = candidates.k, candidates.best
    held = 0 if before is None else before.shape[1]
    span = group_span(width, k)
    groups = cdiv(width, span)
    reached = bound.lengths.new_empty(rows, held + groups)
    if before is not None:
        reached[:, :held] = before
    with device_of(scores):
        maxima_kernel[(cdiv(rows, MAXIMA_ROWS) * cdiv(width, MAXIMA_BLOCK),)](
            *slice_of_scores,
            reached[:, held:],
            rows,
            width,
            groups,
            scores.stride(0),
            reached.stride(0),
            *relative,
            **given,
            SPAN=span,
            ROWS=MAXIMA_ROWS,
            BLOCK=MAXIMA_BLOCK,
            num_warps=WARPS,
        )
        if held + groups > k:
            reached, _, _ = topk(reached, k, False, False, False, False)
        candidates.best = reached
        if reached.shape[1] == k:
            torch.amin(reached, 1, out=candidates.thresholds)
        append_kernel[(rows,)](
            *slice_of_scores,
            candidates.thresholds,
            candidates.latents,
            candidates.upper,
            candidates.counts,
            width,
            first,
            candidates.capacity,
            scores.stride(0),
            *relative,
            **given,
            BLOCK=APPEND_BLOCK,
            num_warps=WARPS,
        )


def score_candidates(
    layer: Layer, rows: torch.Tensor, latents: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Return the float32 scores [rows, columns] of some latents of each row, -inf elsewhere.

    Each dot product is added in the same order, wherever its latent stands.

    Args:
        layer: its weight is float32, of any strides.
        rows: [rows, d] float32, contiguous.
        latents: [rows, columns] int32, whose columns have stride 1.
        counts: [rows] int32, how many of them count: the first ones.
    """
    columns, d = latents.shape[1], rows.shape[1]
    scores = rows.new_empty(latents.shape)
    listed, features = score_tile(d)
    with device_of(rows):
        score_kernel[(len(rows) * cdiv(columns, listed),)](
            rows,
            layer.weight,
            layer.weight if layer.bias is None else layer.bias.contiguous(),
            layer.weight if layer.scale is None else layer.scale.contiguous(),
            latents,
            counts,
            scores,
            d,
            columns,
            latents.stride(0),
            *layer.weight.stride(),
            HAS_BIAS=layer.bias is not None,
            HAS_SCALE=layer.scale is not None,
            LISTED=listed,
            BLOCK=features,
            num_warps=WARPS,
        )
    return scores
