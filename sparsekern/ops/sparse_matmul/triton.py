"""Sparse codes times a dense dictionary, and its gradients.

Forward: one program owns one row of codes and BLOCK columns of the output. It walks over the k
codes in order, UNROLL dictionary rows in flight, 16 bytes a thread where the dictionary is
row-major. Programs of one block of columns run next to each other, so that the dictionary's
columns in use stay in the L2 cache. Bound by these gathers.

Backward: the codes are transposed by a stable sort of their indices, so that each latent has the
list of its entries, ascending. One program owns one latent and BLOCK columns: it reads that part
of the dictionary row once, walks over the entries, gathers their upstream gradients, and writes
its part of the latent's gradient (zeros for a silent latent) and of the entries' dot products.
Where BLOCK covers only part of the columns, the parts of a dot product are added in a fixed order
by a second step. Bound by the gathers of the upstream gradient, whose columns in use stay in L2.

No atomics: every sum has one definite order. Indices outside 0..n-1 contribute nothing and are
never followed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...dispatch.launch import device_of
from ..block_sizes import cdiv, next_power_of_two
from ..layout import rows_to_gather
from ..transpose_codes.triton import transpose_codes

# Bytes one thread reads at once, the widest load there is.
LOAD_BYTES = 16
# Columns of a forward program: of a dictionary of 65536 rows in bfloat16, 512 columns are 64 MB,
# about an L2 cache.
FORWARD_COLUMNS = 512
# Columns of a backward program, all held by one warp, so that a dot product needs no barrier: 16 a
# thread.
BACKWARD_COLUMNS = 512
# Independent gathers in flight per thread.
UNROLL = 4


@triton.jit
def forward_kernel(
    values,  # [rows, k]
    indices,  # [rows, k]
    weight,  # [n, d]
    bias,  # [d], when HAS_BIAS
    out,  # [rows, d]
    n,
    d,
    k,
    weight_stride_n,
    weight_stride_d,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write out[b, :] = sum_j values[b, j] * weight[indices[b, j], :] + bias.

    Sums run in float32 over ascending j.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    offsets = columns.to(tl.int64) * weight_stride_d
    indices += row * k
    values += row * k

    total = tl.zeros([BLOCK], tl.float32)
    begin = tl.full([], 0, tl.int32)
    while begin < k:
        for step in tl.static_range(UNROLL):
            j = begin + step
            latent = tl.load(indices + j, mask=j < k, other=-1).to(tl.int64)
            valid = (latent >= 0) & (latent < n)
            value = tl.load(values + j, mask=valid, other=0.0).to(tl.float32)
            address = weight + latent * weight_stride_n + offsets
            atom = tl.load(address, mask=columns < tl.where(valid, d, 0), other=0.0).to(tl.float32)
            total += value * atom
        begin += UNROLL

    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * d + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad,  # [rows, d]
    values,  # [rows, k]
    weight,  # [n, d]
    offsets,  # [n + 1]: where each latent's entries begin
    entries,  # [rows * k]: flat positions of the codes, grouped by latent, ascending inside
    dots,  # [parts, rows * k], when NEED_VALUES
    grad_weight,  # [n, d] with weight's strides, when NEED_WEIGHT
    total,
    d,
    k,
    weight_stride_n,
    weight_stride_d,
    grad_weight_stride_n,
    grad_weight_stride_d,
    NEED_VALUES: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Write the gradients of one latent i, whose entries are e = (b, j) with indices[b, j] = i.

    dots[part, e]     = sum over this part's columns of grad[b, :] * weight[i, :]
    grad_weight[i, :] = sum_e values[e] * grad[b, :], in float32, e ascending
    """
    latent = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    begin = tl.load(offsets + latent)
    end = tl.load(offsets + latent + 1)

    if NEED_VALUES:
        address = weight + latent * weight_stride_n + columns.to(tl.int64) * weight_stride_d
        used = columns < tl.where(begin < end, d, 0)
        atom = tl.load(address, mask=used, other=0.0).to(tl.float32)
        dots += part.to(tl.int64) * total
    summed = tl.zeros([BLOCK], tl.float32)
    while begin < end:
        for step in tl.static_range(UNROLL):
            there = begin + step < end
            entry = tl.load(entries + begin + step, mask=there, other=0).to(tl.int64)
            part_of_row = grad + entry // k * d + columns
            used = columns < tl.where(there, d, 0)
            upstream = tl.load(part_of_row, mask=used, other=0.0).to(tl.float32)
            if NEED_WEIGHT:
                value = tl.load(values + entry, mask=there, other=0.0).to(tl.float32)
                summed += value * upstream
            if NEED_VALUES:
                dot = tl.sum(upstream * atom, axis=0)
                tl.store(dots + entry, dot.to(dots.dtype.element_ty), mask=there)
        begin += UNROLL

    if NEED_WEIGHT:
        grad_weight += latent * grad_weight_stride_n
        address = grad_weight + columns.to(tl.int64) * grad_weight_stride_d
        tl.store(address, summed.to(grad_weight.dtype.element_ty), mask=inside)


def forward_block(d: int, element_bytes: int) -> tuple[int, int]:
    """Return columns and warps of one forward program: 16 bytes of a dictionary row a thread."""
    columns = min(FORWARD_COLUMNS, max(32, next_power_of_two(d)))
    return columns, max(1, columns * element_bytes // (LOAD_BYTES * 32))


def backward_block(d: int) -> int:
    """Return the number of columns of one backward program."""
    return min(BACKWARD_COLUMNS, max(32, next_power_of_two(d)))


def sparse_matmul(
    values: torch.Tensor, indices: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return out [rows, d] of codes [rows, k].

    weight is [n, d], row- or column-major, bias [d] or None.
    """
    rows, k = values.shape
    n, d = weight.shape
    out = torch.empty(rows, d, dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    weight = rows_to_gather(weight, values.numel())
    columns, warps = forward_block(d, weight.element_size())
    with device_of(values):
        forward_kernel[(rows, cdiv(d, columns))](
            values,
            indices,
            weight,
            weight if bias is None else bias,
            out,
            n,
            d,
            k,
            *weight.stride(),
            HAS_BIAS=bias is not None,
            BLOCK=columns,
            UNROLL=UNROLL,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return out


def sparse_matmul_backward(
    grad: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    weight: torch.Tensor,
    need_values: bool,
    need_weight: bool,
    offsets: torch.Tensor | None = None,
    entries: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of values [rows, k] and of weight [n, d], in weight's layout.

    One that is not needed is [0]. offsets and entries are the transposition of the indices, if it
    is known.
    """
    rows, k = values.shape
    n, d = weight.shape
    grad_values, grad_weight = values.new_empty(0), weight.new_empty(0)
    columns = backward_block(d)
    parts = cdiv(d, columns)
    if need_values:  # zeros, for the entries whose index is out of range
        dtype = values.dtype if parts == 1 else torch.float32
        dots = torch.zeros(parts, rows, k, dtype=dtype, device=values.device)
    if need_weight:
        row_major = weight.stride(1) == 1
        grad_weight = weight.new_empty(n, d) if row_major else weight.new_empty(d, n).t()
    if n * d * (need_values or need_weight) == 0:
        return (values.new_zeros(rows, k) if need_values else grad_values), grad_weight

    if offsets is None or entries is None:
        offsets, entries = transpose_codes(indices, n)
    with device_of(values):
        backward_kernel[(n, parts)](
            grad,
            values,
            weight,
            offsets,
            entries,
            dots if need_values else grad,
            grad_weight if need_weight else grad,
            rows * k,
            d,
            k,
            *weight.stride(),
            *(grad_weight.stride() if need_weight else (0, 0)),
            NEED_VALUES=need_values,
            NEED_WEIGHT=need_weight,
            BLOCK=columns,
            UNROLL=UNROLL,
            num_warps=1,
            enable_fp_fusion=True,
        )
    if need_values:
        grad_values = dots[0] if parts == 1 else dots.sum(0).to(values.dtype)
    return grad_values, grad_weight
