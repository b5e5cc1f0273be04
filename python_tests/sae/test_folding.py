"""Folding an option into the weights leaves codes and reconstructions as they were."""

from __future__ import annotations

import pytest
import torch

import sparsekern
from sparsekern.models import SparseAutoencoder

D, N, K = 12, 512, 5
LAYERS = {
    "topk": lambda: sparsekern.TopK(K),
    "batchtopk": lambda: sparsekern.BatchTopK(K),
    "jumprelu": lambda: sparsekern.JumpReLU(N, threshold=0.4),
    "relu": torch.nn.ReLU,
}


def make(kind, **options):
    torch.manual_seed(0)
    model = SparseAutoencoder(D, N, activation=LAYERS[kind](), **options).double()
    with torch.no_grad():
        for parameter in (model.decoder_bias, model.encoder_bias, model.dictionary):
            parameter.copy_(0.3 * torch.randn_like(parameter))
        model.dictionary[3] = 0
    model.calibrate(torch.randn(256, D, dtype=torch.float64))
    return model.eval()


def assert_same_results(before, model, x):
    after = model(x)
    torch.testing.assert_close(after.reconstruction, before.reconstruction)
    for output in (before, after):
        assert (output.values > 0).any()
    dense = [
        torch.zeros(len(x), N, dtype=x.dtype).scatter_add(-1, output.indices, output.values)
        for output in (before, after)
    ]
    torch.testing.assert_close(*dense)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_bias(kind, tied):
    model, x = make(kind, tied=tied), torch.randn(20, D, dtype=torch.float64)
    before = model(x)
    model.fold_bias()
    assert not model.subtract_bias
    assert_same_results(before, model, x)
    bias = model.encoder_bias.clone()
    model.fold_bias()
    assert torch.equal(model.encoder_bias, bias)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_norms(kind):
    model, x = make(kind, scale_scores=True), torch.randn(20, D, dtype=torch.float64)
    before = model(x)
    model.fold_norms()
    assert not model.scale_scores
    norms = model.dictionary.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms).index_fill(0, torch.tensor(3), 0.0))
    assert_same_results(before, model, x)
    encoder = model.encoder.clone()
    model.fold_norms()
    assert torch.equal(model.encoder, encoder)


def test_norms_of_a_tied_model():
    with pytest.raises(ValueError, match="fold_norms: tied must be False"):
        make("topk", tied=True, scale_scores=True).fold_norms()
