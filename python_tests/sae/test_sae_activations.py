"""Every activation of the sparse autoencoder trains as the dense expression does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern.models import SparseAutoencoder
from sparsekern.nn import scores as scores_module

F = torch.nn.functional
LATENTS = 40

ACTIVATIONS = {
    "TopK": lambda: sparsekern.TopK(5),
    "TopK in groups": lambda: sparsekern.TopK(5, groups=5),
    "BatchTopK": lambda: sparsekern.BatchTopK(4),
    "BatchTopK of a fraction": lambda: sparsekern.BatchTopK(2.3),
    "JumpReLU": lambda: sparsekern.JumpReLU(LATENTS, threshold=0.4, bandwidth=0.8),
    "ReLU": nn.ReLU,
}
OPTIONS = {
    "plain": {},
    "sparsity and AuxK": {"sparsity_weight": 0.1, "auxk": 6, "auxk_weight": 0.7},
    "decoder norms": {"scale_scores": True, "sparsity_weight": 0.1},
    "prefixes": {"prefixes": (3, 10, 30)},
    "prefixes, norms, tied": {"prefixes": (1, 39), "scale_scores": True, "tied": True},
}


@pytest.fixture(params=["sparse", "dense"])
def path(request, monkeypatch):
    """Codes however wide, found by a selection that has to grow; or dense scores from the start."""
    monkeypatch.setattr(scores_module, "NARROWEST", 1 if request.param == "sparse" else 1000)
    return request.param


def model_of(activation: nn.Module, **options) -> SparseAutoencoder:
    torch.manual_seed(1)
    model = SparseAutoencoder(6, LATENTS, activation=activation, **options).double()
    with torch.no_grad():
        for bias in (model.encoder_bias, model.decoder_bias):
            bias.normal_(std=0.3)
        if not model.tied:
            model.encoder.add_(torch.randn_like(model.encoder), alpha=0.2)
        model.dictionary.mul_(torch.rand(LATENTS, 1, dtype=torch.float64) + 0.5)
    model.counter.rows_since_fired[:15] = model.dead_after + 1
    model._width.count = 0
    model.eval().activation.train()  # the activation trains, and nothing else changes
    return model


def rows(shape: tuple[int, ...] = (16,)) -> torch.Tensor:
    return torch.randn(*shape, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def activated(layer: nn.Module, scores: torch.Tensor) -> torch.Tensor:
    """The activation's definition, on all scores."""
    if isinstance(layer, sparsekern.TopK):
        groups = scores.unflatten(-1, (layer.groups, -1))
        order = groups.sort(dim=-1, descending=True, stable=True).indices
        kept = order[..., : layer.k // layer.groups]
        mask = torch.zeros_like(groups).scatter(-1, kept, 1.0).flatten(-2)
        return torch.where(mask > 0, scores.relu(), 0)
    if isinstance(layer, sparsekern.BatchTopK):
        total = int(layer.k * (scores.numel() // LATENTS))
        kept = scores.flatten().sort(descending=True, stable=True).indices[:total]
        mask = torch.zeros_like(scores).flatten().scatter(0, kept, 1.0).view_as(scores)
        return torch.where(mask > 0, scores.relu(), 0)
    return layer(scores)


def dense_loss(model: SparseAutoencoder, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The docstring of the model with dense tensors and plain autograd."""
    norms = model.dictionary.norm(dim=1) if model.scale_scores else torch.ones(())
    scores = F.linear(x - model.decoder_bias, model.encoder, model.encoder_bias) * norms
    codes = activated(model.activation, scores)
    variance = (x - x.mean(0)).square().sum()

    def error(last: int) -> torch.Tensor:
        estimate = (codes / norms)[:, :last] @ model.dictionary[:last] + model.decoder_bias
        return (x - estimate).square().sum() / variance

    fvu = error(LATENTS)
    prefixes = sum((error(prefix) for prefix in model.prefixes), torch.zeros(()))
    auxk = sparsity = torch.zeros(())
    if isinstance(model.activation, sparsekern.JumpReLU):
        sparsity = model.activation.l0(scores)
    elif isinstance(model.activation, nn.ReLU):
        sparsity = codes.sum(-1).mean()
    if model.auxk:
        dead = model.counter.dead(model.dead_after)
        among = torch.where(dead, scores, -torch.inf)
        kept = among.topk(model.auxk).indices
        mask = torch.zeros_like(scores).scatter(1, kept, 1.0)
        estimate = torch.where(mask > 0, scores.relu(), 0) / norms @ model.dictionary
        first = codes / norms @ model.dictionary + model.decoder_bias
        auxk = ((x - first).detach() - estimate).square().sum() / variance
    total = fvu + model.auxk_weight * auxk + model.sparsity_weight * sparsity + prefixes
    return {"total": total, "fvu": fvu, "auxk": auxk, "sparsity": sparsity, "prefixes": prefixes}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_loss_and_gradients_equal_the_dense_model(path, name, options):
    model = model_of(ACTIVATIONS[name](), **OPTIONS[options])
    x = rows()
    expected = dense_loss(model, x)
    leaves = list(model.parameters())
    wanted = torch.autograd.grad(expected["total"], leaves, allow_unused=True)
    for _ in range(2):  # the second time with the width that the first one needed
        loss = model.loss(x)[1]
        for part, value in expected.items():
            torch.testing.assert_close(
                getattr(loss, part), value, check_dtype=False, msg=lambda m, p=part: f"{p}: {m}"
            )
        grads = torch.autograd.grad(loss.total, leaves, allow_unused=True)
        for leaf, grad, right in zip(model.named_parameters(), grads, wanted, strict=True):
            if right is None:
                assert grad is None or not grad.any(), leaf[0]
            else:
                torch.testing.assert_close(
                    grad, right, check_dtype=False, msg=lambda m, n=leaf[0]: f"{n}: {m}"
                )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_second_derivatives_equal_the_dense_model(path, name):
    model = model_of(ACTIVATIONS[name](), sparsity_weight=0.1, scale_scores=True, prefixes=(9,))
    x = rows()
    leaves = list(model.parameters())

    def second(total: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    wanted = second(dense_loss(model, x)["total"])
    found = second(model.loss(x)[1].total)
    for (leaf, _), grad, right in zip(model.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(
            grad, right, check_dtype=False, msg=lambda m, n=leaf: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_codes_in_evaluation_equal_the_layers(path, name):
    model = model_of(ACTIVATIONS[name]())
    x = rows((3, 5))
    model.loss(x)  # sets the threshold of BatchTopK
    model.eval()
    values, indices = model.encode(x)
    scores = F.linear(x - model.decoder_bias, model.encoder, model.encoder_bias)
    found = torch.zeros_like(scores).scatter_add(-1, indices, values)
    layer = model.activation
    torch.testing.assert_close(found, layer(scores) if not layer.training else None)
    torch.testing.assert_close(model.decode(values, indices), model(x).reconstruction)


@pytest.mark.parametrize("shape", [(0,), (), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_rows_and_a_single_row(path, name, shape):
    model = model_of(ACTIVATIONS[name](), prefixes=(7,))
    output, loss = model.loss(rows(shape))
    assert output.reconstruction.shape == (*shape, 6)
    assert output.values.shape == output.indices.shape
    loss.total.backward()
    assert all(leaf.grad is not None for leaf in (model.encoder, model.dictionary))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_is_passed_on(path, name):
    model = model_of(ACTIVATIONS[name]())
    x = rows()
    x[3, 1] = torch.nan
    reconstruction = model(x).reconstruction
    assert reconstruction[3].isnan().all()
    if not isinstance(model.activation, sparsekern.BatchTopK):  # whose rows share a selection
        assert not reconstruction[torch.arange(16) != 3].isnan().any()


def test_the_width_follows_what_the_fullest_row_needs(monkeypatch):
    monkeypatch.setattr(scores_module, "NARROWEST", 2)
    model = model_of(nn.ReLU())
    with torch.no_grad():
        model.encoder_bias.fill_(-20.0)
    model._width.count = 0
    output = model(rows())
    assert output.values.shape == (16, 1) and not output.values.any()
    with torch.no_grad():
        model.encoder_bias.fill_(0.3)
    wide = model(rows())
    assert wide.values.shape[1] == LATENTS, "one in two is exceeded: dense"
    with torch.no_grad():
        model.encoder_bias.fill_(-2.0)
    model(rows())
    narrow = model(rows())
    assert narrow.values.shape[1] <= LATENTS // 2, "and is left again"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_came_before_does_not_matter(name, monkeypatch):
    """The way to the codes follows from the input alone: a resumed run has the same bits."""
    monkeypatch.setattr(scores_module, "NARROWEST", 2)
    model = model_of(ACTIVATIONS[name]())
    for shift in (-3.0, -1.0, 0.5):
        with torch.no_grad():
            model.encoder_bias.fill_(shift)
        found = []
        for count in (0, 7, 15, LATENTS):
            model._width.count = count
            output, loss = model.loss(rows())
            gradient = torch.autograd.grad(loss.total, model.encoder)[0]
            found.append((output.values, output.indices, gradient))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_batch_topk_in_evaluation_does_not_round_its_threshold():
    model = SparseAutoencoder(16, 2048, activation=sparsekern.BatchTopK(4)).eval()
    model.activation.threshold.fill_(2.01)
    x = 3 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        alone = torch.stack([(model(row.unsqueeze(0)).values != 0).sum() for row in x])
        dense = (model.activation(model._scores(x).all()) != 0).sum(-1)
    assert (alone != dense).float().mean() < 0.2, "single rows lose latents"
    assert (alone - dense).abs().max() <= 2


def test_batch_topk_without_its_threshold_is_refused():
    model = model_of(sparsekern.BatchTopK(4)).eval()
    with pytest.raises(RuntimeError, match="threshold"):
        model(rows())


def test_the_threshold_is_saved_with_the_model():
    model = model_of(sparsekern.BatchTopK(4))
    model(rows())
    other = model_of(sparsekern.BatchTopK(4))
    other.load_state_dict(model.state_dict())
    ours, theirs = model.eval()(rows()), other.eval()(rows())
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=0, atol=0)
    state = model.state_dict()
    del state["activation.threshold"]
    with pytest.raises(RuntimeError, match="threshold"):
        other.load_state_dict(state)


@pytest.mark.slow
def test_jumprelu_is_steered_to_a_target():
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    model = SparseAutoencoder(16, LATENTS, activation=sparsekern.JumpReLU(LATENTS), target_l0=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = model.loss(x)[1]
        loss.total.backward()
        optimizer.step()
    l0 = (model(x).values != 0).sum(-1).float().mean().item()
    assert 3.6 < l0 < 4.8
    assert loss.sparsity.item() == pytest.approx((l0 / 4 - 1) ** 2, abs=0.01)
    model.calibrate(x)
    l0 = (model.eval()(x).values != 0).sum(-1).float().mean().item()
    assert l0 == pytest.approx(4, abs=0.01)


@pytest.mark.parametrize("name", ["TopK", "BatchTopK", "JumpReLU", "ReLU"])
def test_first_weights_fit_rows_of_any_scale(name):
    torch.manual_seed(0)
    x = 100 * (torch.randn(2000, 3) @ torch.randn(3, 16)) + 500
    k = {} if name == "JumpReLU" else {"k": 4}
    layer = {"ReLU": nn.ReLU(), "JumpReLU": sparsekern.JumpReLU(LATENTS)}.get(name)
    layer = layer or getattr(sparsekern, name)(**k)
    target = 4 if name == "JumpReLU" else None
    model = SparseAutoencoder(16, LATENTS, activation=layer, target_l0=target)
    assert torch.allclose(model.encoder.norm(dim=1), torch.tensor(0.5))
    model.initialize(x)
    assert model.training and not model.counter.rows_since_fired.any()
    model.eval()
    output = model(x)
    if name != "ReLU":
        assert (output.values != 0).sum(-1).float().mean().item() == pytest.approx(4, rel=0.2)
    estimate, centred = output.reconstruction - model.decoder_bias, x - model.decoder_bias
    best = (centred * estimate).sum() / estimate.square().sum()
    assert best.item() == pytest.approx(1 / 0.75, rel=1e-3)
    tied = SparseAutoencoder(16, LATENTS, 4, tied=True)
    before = tied.encoder.detach().clone()
    tied.initialize(x)
    assert torch.equal(tied.encoder, before)


def test_calibration_of_batch_topk_and_of_none():
    torch.manual_seed(0)
    x = torch.randn(512, 6).double()
    model = model_of(sparsekern.BatchTopK(4))
    model.calibrate(x)
    assert (model.eval()(x).values != 0).sum() == pytest.approx(4 * 512, abs=2)
    for activation in (nn.ReLU(), sparsekern.TopK(3), sparsekern.JumpReLU(LATENTS)):
        model = model_of(activation)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.calibrate(x)
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    model.calibrate(x, 3)
    assert (model.eval()(x).values != 0).sum() == pytest.approx(3 * 512, abs=2)
    for activation in (nn.ReLU(), sparsekern.TopK(3)):
        with pytest.raises(ValueError, match="target_l0 must be None with"):
            SparseAutoencoder(6, LATENTS, activation=activation, target_l0=3)


def test_parts_of_a_batch_add_up():
    model = model_of(
        sparsekern.JumpReLU(LATENTS, threshold=0.4), sparsity_weight=0.1, prefixes=(9,)
    )
    x = rows()
    whole = model.loss(x)[1].total
    variance = (x - x.mean(0)).square().sum()
    parts = [model.loss(part, variance=variance, rows=16)[1].total for part in x.split(5)]
    torch.testing.assert_close(sum(parts), whole)


BAD = {
    "neither": (ValueError, "one of k and activation", {}),
    "both": (ValueError, "one of k and activation", {"k": 3, "activation": nn.ReLU()}),
    "another layer": (TypeError, "activation must be one of TopK", {"activation": nn.GELU()}),
    "by magnitude": (
        ValueError,
        "activation must have ReLU and no abs",
        {"activation": sparsekern.TopK(3, abs=True)},
    ),
    "k above the latents": (
        ValueError,
        "k must be at most 40, the latents, got 41",
        {"activation": sparsekern.BatchTopK(41)},
    ),
    "a counter": (
        ValueError,
        "activation must have no counter",
        {"activation": sparsekern.TopK(3, counter=sparsekern.DeadNeuronCounter(LATENTS))},
    ),
    "thresholds": (
        ValueError,
        r"must have 40 thresholds, one a latent, got \[7\]",
        {"activation": sparsekern.JumpReLU(7)},
    ),
    "prefix": (ValueError, r"prefixes must lie in 1\.\.39", {"k": 3, "prefixes": (3, 40)}),
    "order of prefixes": (ValueError, "prefixes must ascend", {"k": 3, "prefixes": (9, 9)}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    error, text, options = BAD[name]
    with pytest.raises(error, match=text):
        SparseAutoencoder(6, LATENTS, **options)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bad_activations_are_named_on_every_path(path, name):
    model = model_of(ACTIVATIONS[name]())
    for x, error, text in (
        (rows()[:, :5], ValueError, r"weight must be \[latents, 5\]"),
        (rows().float(), TypeError, "weight must have x's dtype"),
        (rows().long(), TypeError, "x must be float32"),
        (rows()[0, 0], ValueError, "x must have at least one dimension"),
    ):
        with pytest.raises(error, match=f"^SparseAutoencoder: {text}"):
            model(x)
