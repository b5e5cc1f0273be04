"""SparseLinear: codes and the dense tensor that they stand for give the same result."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern import SparseLinear, TopK, testing


def decoder(kind, bias):
    if kind == "own":
        return SparseLinear(20, 6, bias)
    return SparseLinear.from_linear(nn.Linear(20, 6, bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["own", "from nn.Linear"])
def test_codes_and_dense_agree(target, kind, bias):
    layer = decoder(kind, bias).to(target.device)
    x = torch.randn(3, 4, 20, device=target.device)
    results = []
    for sparse in (True, False):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = layer(TopK(5).codes(leaf) if sparse else TopK(5)(leaf))
        out.square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in layer.parameters()]
        assert all(grad.any() for grad in gradients) and len(gradients) == 1 + bias
        results.append((out, leaf.grad, *gradients))
    for one, right in zip(*results, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)  # sums in another order
    expected = TopK(5)(x) @ layer.dictionary + (layer.bias if bias else 0)
    torch.testing.assert_close(results[0][0], expected)


def test_from_linear_shares_its_parameters():
    linear = nn.Linear(20, 6)
    layer = SparseLinear.from_linear(linear)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert layer.dictionary.data_ptr() == linear.weight.data_ptr()
    assert layer.dictionary.shape == (20, 6)
    assert set(layer.state_dict()) == set(linear.state_dict())
    layer(TopK(5).codes(torch.randn(3, 20))).sum().backward()
    assert linear.weight.grad.shape == (6, 20) and linear.weight.grad.any()
    nn.Linear(20, 6).load_state_dict(layer.state_dict())
    copied = copy.deepcopy(layer)
    latents = torch.randn(2, 20)
    testing.assert_same("copy", copied(latents), linear(latents))
    without = SparseLinear.from_linear(nn.Linear(20, 6, bias=False))
    assert without.bias is None and "bias=False" in repr(without)
    assert "latents=20, features=6, bias=True" in repr(layer)
    for wrong in (nn.Conv1d(3, 3, 1), SparseLinear(3, 3)):
        with pytest.raises(TypeError, match=r"linear must be an nn.Linear, got"):
            SparseLinear.from_linear(wrong)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"linear must hold its weight as a parameter"):
        SparseLinear.from_linear(normed)


def test_kinds_of_codes():
    layer = SparseLinear(9, 4)
    x = torch.randn(5, 9)
    values, indices = sparsekern.topk(x, 3, relu=True)
    expected = layer((values, indices))
    counted, _ = sparsekern.topk_counts(x, 3, relu=True)
    for codes in (sparsekern.Codes(values, indices), counted):
        testing.assert_same(type(codes).__name__, layer(codes), expected)
    transposition = sparsekern.transpose_codes(indices, 9)
    testing.assert_same("transposed", layer(codes, transposition), expected)
    for wrong in ((values,), (values, indices, values), [values, indices], None):
        with pytest.raises(TypeError, match=r"^SparseLinear: codes must be a pair"):
            layer(wrong)
    with pytest.raises(ValueError, match=r"^SparseLinear: a dense tensor must be \[..., 9\]"):
        layer(x[:, :8])
    with pytest.raises(TypeError, match=r"^SparseLinear: codes must be a dense tensor"):
        layer(x.to_sparse())
    with pytest.raises(IndexError, match=r"indices must lie in 0..8 .* got 9"):
        layer((torch.ones(1), torch.tensor([9])))


def test_dtypes_of_sparse_linear():
    layer = SparseLinear(30, 6)
    x = torch.randn(5, 30)
    for dtype in (torch.bfloat16, torch.float16):
        dense = TopK(4)(x.to(dtype))
        codes = sparsekern.topk(x.to(dtype), 4, relu=True)
        for out in (layer(dense), layer(codes)):
            assert out.dtype == dtype
        torch.testing.assert_close(layer(dense), layer(codes))
        with torch.autocast("cpu", dtype):
            assert layer(dense.float()).dtype == layer(codes).dtype == dtype
    for codes in (TopK(4)(x.double()), sparsekern.topk(x.double(), 4)):
        with pytest.raises(TypeError, match=r"dtype torch.float32 or be|must have values' dtype"):
            layer(codes)
    half = SparseLinear(30, 6, dtype=torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"dtype torch.bfloat16 or be .* got torch.float32"):
        half(x)


def test_sparse_linear_begins_as_nn_linear():
    torch.manual_seed(0)
    layer = SparseLinear(400, 50)
    assert layer.weight.shape == (400, 50) and layer.bias.shape == (50,)
    for parameter in layer.parameters():
        assert 0.04 < parameter.abs().max() <= 0.05  # 1 / sqrt(400)
    assert layer.weight.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)  # uniform
    for sizes in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match=r"^SparseLinear: (latents|features) must lie in 1"):
            SparseLinear(*sizes)
    with pytest.raises(TypeError, match=r"^SparseLinear: latents must be an integer"):
        SparseLinear(2.5, 3)


@pytest.mark.parametrize("kind", ["own", "from nn.Linear"])
def test_sparse_linear_compiled(kind):
    torch.compiler.reset()
    layer, activation = decoder(kind, True), TopK(5)

    def sparse(x):
        return layer(activation.codes(x))

    x = torch.randn(3, 20)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    testing.assert_same("codes", compiled(x), sparse(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    testing.assert_same("dense", compiled(x), layer(x))
