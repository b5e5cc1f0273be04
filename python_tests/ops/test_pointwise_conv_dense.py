"""The 1x1 convolution of so many codes that the dense one is faster."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from test_pointwise_conv import CASES, make

import sparsekern
from sparsekern.ops.pointwise_conv.dense import ELEMENTS_PER_CODE


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if 0 not in case[0]])
def test_many_codes_take_the_dense_product(name, monkeypatch):
    """Without a forced backend; equal to the kernels within rounding, gradients too."""
    calls = []
    module = importlib.import_module("sparsekern.ops.pointwise_conv")
    dense = module.dense_pointwise_conv
    monkeypatch.setattr(
        module, "dense_pointwise_conv", lambda *args: calls.append(args) or dense(*args)
    )
    shape, dim, _, _ = CASES[name]
    values, indices, weight, bias = make(name, torch.float32)
    many = math.prod(shape) // ELEMENTS_PER_CODE + 1
    indices = indices.repeat(many)[: max(many, len(indices))] if len(indices) else indices
    values = torch.randn(len(indices))
    leaves = [t.requires_grad_() for t in (values, weight, bias)]

    def run(backend):
        with sparsekern.backend(backend):
            out = sparsekern.pointwise_conv(leaves[0], indices, shape, *leaves[1:], channel_dim=dim)
        grad = torch.linspace(-1, 1, out.numel()).view(out.shape)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    ours = run("auto")
    assert len(calls) == (len(indices) > 0)
    for one, right in zip(ours, run("reference"), strict=True):
        scale = max(1.0, float(right.detach().abs().max())) if right.numel() else 1.0
        torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-5 * scale)
    bad = indices.clone()
    if len(bad):
        bad[-1] = math.prod(shape)
        with pytest.raises(IndexError, match="pointwise_conv: "):
            sparsekern.pointwise_conv(values, bad, shape, weight, bias, channel_dim=dim)
