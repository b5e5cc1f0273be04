"""Whether rows of another dtype are taken does not depend on how many latents they activate."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from sparsekern import BatchTopK, JumpReLU
from sparsekern.models import SparseAutoencoder, SparseBottleneck, Widening

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
AUTOCAST = [None, torch.bfloat16, torch.float16]


def _autocast(dtype):
    return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()


MODELS = {
    "relu": lambda: {"activation": nn.ReLU(), "sparsity_weight": 1e-3},
    "jumprelu": lambda: {"activation": JumpReLU(256, threshold=0.2, bandwidth=0.1)},
    "batchtopk": lambda: {"activation": BatchTopK(6)},
    "norms": lambda: {"activation": nn.ReLU(), "scale_scores": True, "prefixes": (30,)},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("inside", AUTOCAST)
def test_autoencoders(name, inside):
    """A float32 model takes 16-bit rows, nothing takes wider ones; dense and sparse alike."""
    for of_model in KINDS:
        for of_rows in KINDS:
            torch.manual_seed(0)
            x = torch.randn(16, 16).to(of_rows)
            outcomes = []
            for bias in (-2.5, 3.0):
                model = SparseAutoencoder(16, 256, **MODELS[name]()).to(of_model)
                if name == "batchtopk" and bias > 0:
                    model.k = 100
                nn.init.constant_(model.encoder_bias, bias)
                try:
                    with _autocast(inside):
                        output, loss = model.loss(x)
                    loss.total.backward()
                    dense = output.values.shape[-1] == 256
                    outcomes.append((dense, output.reconstruction.dtype, loss.total.dtype))
                except TypeError as error:
                    assert "dtype" in str(error) or "float64" in str(error)
                    outcomes.append((bias > 0, TypeError, None))
            (dense, *sparse_outcome), (yes, *dense_outcome) = outcomes
            assert (dense, yes) == (False, True)
            assert sparse_outcome == dense_outcome, (of_model, of_rows)
            if inside is None and of_rows != of_model:
                mixed = of_model == torch.float32 and of_rows.itemsize == 2
                assert (sparse_outcome[0] is not TypeError) == mixed


def test_the_dense_path_reads_a_float32_dictionary_as_it_is():
    """As the sparse one does: rounded once, at the end."""
    torch.manual_seed(0)
    model = SparseAutoencoder(16, 256, activation=nn.ReLU())
    x = torch.randn(16, 16).bfloat16()
    output = model(x)
    assert output.values.shape[-1] == 256
    exact = output.values.double() @ model.dictionary.double() + model.decoder_bias.double()
    assert torch.equal(output.reconstruction, exact.float().bfloat16())


@pytest.mark.parametrize("inside", AUTOCAST)
@pytest.mark.parametrize("of_layer", KINDS)
def test_widening(of_layer, inside):
    for of_input in KINDS:
        outcomes = []
        for share in (0.0, 0.5):
            torch.manual_seed(0)
            x = (torch.rand(2, 4, 16, 16) < share).to(of_input)
            x[0, 0, 3, 3] = 1
            layer = Widening(4, 8, 4).to(of_layer)
            try:
                with _autocast(inside):
                    y = layer(x)
                    expected = nn.functional.max_pool2d(layer.conv(x), 4)
                torch.testing.assert_close(y, expected)
                outcomes.append(y.dtype)
            except (RuntimeError, TypeError) as error:
                assert inside is not None or isinstance(error, TypeError)
                outcomes.append(None)
        assert outcomes[0] == outcomes[1], of_input


@pytest.mark.parametrize("of_layer", KINDS)
def test_bottlenecks(of_layer):
    for of_input in KINDS:
        for units, k in ((64, 4), (64, 40), (2048, 4)):
            layer = SparseBottleneck(8, units, 8, k).to(of_layer)
            x = torch.randn(5, 8).to(of_input)
            if of_layer == of_input:
                assert layer(x).output.dtype == of_layer
            else:
                with pytest.raises(TypeError, match="SparseBottleneck: x must have"):
                    layer(x)
