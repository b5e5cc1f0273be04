"""One step of Adam, and of Adam on rows of norm 1.

Rows of norm 1: one program owns one row and walks it three times, BLOCK columns at a time: for the
gradient's part along the row, for the step, and to divide by the new norm. The second and third
walk find the row in the cache. Other parameters: one program owns BLOCK elements. Both are bound by
memory: 28 bytes an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...dispatch.launch import device_of
from ..block_sizes import cdiv, next_power_of_two

BLOCK = 1024  # 8 elements a thread with 4 warps


@triton.jit
def moved(
    parameter, grad, mean, square, where, inside, x, along, step_size, new_mean, beta2, new_square,
    root_scale, eps, weight_decay,
):  # fmt: skip
    """Return x - step_size * mean / (sqrt(square) * root_scale + eps).

    The moments mean and square are updated first, with grad + (weight_decay - along) * x.
    """
    g = tl.load(grad + where, mask=inside, other=0.0) + (weight_decay - along) * x
    m = tl.load(mean + where, mask=inside, other=0.0)
    m = m + new_mean * (g - m)
    v = tl.load(square + where, mask=inside, other=0.0)
    v = beta2 * v + new_square * g * g
    tl.store(mean + where, m, mask=inside)
    tl.store(square + where, v, mask=inside)
    return x - step_size * m / (tl.sqrt(v) * root_scale + eps)


@triton.jit
def adam_step_kernel(
    parameter, grad, mean, square, count, step_size, new_mean, beta2, new_square,
    root_scale, eps, weight_decay, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set parameter[i] = moved(parameter[i])."""
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = where < count

    x = tl.load(parameter + where, mask=inside, other=0.0)
    x = moved(
        parameter, grad, mean, square, where, inside, x, 0.0, step_size, new_mean, beta2,
        new_square, root_scale, eps, weight_decay,
    )  # fmt: skip
    tl.store(parameter + where, x, mask=inside)


@triton.jit
def adam_unit_rows_kernel(
    parameter, grad, mean, square, d, step_size, new_mean, beta2, new_square,
    root_scale, eps, weight_decay, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set parameter[i] = normalized(moved(parameter[i])).

    The part of grad[i] along parameter[i] is subtracted first.
    """
    begin = tl.program_id(0).to(tl.int64) * d
    columns = tl.arange(0, BLOCK)

    lengths = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for first in range(0, d, BLOCK):
        inside = first + columns < d
        x = tl.load(parameter + begin + first + columns, mask=inside, other=0.0)
        lengths += x * x
        products += x * tl.load(grad + begin + first + columns, mask=inside, other=0.0)
    length = tl.sum(lengths, 0)
    along = tl.where(length > 0, tl.sum(products, 0) / tl.where(length > 0, length, 1.0), 0.0)

    lengths = tl.zeros([BLOCK], tl.float32)
    for first in range(0, d, BLOCK):
        inside = first + columns < d
        where = begin + first + columns
        x = tl.load(parameter + where, mask=inside, other=0.0)
        x = moved(
            parameter, grad, mean, square, where, inside, x, along, step_size, new_mean, beta2,
            new_square, root_scale, eps, weight_decay,
        )  # fmt: skip
        tl.store(parameter + where, x, mask=inside)
        lengths += tl.where(inside, x * x, 0.0)
    length = tl.sum(lengths, 0)
    scale = tl.where(length > 0, 1.0 / tl.sqrt(tl.where(length > 0, length, 1.0)), 1.0)

    for first in range(0, d, BLOCK):  # each thread reads what it wrote itself
        inside = first + columns < d
        where = begin + first + columns
        x = tl.load(parameter + where, mask=inside, other=0.0)
        tl.store(parameter + where, x * scale, mask=inside)


def adam_step(
    parameter: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    step_size: float,
    new_mean: float,
    beta2: float,
    new_square: float,
    root_scale: float,
    eps: float,
    weight_decay: float,
    unit_rows: bool,
) -> None:
    """Update contiguous float32 tensors of one shape ([rows, d] with unit_rows), all but grad."""
    tensors = (parameter, grad, mean, square)
    numbers = (step_size, new_mean, beta2, new_square, root_scale, eps, weight_decay)
    with device_of(parameter):
        if unit_rows:
            rows, d = parameter.shape
            block = min(BLOCK, next_power_of_two(d))
            adam_unit_rows_kernel[(rows,)](*tensors, d, *numbers, BLOCK=block, num_warps=4)
        else:
            count = parameter.numel()
            grid = (cdiv(count, BLOCK),)
            adam_step_kernel[grid](*tensors, count, *numbers, BLOCK=BLOCK, num_warps=4)
