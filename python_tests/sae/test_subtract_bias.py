"""Without subtract_bias the decoder's bias takes part in decoding alone."""

from __future__ import annotations

import pytest
import torch

import sparsekern
from sparsekern.models import SparseAutoencoder

D, N, K = 12, 512, 5


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_codes_and_gradients_are_those_of_the_dense_expression(kind, mode):
    torch.manual_seed(0)
    layer = {
        "topk": lambda: sparsekern.TopK(K),
        "relu": torch.nn.ReLU,
        "jumprelu": lambda: sparsekern.JumpReLU(N, threshold=1.2),
    }[kind]()
    model = SparseAutoencoder(D, N, activation=layer, subtract_bias=False).double()
    getattr(model, mode)()
    with torch.no_grad():
        model.decoder_bias.normal_()
        model.encoder_bias.normal_(-1.0 if kind == "relu" else 0.0, 0.1)
    x = torch.randn(20, D, dtype=torch.float64)
    upstream = torch.randn(20, D, dtype=torch.float64)

    scores = x @ model.encoder.t() + model.encoder_bias
    if kind == "topk":
        values, indices = scores.topk(K)
        codes = torch.zeros_like(scores).scatter(-1, indices, values.relu())
    elif kind == "relu":
        codes = scores.relu()
    else:
        codes = scores * (scores > layer.threshold.detach())
    expected = codes @ model.dictionary + model.decoder_bias
    parameters = [model.encoder, model.encoder_bias, model.dictionary, model.decoder_bias]
    wanted = torch.autograd.grad((expected * upstream).sum(), parameters)

    reconstruction = model(x).reconstruction
    torch.testing.assert_close(reconstruction, expected)
    found = torch.autograd.grad((reconstruction * upstream).sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_default_subtracts_it():
    torch.manual_seed(0)
    model = SparseAutoencoder(D, N, k=K)
    with torch.no_grad():
        model.decoder_bias.normal_()
    x = torch.randn(4, D)
    values = ((x - model.decoder_bias) @ model.encoder.t()).topk(K).values
    torch.testing.assert_close(model.encode(x).values.sort(-1, descending=True).values, values)
