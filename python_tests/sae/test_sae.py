"""The sparse autoencoder: its gradients are those of the dense model, also where other libraries'
are not."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsekern.models import SparseAutoencoder
from sparsekern.sae.statistics import geometric_median, total_variance

F = torch.nn.functional


def model_of(**options) -> SparseAutoencoder:
    """A small model in float64, with biases that are not zero."""
    torch.manual_seed(1)
    model = SparseAutoencoder(6, 40, k=options.pop("k", 5), **options).double()
    with torch.no_grad():
        for bias in (model.encoder_bias, model.decoder_bias):
            bias.normal_(std=0.3)
        if not model.tied:
            model.encoder.add_(torch.randn_like(model.encoder), alpha=0.2)
    return model


def rows() -> torch.Tensor:
    return torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def dense_loss(model: SparseAutoencoder, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The module's docstring with dense tensors and plain autograd."""
    norms = model.dictionary.norm(dim=1) if model.scale_scores else torch.ones(())
    scores = F.linear(x - model.decoder_bias, model.encoder, model.encoder_bias) * norms

    def reconstruct(scores, k, bias):
        kept = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        mask = torch.zeros_like(scores).scatter(1, kept, 1.0)
        codes = torch.where(mask > 0, scores.relu(), 0)
        return (codes / norms) @ model.dictionary + bias

    variance = (x - x.mean(0)).square().sum()
    first = reconstruct(scores, model.k, model.decoder_bias)
    fvu = (x - first).square().sum() / variance
    auxk = multi = torch.zeros((), dtype=x.dtype)
    dead = model.counter.dead(model.dead_after)
    if model.auxk and dead.any():
        residual = (x - first).detach()
        among_dead = torch.where(dead, scores, -torch.inf)
        estimate = reconstruct(among_dead, min(model.auxk, int(dead.sum())), 0)
        share = min(1.0, int(dead.sum()) / model.auxk)
        auxk = share * (residual - estimate).square().sum() / variance
    if model.multi_k:
        again = reconstruct(scores, model.multi_k, model.decoder_bias)
        multi = (x - again).square().sum() / variance
    total = fvu + model.auxk_weight * auxk + model.multi_weight * multi
    return {"total": total, "fvu": fvu, "auxk": auxk, "multi": multi}


def some_dead(model: SparseAutoencoder, count: int = 15) -> None:
    model.counter.rows_since_fired[:count] = model.dead_after + 1


VARIANTS = {
    "plain": {},
    "more than the positive scores": {"k": 35},
    "AuxK": {"auxk": 6, "auxk_weight": 0.7},
    "AuxK, fewer dead than wanted": {"auxk": 20, "auxk_weight": 0.7},
    "Multi-TopK": {"multi_k": 20, "multi_weight": 0.5},
    "decoder norms": {"scale_scores": True, "auxk": 6, "multi_k": 10},
    "tied": {"tied": True, "auxk": 6},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_equal_the_dense_model(name):
    model = model_of(**VARIANTS[name]).eval()
    some_dead(model)
    if name == "decoder norms":
        with torch.no_grad():
            model.dictionary.mul_(torch.rand(40, 1, dtype=torch.float64) + 0.5)
    x = rows().requires_grad_()
    _, loss = model.loss(x)
    expected = dense_loss(model, x)
    for part, value in expected.items():
        torch.testing.assert_close(getattr(loss, part), value)
    leaves = [x, *model.parameters()]
    actual = torch.autograd.grad(loss.total, leaves)
    for leaf, grad, right in zip(
        leaves, actual, torch.autograd.grad(expected["total"], leaves), strict=True
    ):
        assert grad.shape == leaf.shape
        torch.testing.assert_close(grad, right)


def test_auxk_reaches_the_encoder_of_dead_latents_only():
    model = model_of(auxk=6).eval()
    some_dead(model)
    _, loss = model.loss(rows())
    grad = torch.autograd.grad(loss.auxk, model.encoder)[0]
    assert grad[:15].abs().sum() > 0 and not grad[15:].any()


def test_the_residual_of_auxk_is_held_constant():
    model = model_of(auxk=6).eval()
    some_dead(model)
    _, loss = model.loss(rows())
    grad = torch.autograd.grad(loss.auxk, model.dictionary)[0]
    assert not grad[15:].any(), "AuxK changed the dictionary rows of living latents"


def test_auxk_does_not_count_the_decoder_bias_twice():
    model = model_of(auxk=40, dead_after=1).eval()
    some_dead(model, 40)
    with torch.no_grad():
        model.encoder_bias.fill_(-1e9)  # every code is zero: the estimate of the residual is zero
    x = rows()
    _, loss = model.loss(x)
    residual = (x - model.decoder_bias).square().sum()
    torch.testing.assert_close(loss.auxk, residual / (x - x.mean(0)).square().sum())


def test_zero_codes_give_no_gradient_and_do_not_fire():
    model = model_of(k=3).train()
    with torch.no_grad():
        model.encoder_bias.fill_(-1e9)
    output, loss = model.loss(rows())
    assert not output.values.any()
    assert not torch.autograd.grad(loss.total, model.encoder)[0].any()
    assert (model.counter.rows_since_fired == 16).all()


def test_dead_latents_are_counted_in_rows():
    model = model_of(dead_after=40).train()
    for _ in range(3):
        model(rows())
    since = model.counter.rows_since_fired
    assert set(since.tolist()) <= {0, 48} and (since == 48).any()
    assert torch.equal(model.counter.dead(40), since == 48)


def test_parallel_gradient_and_norms():
    model = model_of()
    model.normalize_dictionary()
    torch.testing.assert_close(model.dictionary.norm(dim=1), torch.ones(40, dtype=torch.float64))
    model.loss(rows())[1].total.backward()
    before = model.dictionary.grad.clone()
    model.remove_parallel_gradient()
    parallel = (model.dictionary.grad * model.dictionary).sum(1)
    torch.testing.assert_close(parallel, torch.zeros_like(parallel))
    across = before - (before * model.dictionary).sum(1, keepdim=True) * model.dictionary
    torch.testing.assert_close(model.dictionary.grad, across)


def test_geometric_median_is_where_the_pulls_cancel():
    x = torch.randn(200, 5, dtype=torch.float64) * torch.arange(1, 6) + 3
    point = geometric_median(x, steps=2000, tolerance=1e-12)
    pull = F.normalize(x - point, dim=1).sum(0)
    assert pull.norm() < 1e-3
    far = torch.cat([x, torch.full((20, 5), 1e4, dtype=torch.float64)])
    assert (geometric_median(far) - point).norm() < 2, "outliers move a mean, not a median"
    with pytest.raises(ValueError, match="at least one row"):
        geometric_median(x[:0])


def test_k_schedule_and_leading_dimensions():
    model = model_of()
    for k in (40, 7, 1):
        model.k = k
        output = model(rows().view(4, 4, 6))
        assert output.values.shape == output.indices.shape == (4, 4, k)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.40"):
        model.k = 41


def test_state_dict_round_trip_and_copy():
    model = model_of(tied=True).train()
    model(rows())
    other = SparseAutoencoder(6, 40, k=5, tied=True).double()
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model)):
        assert twin.tied
        torch.testing.assert_close(twin.eval()(rows()), model.eval()(rows()))
        assert torch.equal(twin.counter.rows_since_fired, model.counter.rows_since_fired)


def test_bfloat16_autocast_keeps_float32_gradients():
    torch.manual_seed(0)
    model = SparseAutoencoder(32, 256, k=8, auxk=16, multi_k=32)
    some_dead(model, 100)
    x = torch.randn(64, 32)
    _, exact = model.eval().loss(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, loss = model.loss(x)
    assert output.values.dtype == torch.bfloat16 and loss.total.dtype == torch.float32
    assert abs(loss.total - exact.total) < 0.02 * exact.total
    loss.total.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiled_step_equals_eager():
    torch.compiler.reset()
    model = model_of(multi_k=10).eval()
    compiled = torch.compile(lambda x: model.loss(x)[1].total, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(step(rows()), list(model.parameters()))
        for step in (compiled, lambda x: model.loss(x)[1].total)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.slow_on("triton-interpreter")
def test_training_lowers_the_loss_on_every_backend(target):
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(24, 12), dim=1)
    model = SparseAutoencoder(12, 48, k=3, auxk=6, dead_after=500).to(target.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60 if target.thorough else 6):
        codes = torch.rand(64, 24) * (torch.rand(64, 24) < 0.1)
        _, loss = model.loss((codes @ directions).to(target.device))
        optimizer.zero_grad()
        loss.total.backward()
        model.remove_parallel_gradient()
        optimizer.step()
        model.normalize_dictionary()
        losses.append(float(loss.fvu.detach()))
    assert losses[-1] < (0.3 if target.thorough else losses[0])  # 0.34 with an encoder of norm 1


BAD = {
    "features": (ValueError, "features must lie in", lambda: SparseAutoencoder(0, 9, 2)),
    "k": (ValueError, "k must lie in 1..9", lambda: SparseAutoencoder(4, 9, 10)),
    "k type": (TypeError, "k must be an integer", lambda: SparseAutoencoder(4, 9, 2.5)),
    "auxk": (ValueError, "auxk must lie in", lambda: SparseAutoencoder(4, 9, 2, auxk=10)),
    "multi_k": (ValueError, "multi_k must lie in", lambda: SparseAutoencoder(4, 9, 2, multi_k=-1)),
    "dead_after": (ValueError, "dead_after", lambda: SparseAutoencoder(4, 9, 2, dead_after=0)),
    "width": (
        ValueError,
        r"weight must be \[latents, 5\]",
        lambda: SparseAutoencoder(4, 9, 2)(torch.zeros(3, 5)),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    error, text, call = BAD[name]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("kind", ["mean", "one feature", "one row"])
def test_the_variance_of_rows_with_a_large_offset(kind):
    """Real activations have single features, and means, of 1e3 standard deviations and more."""
    torch.manual_seed(0)
    for offset in (0.0, 1e3, 1e4, 1e5):
        x = torch.randn(2048, 16)
        if kind == "mean":
            x += offset
        elif kind == "one feature":
            x[:, 3] += offset
        else:
            x[0] += offset
        exact = (x.double() - x.double().mean(0)).square().sum().item()
        assert total_variance(x).item() == pytest.approx(exact, rel=1e-3)
        assert total_variance(x.view(4, 512, 16)).item() == pytest.approx(exact, rel=1e-3)


def test_rows_that_do_not_differ_have_a_finite_loss():
    """One row left over at the end of an epoch must not ruin the optimizer's state."""
    model = model_of()
    for x in (rows()[:1], rows()[:1].expand(8, 6), torch.zeros(3, 6, dtype=torch.float64)):
        loss = model.loss(x)[1]
        loss.total.backward()
        assert loss.fvu < 1e3, loss.fvu
        assert all(leaf.grad.isfinite().all() for leaf in model.parameters())
