"""accelerate, restore and report on models of any kind, and what they refuse."""

from __future__ import annotations

import threading

import openai_stand_in
import pytest
import torch
from accelerated import D, K, N, batch, randomize
from torch import nn
from torch_alone import run_after_torch

import sparsekern
from sparsekern.integrations.acceleration import peers as known_peers
from sparsekern.integrations.acceleration import report


@pytest.fixture
def library(monkeypatch):
    return openai_stand_in.install(monkeypatch)


def make(library):
    autoencoder = library.Autoencoder(N, D, library.TopK(K))
    randomize(autoencoder)
    return autoencoder


def test_importing_sparsekern_imports_no_other_library():
    code = (
        "import sys, sparsekern; before = set(sys.modules)\n"
        "assert not any(m.startswith('sparsekern.integrations') for m in before)\n"
        "sparsekern.accelerate\n"
        "roots = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "known = {p.module for p in sparsekern.integrations.acceleration.peers.PEERS}\n"
        "assert len(known) == 5 and not roots & known, roots\n"
    )
    run = run_after_torch(code)
    assert run.returncode == 0, run.stderr


def test_nothing_to_replace():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    before = dict(model.named_modules())
    with pytest.warns(UserWarning, match="Sequential has nothing to replace: nothing of a known"):
        assert sparsekern.accelerate(model) is model
    assert dict(model.named_modules()) == before and str(report(model)).startswith("nothing")
    assert sparsekern.restore(model) is model


@pytest.mark.parametrize("function", [sparsekern.accelerate, sparsekern.restore])
def test_no_module(function):
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
        function([nn.Linear(2, 3)])


def test_parts_of_a_model(library):
    model = nn.ModuleDict(
        {"one": make(library), "two": nn.Sequential(make(library)), "x": nn.ReLU()}
    )
    same = model["one"]
    model["again"] = same  # a module in two places
    keys = list(model.state_dict())
    sparsekern.accelerate(model)
    assert model["one"] is model["again"] is same
    assert list(model.state_dict()) == keys
    assert set(report(model).replaced) == {
        "one", "one.activation", "two.0", "two.0.activation",
    }  # fmt: skip
    sparsekern.restore(model)
    assert not report(model).replaced
    assert set(report(model).left) == {"one", "one.activation", "two.0", "two.0.activation"}


def test_copy_leaves_the_model(library):
    model = make(library)
    fast = sparsekern.accelerate(model, inplace=False)
    assert type(model) is library.Autoencoder and type(fast) is not type(model)
    for one, two in zip(model.parameters(), fast.parameters(), strict=True):
        assert torch.equal(one, two) and one.data_ptr() != two.data_ptr()


def test_twice(library):
    model = make(library)
    accelerated = type(sparsekern.accelerate(model))
    assert type(sparsekern.accelerate(model)) is accelerated and not model.match_upstream
    other = type(sparsekern.accelerate(model, match_upstream=True))
    assert other is not accelerated and model.match_upstream
    assert "as upstream" in str(report(model))
    assert type(sparsekern.restore(model)) is library.Autoencoder


@pytest.mark.parametrize("installed", ["0.0.9", "9.0", "1.0.0rc1"])
def test_untested_version(library, monkeypatch, installed):
    model = make(library)
    peer = next(one for one in known_peers.PEERS if one.module == "sparse_autoencoder")
    versioned = peer._replace(package="sparse-autoencoder", oldest="1.0.1", newest="1.2.0")
    monkeypatch.setattr(known_peers, "PEERS", (versioned,))
    monkeypatch.setattr(known_peers, "version", lambda package: installed)
    message = rf"sparse-autoencoder must be 1.0.1 to 1.2.0 \(the versions tested\), got {installed}"
    with pytest.raises(ValueError, match=message):
        sparsekern.accelerate(model)
    assert type(model) is library.Autoencoder
    assert "must be 1.0.1 to 1.2.0" in str(report(model))


@pytest.mark.parametrize("installed", ["1.0.1", "1.1", "1.2.0+local"])
def test_tested_version(library, monkeypatch, installed):
    peer = next(one for one in known_peers.PEERS if one.module == "sparse_autoencoder")
    versioned = peer._replace(package="sparse-autoencoder", oldest="1.0.1", newest="1.2.0")
    monkeypatch.setattr(known_peers, "PEERS", (versioned,))
    monkeypatch.setattr(known_peers, "version", lambda package: installed)
    assert report(sparsekern.accelerate(make(library))).replaced


def test_compiled_model(library):
    for compiled in (torch.compile(make(library)), nn.Sequential(torch.compile(make(library)))):
        with pytest.raises(ValueError, match="must not be compiled yet, got a compiled"):
            sparsekern.accelerate(compiled)
    model = make(library)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="must not be compiled yet"):
        sparsekern.accelerate(model)
    assert type(model) is library.Autoencoder


def test_compiled_afterwards(library):
    model = make(library)
    expected = model(batch())[2]
    compiled = torch.compile(sparsekern.accelerate(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch())[2], expected)


def test_subclasses_with_methods_of_their_own(library):
    class Louder(library.Autoencoder):
        def decode(self, latents, info=None):
            return 2 * super().decode(latents, info)

    class Different(library.Autoencoder):
        def encode(self, x):
            return super().encode(x)

    loud = Louder(N, D, library.TopK(K))
    randomize(loud)
    expected = loud(batch())[2]
    torch.testing.assert_close(sparsekern.accelerate(loud)(batch())[2], expected)
    assert isinstance(loud, Louder) and "decoder" in report(loud).replaced[""]
    different = sparsekern.accelerate(Different(N, D, library.TopK(K)))
    assert type(different) is Different
    assert report(different).left[""] == "Different: encode is its own"


@pytest.mark.parametrize("active", [0, 3, N // 2])
def test_decoding_of_dense_latents(library, active):
    """Few of them are decoded by their codes; with a gradient, all latents have theirs."""
    latents = torch.zeros(7, N)
    latents[:, :active] = torch.randn(7, active)
    plain, model = make(library), sparsekern.accelerate(make(library))
    results = []
    for one in (plain, model):
        leaf = latents.clone().requires_grad_()
        one.zero_grad()
        (one.decode(leaf).square().sum() + one.decode(latents).square().sum()).backward()
        results.append([one.decode(latents).detach(), leaf.grad, one.decoder.weight.grad.clone()])
    for got, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if active:
        assert (results[0][1] != 0).all()


def test_frozen_parameters_and_no_grad(library):
    model = sparsekern.accelerate(make(library))
    model.encoder.weight.requires_grad_(False)
    model(batch())[2].sum().backward()
    assert model.encoder.weight.grad is None and model.decoder.weight.grad is not None
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            scores, latents, out = model(batch())
            assert not out.requires_grad and not scores.requires_grad
            torch.testing.assert_close(model.decode(latents + 0), out)


def test_functional_transforms(library):
    model = sparsekern.accelerate(make(library))
    plain = make(library)
    x = batch()
    got = torch.vmap(lambda row: model.encode(row)[0])(x)
    torch.testing.assert_close(got, plain.encode(x)[0], rtol=1e-5, atol=1e-5)
    empty = sparsekern.accelerate(make(library).to("meta"))
    assert empty.encode(torch.empty(3, D, device="meta"))[0].shape == (3, N)


def test_gradient_checkpointing(library):
    from torch.utils.checkpoint import checkpoint

    model = sparsekern.accelerate(make(library))
    grads = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        call(batch())[2].square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_threads_do_not_share_what_encoders_return(library):
    model = sparsekern.accelerate(make(library)).eval()
    wrong = []

    def run():
        for _ in range(20):
            if type(model.encode(batch())[0]) is not torch.Tensor:
                wrong.append("late")
            model(batch())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
