"""A batch that is refused, or is not finite, leaves a layer as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsekern import BatchTopK, DeadNeuronCounter, SpatialSparsity, TopK
from sparsekern.models import (
    MotifModel,
    PatchMotifs,
    SlotReadout,
    SparseAutoencoder,
    SparseBottleneck,
)


def _state(layer):
    return {name: t.clone() for name, t in [*layer.named_buffers(), *layer.state_dict().items()]}


def _spoiled(x, value):
    x = x.clone()
    x.view(-1)[3] = value
    return x


IMAGES = {
    "mt": {},
    "st": {"per_channel": False},
    "accumulated": {"accumulate": 20},
    "without normalisation": {"affine": None},
    "channels last": {"channel_dim": -1},
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", IMAGES)
def test_spatial_sparsity(name, value):
    torch.manual_seed(0)
    layers = [SpatialSparsity(4, 0.1, **IMAGES[name]) for _ in range(2)]
    batches = torch.randn(5, 4, 4, 3, 4)
    for at, batch in enumerate(batches):
        results = [layer(batch) for layer in layers]
        assert torch.equal(*results), at
        before = _state(layers[0])
        for bad, error in (
            (_spoiled(batch, value), ValueError),
            (batch[:, :3, :, :3], ValueError),
            (batch.long(), TypeError),
            (torch.tensor(1.0), ValueError),
        ):
            with pytest.raises(error):
                layers[0](bad)
        for key, tensor in _state(layers[0]).items():
            assert torch.equal(tensor, before[key]), key


def test_compiled_spatial_sparsity_keeps_nan_out_of_its_statistics():
    layer = SpatialSparsity(4, 0.1)
    x = torch.randn(2, 4, 3, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    compiled(_spoiled(x, math.nan))
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())


ROWS = {
    "topk": (lambda counter: TopK(3, counter=counter), 2),
    "batchtopk": (lambda counter: BatchTopK(3, counter=counter), 2),
    "batchtopk, of one row": (lambda counter: BatchTopK(0.5, counter=counter), None),
}


@pytest.mark.parametrize("name", ROWS)
def test_layers_of_rows(name):
    make, narrow = ROWS[name]
    layer = make(DeadNeuronCounter(8))
    x = torch.randn(6, 8)
    layer(x)
    before = _state(layer)
    for bad in (x[:, :5], x.long(), torch.tensor(1.0), x[:, :narrow] if narrow else x[:1]):
        with pytest.raises((TypeError, ValueError)):
            layer(bad)
    for key, tensor in _state(layer).items():
        assert torch.equal(tensor, before[key]), key


def test_an_autoencoder():
    model = SparseAutoencoder(6, 40, activation=BatchTopK(3), auxk=4)
    x = torch.randn(8, 6)
    model.loss(x)
    before = _state(model)
    for bad in (x[:, :5], x.long(), x.double(), torch.tensor(1.0)):
        with pytest.raises((TypeError, ValueError)):
            model.loss(bad)
    for key, tensor in _state(model).items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_running_statistics_of_the_models_stay_finite(value):
    motifs = PatchMotifs(1, 4, field=(3, 3))
    model = MotifModel(motifs, SpatialSparsity(4, 0.2), SlotReadout(4, (8, 8), 3, 2, pool=2))
    images = torch.randn(3, 1, 8, 8)
    model(images)
    with pytest.raises(ValueError, match="must be finite"):
        model(_spoiled(images, value))
    layer = SparseBottleneck(6, 16, 6, 3, standardize=True)
    assert not layer(_spoiled(torch.randn(5, 6), value)).output.isfinite().all()
    for module in (model, layer):
        for name, tensor in module.state_dict().items():
            assert tensor.isfinite().all(), name


def test_batch_normalisation_of_the_models_is_torchs():
    from sparsekern.sae.normalisation import BatchNorm1d, BatchNorm2d

    for ours, theirs, shape in (
        (BatchNorm1d(3), nn.BatchNorm1d(3), (5, 3)),
        (BatchNorm2d(3), nn.BatchNorm2d(3), (5, 3, 2, 2)),
    ):
        for _ in range(3):
            x = torch.randn(shape)
            assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, ours.state_dict()[name]), name
