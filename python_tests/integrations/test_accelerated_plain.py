"""Modules of no known library whose own code selects and scatters, accelerated and not."""

from __future__ import annotations

import functools
import operator
import threading
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerated import D, N, check_equal, check_lifecycle, gradients, pair, randomize, tensors
from torch import nn
from torch.nn import functional as F

import sparsekern
from sparsekern.integrations.acceleration import report

ROWS, K, WIDE = 64, 6, 1024


def scores(seed=0, *shape):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (ROWS, WIDE)), generator=draw)


class Layer(nn.Module):
    """What all of the layers below have: k, and a function of the selected values."""

    def __init__(self, k=K, post=None):
        super().__init__()
        self.k = k
        self.post = nn.ReLU() if post is None else post


class Scattered(Layer):
    def forward(self, x):
        values, indices = torch.topk(x, self.k, dim=-1)
        return torch.zeros_like(x).scatter_(-1, indices, self.post(values))


class Unsorted(Layer):
    def forward(self, x):
        found = x.topk(k=self.k, sorted=False)
        return self.post(x.new_zeros(x.shape).scatter(x.dim() - 1, found.indices, found.values))


class AtMostAll(Layer):
    def forward(self, x):
        found = F.relu(x).topk(min(self.k, x.size(-1)), dim=1)
        zeros = torch.zeros(x.shape, device=x.device, dtype=x.dtype)
        zeros.scatter_(1, found[1], found[0])
        return zeros


class Written(Layer):
    def forward(self, x):
        values, indices = x.topk(self.k)
        out = torch.zeros_like(x)
        out[torch.arange(len(x))[:, None], indices] = values
        return out


class Masked(Layer):
    def forward(self, x):
        mask = torch.zeros_like(x).scatter_(-1, x.abs().topk(self.k).indices, 1.0)
        return x * mask


class BoolMask(Layer):
    def forward(self, x):
        mask = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, x.topk(self.k)[1], True)
        return torch.where(mask, x, 0)


class Magnitudes(Layer):
    def forward(self, x):
        indices = torch.topk(x.abs(), self.k).indices
        return torch.scatter(torch.zeros_like(x), -1, indices, x.gather(-1, indices))


class Threshold(Layer):
    def forward(self, x):
        return x * (x >= x.topk(self.k, dim=-1).values[..., -1:])


class Kth(Layer):
    def forward(self, x):
        kth = torch.kthvalue(x, x.shape[-1] - self.k + 1, dim=-1, keepdim=True).values
        return F.relu(torch.where(x >= kth, x, 0.0))


class Batch(Layer):
    def forward(self, x):
        flat = self.post(x).flatten()
        values, indices = flat.topk(int(self.k * len(x)), sorted=False)
        return torch.zeros_like(flat).scatter(-1, indices, values).view(x.shape)


class BatchWithThreshold(Layer):
    """Its evaluation has other code than its training."""

    def __init__(self, k=K):
        super().__init__(k)
        self.register_buffer("threshold", torch.tensor(0.0))

    def forward(self, x):
        if not self.training:
            return x * (x > self.threshold)
        flat = x.reshape(-1)
        values, indices = flat.topk(self.k * x.shape[0], dim=0)
        self.threshold = values.min().detach()
        return torch.zeros_like(flat).scatter_(0, indices, values).reshape_as(x)


class Columns(Layer):
    def forward(self, x):
        values, indices = x.topk(min(self.k, len(x)), dim=0)
        return torch.zeros_like(x).scatter(0, indices, values)


class Derived(Scattered):
    def forward(self, x):
        return 2 * super().forward(x)


def chosen(x, k):
    values, indices = torch.topk(x, k)
    return torch.zeros_like(x).scatter(-1, indices, values)


def decorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


class ByFunction(Layer):
    @decorated
    def forward(self, x):
        return chosen(x, self.k)


class ChangedLater(Layer):
    """What was scattered is changed in place, which a scatter does not see."""

    def forward(self, x):
        values, indices = torch.topk(input=x, k=self.k)
        values = 2 * values
        out = torch.zeros_like(input=x).scatter_(dim=-1, index=indices, src=values)
        values.detach().zero_()
        return out


class OneRow(Layer):
    def forward(self, x):
        row = x.reshape(1, -1, 1)
        values, indices = row.topk(self.k, dim=1)
        zeros = torch.zeros(np.int64(row.numel()), dtype=x.dtype)
        return zeros.scatter(0, indices.flatten(), values.flatten()).view_as(x)


class Annealed(nn.Module):
    """Keeps less and less; k is a buffer."""

    def __init__(self, k=K):
        super().__init__()
        self.register_buffer("k", torch.tensor(k + 2))

    def forward(self, x):
        if self.training:
            self.k -= 1
        return chosen(x, self.k)


LAYERS = [
    Scattered, Unsorted, AtMostAll, Written, Masked, BoolMask, Magnitudes, Threshold, Kth, Batch,
    BatchWithThreshold, Columns, Derived, ByFunction, ChangedLater, OneRow, Annealed,
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
@pytest.mark.parametrize(
    "shape",
    [(ROWS, WIDE), pytest.param((256, 17000), marks=pytest.mark.slow), (2, 8)],
    ids=str,
)
def test_layers(layer, shape):
    """Bit for bit; the second shape is so large that what is scattered is late, the third small."""
    slow, fast = pair(layer())
    assert report(fast).replaced[""].startswith(f"{layer.__name__}: selections by its own code")
    for training in (True, False):
        results = []
        for one in (slow.train(training), fast.train(training)):
            x = scores(1, *shape).requires_grad_()
            out = one(x)
            assert type(out) is torch.Tensor
            (grad,) = torch.autograd.grad(out.square().sum(), x)
            results.append((out, grad, *one.buffers()))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 1024), (9000,)], ids=str)
def test_dtypes_and_dimensions(dtype, shape):
    x = scores(0, *shape).to(dtype)
    slow, fast = pair(Threshold())  # of equal scores it keeps all
    assert torch.equal(fast(x), slow(x)) and fast(x).dtype == dtype


def test_images():
    """Channels are selected at each place, or places in each channel."""

    class Channels(Layer):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 32, 3)

        def forward(self, x):
            h = self.layer(x)
            values, indices = h.topk(self.k, dim=1)
            return torch.zeros_like(h).scatter_(1, indices, values)

    class Places(Layer):
        def forward(self, x):
            b, c, _, _ = x.shape
            return chosen(x.view(b, c, -1), self.k).view_as(x)

    images = scores(0, 4, 3, 40, 40)
    for layer in (Channels, Places):
        slow, fast = pair(layer())
        assert torch.equal(fast(images), slow(images))


def test_equal_scores_are_ordered_by_index():
    x = torch.zeros(8, 2048)
    assert sparsekern.accelerate(Scattered(2, nn.Identity()))(x + 1)[0].nonzero().tolist() == [
        [0], [1],
    ]  # fmt: skip
    x[:, 7:] = 1
    slow, fast = pair(Threshold(2))
    assert torch.equal(fast(x), slow(x)) and fast(x).sum() == x.sum()


def test_what_is_changed_later_counts():
    slow, fast = pair(Scattered())
    x = scores()
    for one in (slow, fast):
        one.k = 11
    assert torch.equal(fast(x), slow(x)) and (fast(x) > 0).sum() == 11 * ROWS
    for one in (slow, fast):
        one.post = nn.Tanh()
    assert torch.equal(fast(x), slow(x)) and (fast(x) > fast(x).tanh()).any()
    fast.k = WIDE + 1
    with pytest.raises(RuntimeError, match="out of range"):  # torch's own
        fast(x)


@pytest.mark.parametrize("layer", [Scattered, Batch, Kth, Derived])
def test_lifecycle(layer):
    check_lifecycle(layer(), lambda one: one(scores()))


class Autoencoder(nn.Module):
    """A whole one in a class of its own; its encoder selects."""

    def __init__(self, d=D, n=N, k=K):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(d, n), nn.Linear(n, d)
        self.bias = nn.Parameter(torch.zeros(d))
        self.k = k

    def encode(self, x):
        z = self.encoder(x - self.bias)
        values, indices = z.topk(self.k)
        return torch.zeros_like(z).scatter_(-1, indices, values.relu())

    def decode(self, z):
        return self.decoder(z) + self.bias

    def forward(self, x):
        z = self.encode(x)
        return self.decode(z), z


class AroundLayer(nn.Module):
    """One whose layer is a module."""

    def __init__(self, layer):
        super().__init__()
        self.encoder, self.layer = nn.Linear(D, N), layer
        self.W_dec = nn.Parameter(torch.zeros(N, D))

    def forward(self, x):
        return self.layer(self.encoder(x)) @ self.W_dec


def sequential():
    return nn.Sequential(nn.Linear(D, N), Scattered(), nn.Linear(N, D))


AUTOENCODERS = {
    "own": Autoencoder,
    "around": lambda: AroundLayer(Scattered()),
    "batch": lambda: AroundLayer(Batch()),
    "sequential": sequential,
}


def autoencoder(name):
    model = AUTOENCODERS[name]()
    randomize(model)
    return model


def rows(seed=0):
    return scores(seed, ROWS, D)


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoders(name):
    model = autoencoder(name)
    inside = name != "own"
    fast = sparsekern.accelerate(model, inplace=False)
    layers = {"around": "layer", "batch": "layer", "sequential": "1"}
    expected = {layers[name]} if inside else {""}
    if name in ("around", "sequential"):  # decoded by codes
        expected.add("")
    assert set(report(fast).replaced) == expected
    check_equal(model, fast, lambda one: one(rows()), lambda out: first(out).square().sum())
    assert all(type(tensor) is torch.Tensor for tensor in tensors(fast(rows())))


def test_own_encode():
    model = autoencoder("own")
    _, fast = pair(model)
    check_equal(model, fast, lambda one: one.encode(rows()), lambda z: z.square().sum())
    assert type(fast.encode(rows())) is torch.Tensor
    assert type(fast(rows())[1]) is torch.Tensor


def test_decoder_never_sees_dense_activations(monkeypatch):
    """The product is ours, forwards and backwards."""
    from sparsekern.integrations.acceleration import late

    calls = []
    own = late.sparse_matmul
    monkeypatch.setattr(late, "sparse_matmul", lambda *a, **b: calls.append(1) or own(*a, **b))
    for name in ("own", "around", "sequential"):
        calls.clear()
        sparsekern.accelerate(autoencoder(name))(rows())
        assert calls, name


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_lifecycle_of_autoencoders(name):
    if name == "own":
        check_lifecycle(autoencoder(name), lambda one: one(rows()))
        return
    model = autoencoder(name)
    expected = model(rows())
    sparsekern.accelerate(model)
    torch.testing.assert_close(model(rows()), expected)
    sparsekern.restore(model)
    assert not report(model).replaced and torch.equal(model(rows()), expected)


def test_hooks():
    """They get dense tensors, and may change what they get."""
    model = autoencoder("sequential")

    def seen_by_hooks(one):
        seen = []
        one[1].register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
        one[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        return [one(rows()), *seen]

    fast = sparsekern.accelerate(model, inplace=False)
    for got, expected in zip(seen_by_hooks(fast), seen_by_hooks(model), strict=True):
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_compiled_afterwards(name):
    model = autoencoder(name)
    expected = first(model(rows()))
    compiled = torch.compile(sparsekern.accelerate(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(first(compiled(rows())), expected)


@pytest.mark.parametrize("name", ["own", "around", "sequential"])
def test_autocast(name):
    """Rows whose k-th score equals the next one may select another latent."""
    model = autoencoder(name)
    fast = sparsekern.accelerate(model, inplace=False)
    encoder = model[0] if name == "sequential" else model.encoder
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = first(fast(rows())), first(model(rows()))
        scored = encoder(rows() - getattr(model, "bias", 0)).topk(K + 1).values
    assert got.dtype == expected.dtype
    definite = scored[:, K - 1] > scored[:, K]
    assert definite.sum() > ROWS / 2
    largest = expected.abs().max().item()
    torch.testing.assert_close(
        got[definite].float(), expected[definite].float(), rtol=0, atol=2**-7 * largest
    )


def test_functional_transforms_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    slow, fast = pair(autoencoder("own"))
    got = torch.vmap(lambda row: fast(row)[0])(rows())
    torch.testing.assert_close(got, slow(rows())[0], rtol=1e-5, atol=1e-5)
    check_equal(
        slow, fast, lambda one: checkpoint(one, rows(), use_reentrant=False)[0],
        lambda out: out.square().sum(),
    )  # fmt: skip


def test_an_error_of_the_module_leaves_nothing_behind():
    class Fragile(Autoencoder):
        def forward(self, x):
            out = super().forward(x)[0]
            if x.shape[0] == 3:
                raise KeyError("three rows")
            return out

    model = sparsekern.accelerate(Fragile(n=WIDE))
    assert "" in report(model).replaced
    with pytest.raises(KeyError, match="three rows"):
        model(rows()[:3])
    assert type(model.encode(rows())) is torch.Tensor  # it is not inside a forward pass any more


def test_threads():
    model = autoencoder("own")
    expected = model(rows())[0].detach()
    sparsekern.accelerate(model)
    wrong = []

    def run():
        for _ in range(20):
            if type(model.encode(rows())) is not torch.Tensor:
                wrong.append("late")
            if not torch.allclose(model(rows())[0], expected, rtol=1e-5, atol=1e-5):
                wrong.append("other")

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_code_that_maps_over_rows():
    class Mapped(Layer):
        def forward(self, x):
            return torch.vmap(lambda row: chosen(row, self.k))(x)

    model = Mapped()
    with pytest.warns(UserWarning, match="Mapped: forward calls no topk"):
        sparsekern.accelerate(model)
    assert type(model) is Mapped


# -- what stays as it is, with the reason ----------------------------------------------------------


class TwoInputs(Layer):
    def forward(self, x, other):
        return chosen(x, self.k) + other


class Smallest(Layer):
    def forward(self, x):
        return x.topk(self.k, largest=False).values


class Integers(Layer):
    def forward(self, x):
        return x.long().topk(self.k).values


class ByNumbers(Layer):
    def forward(self, x):
        return chosen(x, self.k) if x.sum().item() > 0 else x


class Fails(Layer):
    def forward(self, x):
        raise KeyError(x.topk(self.k).values.shape)


class NotAlways(Layer):
    def forward(self, x):
        return chosen(x, self.k) if x.shape[-1] == 7 else x


@dataclass
class Result:
    z: torch.Tensor


class Wrapped(Layer):
    def forward(self, x):
        return Result(chosen(x, self.k))


class Kept(Layer):
    def forward(self, x):
        self.last = chosen(x, self.k)
        return self.last


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class OwnFunction(Layer):
    """Its function looks past the functions of torch, where a late tensor has no gradient."""

    def forward(self, x):
        return Identity.apply(chosen(x, self.k))


class Counted(Layer):
    def __deepcopy__(self, memo):
        raise ValueError("there is only one")

    def forward(self, x):
        return chosen(x, self.k)


REFUSED = {
    TwoInputs: "forward takes other arguments than one tensor",
    Smallest: "topk of the smallest is not faster",
    Integers: "topk of torch.int64 is not faster",
    ByNumbers: "forward cannot be followed: RuntimeError: Tensor.item() cannot be called on meta "
    "tensors; it reads numbers of tensors: call sparsekern.topk in it instead",
    Fails: "forward cannot be followed: KeyError: torch.Size([8, 6])",
    NotAlways: "forward calls no topk",
    Wrapped: "forward fails on random rows: TypeError: the result holds a Result",
    Kept: "forward fails with our selections: TypeError: activations are kept in the attribute la",
    OwnFunction: "forward has other gradients with our selections",
    Counted: "a copy of another class cannot be made: ValueError: there is only one",
}


@pytest.mark.parametrize("layer", REFUSED, ids=lambda layer: layer.__name__)
def test_refused(layer):
    model = nn.Sequential(layer())
    with pytest.warns(UserWarning, match="nothing to replace"):
        sparsekern.accelerate(model)
    assert type(model[0]) is layer and not report(model).replaced
    reason = report(model).left["0"]
    assert reason.startswith(f"{layer.__name__}: {REFUSED[layer]}"), reason


def test_forward_of_one_module():
    model = Scattered()
    model.forward = functools.partial(operator.mul, 2)
    with pytest.warns(UserWarning, match="forward is an attribute of this module alone"):
        sparsekern.accelerate(model)
    assert torch.equal(model(scores()), 2 * scores())


def test_the_trial_leaves_no_trace():
    calls = []

    class Noted(Layer):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))
            self.weight = nn.Parameter(torch.ones(WIDE))

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            return chosen(F.dropout(x, 0.1, self.training) * self.weight, self.k)

    model = Noted()
    model.register_forward_hook(lambda *_: calls.append("hook"))
    before = torch.random.get_rng_state()
    sparsekern.accelerate(model)
    assert "" in report(model).replaced
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (model.calls, model.seen.item(), calls, model.weight.grad) == (0, 0.0, [], None)
    model(scores())
    assert (model.calls, model.seen.item(), calls) == (1, 1.0, ["hook"])


Pair = namedtuple("Pair", "z indices")


class Several(Layer):
    def forward(self, x):
        values, indices = x.topk(self.k)
        z = torch.zeros_like(x).scatter(-1, indices, values)
        return {"pair": Pair(z, indices), "list": [z, None], "k": self.k}


def test_results_of_several_parts():
    slow, fast = pair(Several())
    got, expected = fast(scores(0, 512, 16384)), slow(scores(0, 512, 16384))
    assert type(got["pair"]) is Pair and type(got["pair"].z) is torch.Tensor
    assert got["list"][0] is not None and got["k"] == K
    for one, two in zip(tensors(got), tensors(expected), strict=True):
        assert torch.equal(one, two)


def test_gradients_of_frozen_parameters():
    model = autoencoder("own")
    model.encoder.requires_grad_(False)
    fast = sparsekern.accelerate(model)
    assert "" in report(fast).replaced
    fast(rows())[0].sum().backward()
    have = {name for name, grad in gradients(fast).items() if grad is not None}
    assert have == {"decoder.weight", "decoder.bias", "bias"}
