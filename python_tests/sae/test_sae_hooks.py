"""Hooks on the activation of a sparse autoencoder see, and may change, its dense latents."""

from __future__ import annotations

import pytest
import torch

from sparsekern import BatchTopK, JumpReLU, TopK
from sparsekern.models import SparseAutoencoder

LATENTS = 64
ACTIVATIONS = {
    "topk": lambda: TopK(4),
    "topk in groups": lambda: TopK(4, groups=2),
    "batchtopk": lambda: BatchTopK(4),
    "jumprelu": lambda: JumpReLU(LATENTS, threshold=0.5, bandwidth=0.5),
    "relu": torch.nn.ReLU,
}


@pytest.fixture(params=ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def model(request) -> SparseAutoencoder:
    torch.manual_seed(0)
    weight = 0.1 if request.param in (ACTIVATIONS["jumprelu"], ACTIVATIONS["relu"]) else 0.0
    return SparseAutoencoder(
        16, LATENTS, activation=request.param(), sparsity_weight=weight, prefixes=(16,)
    )


def dense(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(values), LATENTS).scatter_add(1, indices, values)


@torch.no_grad()
def test_a_forward_hook_sees_the_latents(model):
    x, seen = torch.randn(8, 16), []
    expected = dense(*model(x)[1:])
    handle = model.activation.register_forward_hook(lambda *call: seen.append(call[-1]))
    output = model(x)
    handle.remove()
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(dense(*output[1:]), expected)
    if isinstance(model.activation, TopK):  # without the hook it is codes again
        assert model(x).values.shape == (8, 4)


def test_a_hook_that_only_looks_changes_no_loss_and_no_gradient(model):
    x = torch.randn(8, 16)
    model.loss(x)[1].total.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    seen = []
    model.activation.register_full_backward_hook(lambda *call: seen.append(call[-1]))
    model.loss(x)[1].total.backward()
    assert len(seen) == 1
    for name, parameter in model.named_parameters():
        if expected[name] is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_hook_can_turn_a_latent_off(model):
    x = torch.randn(8, 16)
    latents = dense(*model(x)[1:])
    latent = int(latents.sum(0).argmax())
    latents[:, latent] = 0

    def ablate(layer, inputs, output):
        return output.index_fill(1, torch.tensor([latent]), 0)

    model.activation.register_forward_hook(ablate)
    expected = latents @ model.dictionary + model.decoder_bias
    torch.testing.assert_close(model(x).reconstruction, expected)
