"""OpenAI's Autoencoder and TopK, by a stand-in, accelerated and not."""

from __future__ import annotations

import openai_stand_in
import pytest
import torch
from accelerated import D, K, N, batch, check_equal, check_lifecycle, pair, randomize
from torch import nn

import sparsekern
from sparsekern.integrations.acceleration import LateTensor, report


@pytest.fixture
def model(monkeypatch):
    return openai_stand_in.install(monkeypatch)


def make(model, postact_fn=None, **options):
    autoencoder = model.Autoencoder(N, D, model.TopK(K, postact_fn), **options)
    randomize(autoencoder)
    return autoencoder


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("post", [None, nn.Identity(), nn.Tanh()], ids=str)
def test_forward(model, post, normalize):
    slow, fast = pair(make(model, post, normalize=normalize))

    def call(autoencoder):
        autoencoder(batch(1))
        return autoencoder(batch())

    check_equal(slow, fast, call, lambda result: result[2].square().sum())
    assert isinstance(fast(batch())[0], LateTensor)
    fast.eval()
    assert all(type(tensor) is torch.Tensor for tensor in fast(batch()))


def test_losses_on_all_latents(model):
    slow, fast = pair(make(model))
    check_equal(
        slow, fast, lambda one: one(batch()),
        lambda result: result[0].tanh().sum() + result[1].abs().sum() + result[2].sum(),
    )  # fmt: skip


def test_encode(model):
    slow, fast = pair(make(model))
    check_equal(slow, fast, lambda one: one.encode(batch())[0], lambda out: out.square().sum())
    check_equal(slow, fast, lambda one: one.encode_pre_act(batch(), slice(3, 50)))
    assert type(fast.encode(batch())[0]) is torch.Tensor
    values, indices = fast.encode_sparse(batch())
    dense = torch.zeros(len(values), N).scatter(-1, indices, values)
    torch.testing.assert_close(dense, slow.encode(batch())[0], rtol=1e-5, atol=1e-5)


def test_layer_alone(model):
    slow = nn.Sequential(nn.Linear(D, N), model.TopK(K))
    fast = sparsekern.accelerate(slow, inplace=False)
    assert report(fast).replaced == {"1": "TopK: selection"}
    check_equal(slow, fast, lambda one: one(batch()), lambda out: out.square().sum())


def test_other_activations_are_dense(model):
    autoencoder = model.Autoencoder(N, D)
    randomize(autoencoder)
    slow, fast = pair(autoencoder)
    check_equal(slow, fast, lambda one: one(batch()), lambda out: out[2].square().sum())


def test_hooks(model):
    slow, fast = pair(make(model))
    seen = []
    for one in (slow, fast):
        one.activation.register_forward_hook(lambda *args: seen.append(type(args[2])))
    check_equal(slow, fast, lambda one: one(batch()), lambda out: out[2].square().sum())
    assert seen == [torch.Tensor] * 2


def test_lifecycle(model):
    check_lifecycle(make(model), lambda one: one(batch()))
