"""With normalize_rows, rows are encoded without mean and scale; reconstructions get both back."""

from __future__ import annotations

import pytest
import torch

import sparsekern
from sparsekern.models import SparseAutoencoder

D, N, K = 12, 512, 5
LAYERS = {
    "topk": lambda: sparsekern.TopK(K),
    "batchtopk": lambda: sparsekern.BatchTopK(K),
    "relu": torch.nn.ReLU,
    "jumprelu": lambda: sparsekern.JumpReLU(N, threshold=0.7),
}


def make(kind, **options):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model = SparseAutoencoder(D, N, activation=layer, normalize_rows=True, **options).double()
    with torch.no_grad():
        model.decoder_bias.normal_()
        model.encoder_bias.normal_(-1.0 if kind == "relu" else 0.0, 0.1)
    return model


def rows(count=20):
    """Rows of different means and scales."""
    torch.manual_seed(1)
    scale, mean = 10 * torch.rand(count, 1) + 0.5, 5 * torch.randn(count, 1)
    return (scale * torch.randn(count, D) + mean).double()


def normalized(x):
    mean = x.mean(-1, keepdim=True)
    scale = x.std(-1, keepdim=True)
    return (x - mean) / (scale + 1e-5), mean, scale


def scores_of(model, x):
    return (normalized(x)[0] - model.decoder_bias) @ model.encoder.t() + model.encoder_bias


def keep(scores, k):
    values, indices = scores.topk(k)
    return torch.zeros_like(scores).scatter(-1, indices, values.relu())


def codes_of(model, kind, x):
    scores = scores_of(model, x)
    if kind == "topk":
        return keep(scores, K)
    if kind == "batchtopk":
        return keep(scores.flatten(), K * len(x)).view_as(scores)
    if kind == "relu":
        return scores.relu()
    return scores * (scores > model.activation.threshold.detach())


def decoded(model, codes, x):
    _, mean, scale = normalized(x)
    return (codes @ model.dictionary + model.decoder_bias) * scale + mean


@pytest.mark.parametrize("kind", LAYERS)
def test_codes_and_gradients_are_those_of_the_dense_expression(kind):
    model, x = make(kind), rows().requires_grad_()
    upstream = torch.randn(20, D, dtype=torch.float64)
    codes = codes_of(model, kind, x)
    expected = decoded(model, codes, x)
    inputs = [x, model.encoder, model.encoder_bias, model.dictionary, model.decoder_bias]
    wanted = torch.autograd.grad((expected * upstream).sum(), inputs)

    output = model(x)
    torch.testing.assert_close(output.reconstruction, expected)
    dense = torch.zeros_like(codes).scatter_add(-1, output.indices, output.values)
    torch.testing.assert_close(dense, codes)
    found = torch.autograd.grad((output.reconstruction * upstream).sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    _, mean, scale = normalized(x)
    values, indices = output.values, output.indices
    torch.testing.assert_close(model.decode(values, indices) * scale + mean, expected)
    values, indices = model.encode(x, k=3)
    dense = torch.zeros_like(codes).scatter_add(-1, indices, values.relu())
    torch.testing.assert_close(dense, keep(scores_of(model, x), 3))


def test_every_loss_is_in_the_units_of_the_rows_given():
    model = make("topk", auxk=4, multi_k=3 * K, prefixes=(100,), dead_after=1)
    x = rows()
    fired = torch.zeros(1, N).index_fill(1, torch.arange(300), 1.0)
    for _ in range(2):
        model.counter.update(fired)
    dead = torch.arange(N) >= 300
    scores, codes = scores_of(model, x), codes_of(model, "topk", x)
    variance = (x - x.mean(0)).square().sum()
    reconstruction = decoded(model, codes, x)
    residual = (x - reconstruction).detach()
    only = keep(scores.masked_fill(~dead, -torch.inf), 4)
    scale = x.std(-1, keepdim=True)
    wanted = {
        "fvu": residual.square().sum() / variance,
        "auxk": (residual - only @ model.dictionary * scale).square().sum() / variance,
        "multi": (x - decoded(model, keep(scores, 3 * K), x)).square().sum() / variance,
        "prefixes": (x - decoded(model, codes * (torch.arange(N) < 100), x)).square().sum()
        / variance,
    }
    model.eval()
    _, loss = model.loss(x)
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(loss, name), value.to(loss.total.dtype), msg=name)


def test_results_do_not_depend_on_mean_and_scale():
    model, x = make("topk").eval(), rows()
    one, other = model(x), model(100 * x + 7)
    assert torch.equal(one.indices, other.indices)
    torch.testing.assert_close(
        other.reconstruction, 100 * one.reconstruction + 7, rtol=1e-4, atol=0
    )
    before = model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    model.fold_normalization(3.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_it_is_initialized_and_calibrated_for_normalized_rows():
    model, x = make("batchtopk"), rows(400)
    plain = SparseAutoencoder(D, N, activation=sparsekern.BatchTopK(K)).double()
    plain.load_state_dict(model.state_dict())
    model.initialize(x)
    plain.initialize(normalized(x)[0])
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    active = (model.eval().encode(x).values > 0).sum() / len(x)
    assert abs(active - K) < 0.05


def test_rows_of_one_number_have_no_deviation():
    with pytest.raises(ValueError, match="features must be at least 2 with normalize_rows"):
        SparseAutoencoder(1, 4, k=1, normalize_rows=True)


def test_one_graph_is_compiled():
    model, x = make("topk").float(), rows().float()
    expected = model(x).reconstruction
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).reconstruction, expected)
