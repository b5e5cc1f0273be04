"""The top-k layers as SAELens and OpenAI construct, store and use them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern import testing
from sparsekern.integrations import openai, sae_lens


def test_dense_latents_of_saelens():
    x = torch.randn(4, 3, 9)
    for layer in (sae_lens.TopK(3), sae_lens.TopK(3, False), sae_lens.TopK(k=3)):
        testing.assert_same("dense", layer(x), sparsekern.TopK(3)(x))
    with pytest.raises(TypeError, match="use_sparse_activations must be a bool, got ReLU"):
        sae_lens.TopK(3, nn.ReLU())


@pytest.mark.parametrize("shape", [(9,), (4, 9), (4, 3, 9)], ids=str)
def test_sparse_latents_of_saelens(shape):
    x = torch.rand(shape) + 0.1  # all selected values are above zero
    for layer in (sae_lens.TopK(3, True), sae_lens.TopK(3, use_sparse_activations=True)):
        sparse = layer(x)
        assert sparse.is_sparse and sparse.is_coalesced() and sparse.shape == x.shape
        dense = sparse.to_dense()
        testing.assert_same("sparse", dense, sparsekern.TopK(3)(x))
        # is_coalesced is a promise: torch would have built the same coordinates
        testing.assert_same("order", sparse.indices(), dense.to_sparse(len(shape)).indices())


def test_sparse_latents_have_the_dense_gradient():
    x = torch.randn(4, 9)
    weight = torch.randn(9, 2)
    gradients = []
    for layer in (sae_lens.TopK(3, True), sae_lens.TopK(3)):
        leaf = x.clone().requires_grad_()
        (layer(leaf) @ weight).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_constructor_of_openai():
    x = torch.randn(4, 3, 9)
    testing.assert_same("ReLU", openai.TopK(3, nn.ReLU())(x), sparsekern.TopK(3)(x))
    testing.assert_same("default", openai.TopK(3)(x), sparsekern.TopK(3)(x))
    identity = openai.TopK(k=3, postact_fn=nn.Identity())
    testing.assert_same("identity", identity(x), sparsekern.TopK(3, None)(x))


def test_state_dicts_of_openai():
    model = nn.Sequential(nn.Linear(4, 9), openai.TopK(3), nn.Linear(9, 4))
    plain = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))
    stored = {**plain.state_dict(), "1.k": 7, "1.postact_fn": "ReLU"}
    model.load_state_dict(stored)
    assert model[1].k == 7
    model.load_state_dict({**stored, "1.postact_fn": "Identity"})
    assert isinstance(model[1].post, nn.Identity)
    layer = openai.TopK.from_state_dict({"k": 5, "postact_fn": "Identity"})
    assert layer.k == 5 and isinstance(layer.post, nn.Identity)
    for wrong, message in (
        ({}, "state_dict must have an entry k"),
        ({"k": 5, "postact_fn": "Tanh"}, "postact_fn must be one of ReLU, Identity, got 'Tanh'"),
        ({"k": 5, "w": 1}, r"unexpected entries in state_dict: \['w'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            openai.TopK.from_state_dict(wrong)
    assert openai.TopK.from_state_dict({"k": 5, "w": 1}, strict=False).k == 5
