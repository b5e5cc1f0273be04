"""The tests' quick interpreter of Triton beside the interpreter itself."""

from __future__ import annotations

import contextlib

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")
tl = triton.language

import interpreter  # noqa: E402
from triton.runtime.interpreter import ReduceOps  # noqa: E402


@triton.jit
def first_of_largest(a, i, b, j):
    """Return the larger of two numbers with its place, the lower place of equal ones."""
    first = (a > b) | ((a == b) & (i < j))
    return tl.where(first, a, b), tl.where(first, i, j)


@triton.jit
def reduce_kernel(x, best, place, rows: tl.constexpr, cols: tl.constexpr, axis: tl.constexpr):
    places = tl.arange(0, rows)[:, None] * cols + tl.arange(0, cols)[None]
    pairs = tl.load(x + places), places
    values, indices = tl.reduce(pairs, axis=axis, combine_fn=first_of_largest)
    out = tl.arange(0, cols if axis == 0 else rows)
    tl.store(best + out, values)
    tl.store(place + out, indices)


@pytest.mark.parametrize("axis", [0, 1])
def test_by_halves_equals_by_elements(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: run on a machine without a GPU")
    x = torch.randint(0, 9, (8, 16)).float()
    length = (16, 8)[axis]

    def results() -> tuple[torch.Tensor, torch.Tensor]:
        best, place = torch.empty(length), torch.empty(length, dtype=torch.int32)
        reduce_kernel[(1,)](x, best, place, rows=8, cols=16, axis=axis)
        return best, place

    calls = []
    quick = interpreter.reduce_by_halves
    monkeypatch.setattr(
        interpreter, "reduce_by_halves", lambda *given: calls.append(1) or quick(*given)
    )
    best, place = results()
    assert calls
    assert torch.equal(best, x.amax(axis))
    assert torch.equal(x.flatten()[place.long()], best)
    monkeypatch.setattr(ReduceOps, "generic_reduce", interpreter.by_elements)
    for quickly, slowly in zip((best, place), results(), strict=True):
        assert torch.equal(quickly, slowly)


@pytest.mark.parametrize("fails", [False, True])
def test_the_language_is_as_before_when_a_kernel_has_ended(fails: bool) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: run on a machine without a GPU")
    owners = tl, tl.core, tl.math, tl.tensor, tl.dtype
    before = [dict(vars(owner)) for owner in owners]
    seen = []
    given = [torch.ones(64), torch.empty(8), torch.empty(8, dtype=torch.int32)]
    grid = (1,) if not fails else lambda sizes: seen.append(vars(tl)["load"]) or 1 / 0
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        reduce_kernel[grid](*given, rows=8, cols=8, axis=0)
    assert [vars(owner) for owner in owners] == before
    assert all(load is not before[0]["load"] for load in seen) and len(seen) == fails
