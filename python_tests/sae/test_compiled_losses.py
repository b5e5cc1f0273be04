"""SparseAutoencoder.loss and its forward pass compile into one graph, with eager's values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsekern import BatchTopK, JumpReLU, TopK
from sparsekern.models import SparseAutoencoder

MODELS = {
    "topk": lambda: {"k": 4, "auxk": 8, "multi_k": 12},
    "groups, tied": lambda: {"activation": TopK(4, groups=2), "auxk": 8, "tied": True},
    "prefixes, norms": lambda: {"k": 4, "auxk": 8, "prefixes": (5, 30), "scale_scores": True},
    "batchtopk": lambda: {"activation": BatchTopK(3), "auxk": 60, "prefixes": (30,)},
    "jumprelu": lambda: {
        "activation": JumpReLU(64, threshold=0.3, bandwidth=0.2),
        "sparsity_weight": 0.1,
        "auxk": 8,
        "scale_scores": True,
    },
    "relu": lambda: {"activation": nn.ReLU(), "sparsity_weight": 1e-3, "auxk": 8},
}


def _made(name):
    torch.manual_seed(0)
    model = SparseAutoencoder(16, 64, dead_after=20, **MODELS[name]())
    with torch.no_grad():
        model.encoder_bias[:12] = -9.0  # never active
        model.dictionary.mul_(torch.rand(64, 1) + 0.5)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_training_equals_eager(name):
    eager = _made(name)
    twin = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(twin.loss, fullgraph=True, backend="aot_eager")
    for seed in range(3):  # nothing is dead in the first two batches
        torch.manual_seed(seed)
        x = torch.randn(10, 16)
        (output, loss), (same, again) = eager.loss(x), compiled(x)
        torch.testing.assert_close(same.reconstruction, output.reconstruction)
        assert bool(loss.auxk > 0) == (seed == 2)
        for field, expected, actual in zip(loss._fields, loss, again, strict=True):
            torch.testing.assert_close(actual, expected, msg=f"{field} of batch {seed}")
        eager.zero_grad(), twin.zero_grad()
        loss.total.backward(), again.total.backward()
        for (key, p), q in zip(eager.named_parameters(), twin.parameters(), strict=True):
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(q.grad, expected, msg=f"{key} of batch {seed}")
        for (key, p), q in zip(eager.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(q, p, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_equals_eager(name):
    model = _made(name)
    model.loss(torch.randn(10, 16))
    model.eval()
    x = torch.randn(10, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        output, loss = model.loss(x)
        same, again = torch.compile(model.loss, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(same.reconstruction, output.reconstruction)
    torch.testing.assert_close(again.total, loss.total)


def test_a_latent_without_a_direction_is_no_nan():
    """Scores are scaled by norms; a norm of zero times what leaves a latent out would be NaN."""
    model = _made("prefixes, norms")
    with torch.no_grad():
        model.dictionary[20] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(10, 16)
        _, loss = compiled(x)
    assert loss.auxk > 0 and loss.auxk.isfinite()
    assert model.loss(x)[1].total.isfinite()
