"""linear_at on every backend: the dense layer's scores at given latents, with its gradients."""

from __future__ import annotations

import pytest
import torch

import sparsekern
from sparsekern import testing
from sparsekern.ops.linear_at import codes_at

F = torch.nn.functional


def dense(x, weight, bias, indices, pre_bias=None, scale=None):
    """The definition, with all scores."""
    scores = F.linear(x if pre_bias is None else x - pre_bias, weight, bias)
    return (scores if scale is None else scores * scale).gather(-1, indices)


def problem(rows: tuple[int, ...], d: int, n: int, k: int) -> list[torch.Tensor]:
    """x, weight, bias, pre_bias, scale, and indices that repeat within rows."""
    torch.manual_seed(n)
    tensors = [torch.randn(*rows, d), torch.randn(n, d), torch.randn(n), torch.randn(d)]
    return [*tensors, torch.rand(n) + 0.5, torch.randint(0, n, (*rows, k))]


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "transposition"])
def test_values_and_gradients_equal_dense_autograd(target, counted, shared):
    for rows, d, n, k in (((9,), 6, 50, 4), ((2, 3), 5, 7, 12), ((1,), 1, 3, 1)):
        *tensors, indices = problem(rows, d, n, k)
        moved, there = [t.to(target.device) for t in tensors], indices.to(target.device)
        ours = [t.clone().requires_grad_() for t in moved]
        truth = [t.double().requires_grad_() for t in tensors]
        plain = [t.clone().requires_grad_() for t in tensors]

        def call(function, leaves, indices, **more):
            x, weight, bias, pre_bias, scale = leaves
            return function(x, weight, bias, indices, pre_bias=pre_bias, scale=scale, **more)

        grouped = sparsekern.transpose_codes(there, n) if shared else None
        values = call(sparsekern.linear_at, ours, there, transposition=grouped)
        right, rough = call(dense, truth, indices), call(dense, plain, indices)
        results = [t.detach() for t in (values, right, rough)]
        testing.assert_error_rule("values", *results, results[1].abs().max() * 4)
        upstream = torch.randn(right.shape)
        grads = torch.autograd.grad(values, ours, upstream.to(target.device))
        rights = torch.autograd.grad(right, truth, upstream.double())
        roughs = torch.autograd.grad(rough, plain, upstream)
        names = ("x", "weight", "bias", "pre_bias", "scale")
        for name, grad, best, other in zip(names, grads, rights, roughs, strict=True):
            testing.assert_error_rule(f"d {name}", grad, best, other, best.abs().max() * 4)
            counted()


def test_second_derivatives(target):
    target.require_float64()
    *tensors, indices = problem((4,), 3, 8, 5)
    leaves = [t.double().requires_grad_() for t in tensors]

    def values(x, weight, bias, pre_bias, scale):
        return sparsekern.linear_at(x, weight, bias, indices, pre_bias=pre_bias, scale=scale)

    assert torch.autograd.gradcheck(values, leaves)
    assert torch.autograd.gradgradcheck(values, leaves)


def test_it_continues_a_selection(target):
    """At the indices of linear_topk it gives linear_topk's values and gradients."""
    x, weight, bias, *_ = (t.to(target.device) for t in problem((12,), 6, 60, 1))
    weight.requires_grad_()
    codes = sparsekern.linear_topk(x, weight, bias, 7, relu=False)
    again = sparsekern.linear_at(x, weight, bias, codes.indices)
    torch.testing.assert_close(again, codes.values)
    pairs = (torch.autograd.grad(t.square().sum(), weight)[0] for t in (again, codes.values))
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize("of_x", [True, False], ids=["gradient of x", "none of x"])
def test_codes_of_found_scores_are_those_computed_again(target, of_x):
    """Values and gradients equal bit for bit: all numbers are small integers, scales 1, 2 and 0."""
    torch.manual_seed(1)
    rows, d, n, k = 9, 6, 8, 4
    shapes = ((rows, d), (n, d), (n,), (d,))
    x, weight, bias, pre_bias = (torch.randint(-3, 4, shape).float() for shape in shapes)
    scale, indices = (torch.arange(n) % 3).float(), torch.rand(rows, n).argsort(-1)[:, :k]
    chosen = torch.rand(rows, k) < 0.7
    indices, chosen = indices.to(target.device), chosen.to(target.device)
    grouped = sparsekern.transpose_codes(indices, n)
    upstream = torch.randint(-3, 4, (rows, k)).float().to(target.device)
    found = []
    for again in (True, False):
        leaves = [t.to(target.device).requires_grad_() for t in (x, weight, bias, pre_bias, scale)]
        leaves[0].requires_grad_(of_x)
        ours, (weights, biases, shift, factors) = leaves[0], leaves[1:]
        scores = sparsekern.linear_at(
            ours, weights, biases, indices, pre_bias=shift, scale=factors, transposition=grouped
        )
        if again:
            codes = torch.where(chosen, scores.relu(), 0)
        else:
            codes = codes_at(
                scores.detach(), chosen, ours, weights, biases, indices, grouped,
                pre_bias=shift, scale=factors,
            )  # fmt: skip
        wanted = leaves if of_x else leaves[1:]
        found.append((codes.detach(), *torch.autograd.grad(codes, wanted, upstream)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_autocast_and_empty_batches(target):
    x, weight, bias, _, scale, indices = (t.to(target.device) for t in problem((5,), 4, 9, 3))
    weight.requires_grad_()
    with torch.autocast(target.device, dtype=torch.bfloat16):
        values = sparsekern.linear_at(x, weight, bias, indices, scale=scale)
    assert values.dtype == torch.bfloat16
    torch.testing.assert_close(
        values.float(), dense(x, weight, bias, indices, scale=scale), rtol=0.05, atol=0.05
    )
    values.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert sparsekern.linear_at(x[:0], weight, bias, indices[:0]).shape == (0, 3)


X, WEIGHT, INDICES = torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(2, 3, dtype=torch.int64)
BAD = {
    "float indices": (TypeError, "indices must be int64", (X, WEIGHT, None, X)),
    "rows": (ValueError, r"indices must be \[2, 'k'\]", (X, WEIGHT, None, INDICES[:1])),
    "width": (ValueError, r"weight must be \[latents, 4\]", (X, WEIGHT.t(), None, INDICES)),
    "bias": (ValueError, r"linear_at: bias must be \[9\]", (X, WEIGHT, X[0], INDICES)),
    "range": (IndexError, r"indices must lie in 0\.\.8", (X, WEIGHT, None, INDICES + 9)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    error, text, args = BAD[name]
    with pytest.raises(error, match=text):
        sparsekern.linear_at(*args)
