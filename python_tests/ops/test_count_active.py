"""Counting which latents fired, on every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import FLOATS

import sparsekern
from sparsekern import testing
from sparsekern.ops.count_active.reference import counts_reference

SIZES = [(0, 5), (1, 1), (7, 3), (100, 7), (1000, 40), (5000, 3000), (40000, 11)]


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_counts_equal_the_reference(target, counted, index_dtype):
    for count, n in SIZES if target.thorough or target.device == "cuda" else SIZES[:5]:
        indices = torch.randint(0, n, (count,)).to(index_dtype).to(target.device)
        testing.assert_same(
            f"{count} of {n}", sparsekern.count_active(indices, n), counts_reference(indices, n)
        )
        counted()
        for dtype in FLOATS:
            values = testing.fill_rows("few values", 1, max(count, 1))[0, :count].to(dtype)
            values[: count // 10] = torch.nan  # NaN is not zero: it counts
            values = values.to(target.device)
            testing.assert_same(
                f"{count} of {n}, values",
                sparsekern.count_active(indices, n, values),
                counts_reference(indices, n, values),
            )
            counted()


def test_shapes_and_strides(target):
    indices = torch.randint(0, 9, (4, 3, 5), device=target.device).transpose(0, 2)
    values = torch.randn(4, 3, 5, device=target.device).relu().transpose(0, 2)
    actual = sparsekern.count_active(indices, 9, values)
    testing.assert_same("strided", actual, torch.bincount(indices[values != 0], minlength=9))


def test_equals_the_counts_of_the_top_k_kernel(target):
    x = testing.fill_rows("few values", 20, 50).to(target.device)
    (values, indices), counts = sparsekern.topk_counts(x, 6, relu=True)
    testing.assert_same("counts", counts, sparsekern.count_active(indices, 50, values))


def test_operator_registration(target):
    indices = torch.randint(0, 9, (4, 3), device=target.device)
    op = torch.ops.sparsekern.count_active.default
    torch.library.opcheck(op, (indices, 9, None))
    torch.library.opcheck(op, (indices, 9, torch.randn(4, 3, device=target.device)))


def test_compiled_equals_eager(target):
    torch.compiler.reset()
    indices = torch.randint(0, 9, (4, 3), device=target.device)
    compiled = torch.compile(
        lambda i: sparsekern.count_active(i, 9) + 1, fullgraph=True, backend="aot_eager"
    )
    testing.assert_same("compiled", compiled(indices), sparsekern.count_active(indices, 9) + 1)


def test_vmap(target):
    indices = torch.randint(0, 9, (4, 3), device=target.device)
    mapped = torch.vmap(lambda i: sparsekern.count_active(i, 9))(indices)
    rows = torch.stack([sparsekern.count_active(row, 9) for row in indices])
    testing.assert_same("vmap", mapped, rows)


def test_vmap_of_an_index_out_of_range(target):
    indices = torch.tensor([[0, 9], [-1, 3]], device=target.device)

    def count():
        return torch.vmap(lambda i: sparsekern.count_active(i, 9))(indices)

    if target.checks_indices:
        with pytest.raises(IndexError, match="indices must lie in"):
            count()
        return
    target.require_any_index()
    assert count().nonzero().tolist() == [[0, 0], [1, 3]]


INDICES = torch.tensor([[0, 2], [1, 0]])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((INDICES.float(), 4), TypeError, "indices must be int64 or int32"),
        ((INDICES, 0), ValueError, "n must lie in 1.."),
        ((INDICES, 2.5), TypeError, "n must be an integer"),
        ((INDICES, 4, torch.ones(2)), ValueError, "values and indices must have the same shape"),
        ((INDICES, 4, INDICES), TypeError, "values must be float32"),
        ((INDICES, 2), IndexError, r"indices must lie in 0..1 .*got 2 at flat position 1"),
        ((-INDICES, 4), IndexError, r"indices must lie in 0..3 .*got -2 at flat position 1"),
    ],
)
def test_bad_input(target, args, error, message):
    if error is IndexError and not target.checks_indices:  # such an entry is left out
        target.require_any_index()
        assert int(sparsekern.count_active(args[0].to(target.device), args[1]).sum()) < 4
        return
    with pytest.raises(error, match=f"^count_active: {message}"):
        sparsekern.count_active(*args)
