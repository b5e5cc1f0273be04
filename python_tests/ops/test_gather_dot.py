"""gather_dot on every backend: rows times chosen rows of a dictionary, with its gradients."""

from __future__ import annotations

import pytest
import torch

import sparsekern
from sparsekern import testing
from sparsekern.ops.gather_dot.reference import gather_dot_reference

DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]
# leading dimensions, features, latents, codes of a row
SHAPES = [((9,), 6, 50, 4), ((2, 3), 5, 7, 12), ((1,), 1, 3, 1), ((4,), 129, 40, 33)]


def problem(rows, d, n, k, dtypes=DTYPE_PAIRS[0]):
    """x, weight, and indices that repeat within rows."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(*rows, d, generator=generator).to(dtypes[0])
    weight = torch.randn(n, d, generator=generator).to(dtypes[1])
    return x, weight, torch.randint(0, n, (*rows, k), generator=generator)


def dense(x, weight, indices):
    return (x @ weight.t()).gather(-1, indices)


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("form", ["row-major", "column-major", "transposition", "int32"])
def test_products_and_gradients_equal_dense_autograd(target, counted, dtypes, form):
    for shape in SHAPES:
        x, weight, indices = problem(*shape, dtypes)
        there = indices.to(target.device)
        ours = [x.to(target.device).requires_grad_(), weight.to(target.device)]
        if form == "column-major":
            ours[1] = ours[1].t().contiguous().t()
        ours[1].requires_grad_()
        grouped = None
        if form == "transposition":
            grouped = sparsekern.transpose_codes(there, len(weight))
        if form == "int32":
            there = there.int()
        products = sparsekern.gather_dot(*ours, there, transposition=grouped)
        assert products.dtype == x.dtype and products.shape == indices.shape
        truth = [x.double().requires_grad_(), weight.double().requires_grad_()]
        rough = [x.float().requires_grad_(), weight.float().requires_grad_()]
        right, other = dense(*truth, indices), dense(*rough, indices).to(x.dtype)
        results = [t.detach() for t in (products, right, other)]
        testing.assert_error_rule("products", *results, results[1].abs().max() * 4)
        upstream = torch.randn(right.shape).to(x.dtype)
        grads = torch.autograd.grad(products, ours, upstream.to(target.device))
        rights = torch.autograd.grad(right, truth, upstream.double())
        roughs = torch.autograd.grad(other, rough, upstream)
        for name, grad, best, near in zip(("x", "weight"), grads, rights, roughs, strict=True):
            near = near.to(grad.dtype)
            testing.assert_error_rule(f"d {name}", grad, best, near, best.abs().max() * 4)
        assert grads[1].stride() == ours[1].stride()
        counted()


def test_the_reference_is_the_definition():
    x, weight, indices = problem((3,), 4, 8, 5)
    expected = torch.stack([weight[indices[b]] @ x[b] for b in range(3)])
    torch.testing.assert_close(gather_dot_reference(x, weight, indices), expected)


def test_second_derivatives(target):
    target.require_float64()
    x, weight, indices = problem((4,), 3, 8, 5)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]

    def run(x, weight):
        return sparsekern.gather_dot(x, weight, indices)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_vmap_over_each_argument(target):
    x, weight, indices = (t.to(target.device) for t in problem((4,), 3, 8, 5))
    weights = torch.stack([weight, 2 * weight])
    expected = sparsekern.gather_dot(x, weight, indices)
    over_weights = torch.vmap(sparsekern.gather_dot, (None, 0, None))(x, weights, indices)
    target.assert_repeated("weights", over_weights, torch.stack([expected, 2 * expected]))
    over_rows = torch.vmap(sparsekern.gather_dot, (0, None, 0))(x, weight, indices)
    target.assert_repeated("rows", over_rows, expected)
    grads = torch.func.vmap(
        torch.func.grad(lambda row, at: sparsekern.gather_dot(row, weight, at).sum())
    )(x, indices)
    right = weight[indices].sum(1)
    torch.testing.assert_close(grads, right)


def test_empty_sizes(target):
    for rows, d, k in ((0, 3, 2), (2, 3, 0), (2, 0, 2)):
        x = torch.randn(rows, d, device=target.device)
        weight = torch.randn(5, d, device=target.device)
        indices = torch.zeros(rows, k, dtype=torch.int64, device=target.device)
        products = sparsekern.gather_dot(x, weight, indices)
        assert products.shape == (rows, k) and not products.any()


def test_compiles_and_casts():
    x, weight, indices = problem((4,), 3, 8, 5)
    compiled = torch.compile(sparsekern.gather_dot, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, indices), dense(x, weight, indices))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        products = sparsekern.gather_dot(x, weight, indices)
    assert products.dtype == torch.bfloat16
    torch.library.opcheck(torch.ops.sparsekern.gather_dot.default, (x, weight, indices))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"weight": torch.ones(8, 2)}, ValueError, r"weight must be \[latents, 3\] for x \[4, 3\]"),
        ({"weight": torch.ones(8, 3).half()}, TypeError, "weight must have x's dtype"),
        ({"indices": torch.ones(4, 5)}, TypeError, "indices must be int64 or int32"),
        ({"indices": torch.ones(3, 5).long()}, ValueError, r"indices must be \[4, k\] for x"),
        ({"transposition": (None,)}, TypeError, "transposition must be a Transposition"),
    ],
)
def test_bad_input(change, error, message):
    x, weight, indices = problem((4,), 3, 8, 5)
    arguments = {"x": x, "weight": weight, "indices": indices, **change}
    with pytest.raises(error, match=f"^gather_dot: {message}"):
        sparsekern.gather_dot(**arguments)


@pytest.mark.parametrize("wrong", [8, -1])
def test_an_index_out_of_range_of_one_entry_of_a_batch(target, wrong):
    """It is none of the next entry's, or the one's before."""
    x, weight, indices = (t.to(target.device) for t in problem((2, 4), 3, 8, 5))
    weights = torch.stack([weight, 2 * weight])
    indices[0 if wrong > 0 else 1, 0, 0] = wrong
    if target.checks_indices:
        with pytest.raises(IndexError, match="indices must lie in"):
            torch.vmap(sparsekern.gather_dot)(x, weights, indices)
        return
    target.require_any_index()
    products = torch.vmap(sparsekern.gather_dot)(x, weights, indices)
    assert (products == 0).nonzero().tolist() == [[0 if wrong > 0 else 1, 0, 0]]


@pytest.mark.parametrize("wrong", [8, -1, 2**40])
def test_an_index_out_of_range(target, wrong):
    x, weight, _ = (t.to(target.device) for t in problem((1,), 3, 8, 2))
    indices = torch.tensor([[1, wrong]], device=target.device)
    if target.checks_indices:
        with pytest.raises(IndexError, match=r"indices must lie in 0\.\.7"):
            sparsekern.gather_dot(x, weight, indices)
        return
    target.require_any_index()  # its product is zero
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    products = sparsekern.gather_dot(*leaves, indices)
    expected = sparsekern.gather_dot(x, weight, indices[:, :1])
    testing.assert_same("products", products, torch.cat((expected, torch.zeros_like(expected)), 1))
    products.sum().backward()
    torch.testing.assert_close(leaves[0].grad, weight[1:2])
    assert leaves[1].grad[1].tolist() == x[0].tolist() and leaves[1].grad.count_nonzero() == 3
