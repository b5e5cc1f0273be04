"""The VAE-SAE model and its study: formulas, both ways through the sparse layer, backends."""

import pytest
import torch
from test_training import one_thread
from torch.distributions import Bernoulli, Normal, kl_divergence

import sparsekern
from sparsekern.data import rendered
from sparsekern.models import VAESAE, VAESAEOutput, vae_sae, vae_sae_loss
from sparsekern.studies.vae_sae import VAESAEConfig, evaluate

__all__ = ["one_thread"]  # a fixture


def small(dtype=torch.float32, **sizes):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return VAESAE(**{"units": 60, "k": 12, "hidden": 32, "width": 2, **sizes}).to(dtype)


def sprites(count, dtype=torch.float32):
    return torch.from_numpy(rendered(count, seed=0).images).unsqueeze(1).to(dtype)


@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_and_dtypes(channels):
    model = small(channels=channels, latents=7)
    output = model(torch.rand(5, channels, 64, 64))
    assert output.logits.shape == (5, channels, 64, 64)
    assert output.mean.shape == output.log_variance.shape == (5, 7)
    assert output.values.shape == output.indices.shape == (5, 12)
    assert output.indices.dtype == torch.int64
    assert (output.values >= 0).all()
    assert all(len(set(row)) == 12 for row in output.indices.tolist())


def test_the_default_model_is_the_declared_one():
    model = VAESAE()
    assert model.dictionary.shape == (500, 256) and model.to_units.weight.shape == (500, 10)
    assert model.k == 500 and model.activity.n == 500
    convolutions = [m for m in model.encoder if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [16, 16, 32, 32]
    assert all(m.kernel_size == (4, 4) and m.stride == (2, 2) for m in convolutions)


def test_the_loss_is_the_formula():
    images = sprites(6, torch.float64)
    output = small(torch.float64)(images)
    loss = vae_sae_loss(output, images, beta=2.5)
    likelihood = Bernoulli(logits=output.logits).log_prob(images).sum((1, 2, 3)).mean()
    posterior = Normal(output.mean, (0.5 * output.log_variance).exp())
    divergence = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
    # Two formulas of the same double precision sums over 4096 pixels.
    assert torch.allclose(loss.reconstruction, -likelihood, rtol=1e-12)
    assert torch.allclose(loss.kl, divergence, rtol=1e-12)
    assert torch.allclose(loss.total, -likelihood + 2.5 * divergence, rtol=1e-12)


def test_k_changes_during_training_and_bad_k_is_an_error():
    model = small(units=60)
    for k in (60, 13, 1):
        model.k = k
        assert model(sprites(3)).values.shape == (3, k)
    model.k = 61
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.60"):
        model(sprites(3))
    with pytest.raises(ValueError, match="k must lie in"):
        model.k = 0


@pytest.mark.parametrize("k", [1, 12, 60])
def test_both_ways_through_the_sparse_layer_agree(k, monkeypatch):
    """Value and gradients of the dense product against sparse_matmul, in double precision."""
    images, results = sprites(4, torch.float64), []
    for share in (0.0, 1.0):
        monkeypatch.setattr(vae_sae, "DENSE_SHARE", share)
        model = small(torch.float64, k=k).eval()
        loss = vae_sae_loss(model(images), images).total
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for dense, sparse in zip(*results, strict=True):
        # The two sum 60 or k products in another order: a few units in the last place.
        assert torch.allclose(dense, sparse, rtol=1e-11, atol=1e-12)


def test_the_noise_is_the_same_in_every_dtype():
    mean, log_variance = torch.zeros(3, 4), torch.zeros(3, 4)
    draws = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(7)
        draws.append(vae_sae.reparameterize(mean.to(dtype), log_variance.to(dtype)))
    assert draws[1].dtype == torch.float64 and torch.equal(draws[0].double(), draws[1])


def test_sampling_follows_the_mode_unless_told():
    model, images = small(), sprites(3)
    assert not torch.equal(model(images).values, model(images).values)
    assert torch.equal(model(images, sample=False).values, model(images, sample=False).values)
    model.eval()
    assert torch.equal(model(images).values, model(images).values)
    assert not torch.equal(model(images, sample=True).values, model(images, sample=True).values)


def test_the_counter_counts_training_rows_only():
    model, images = small(k=1), sprites(4)
    output = model(images)
    fired = set(output.indices[output.values > 0].tolist())
    dead = model.activity.dead(3)
    assert {i for i in range(60) if not dead[i]} == fired
    model.eval()
    model(images)
    assert model.activity.rows_since_fired.max() == 4
    assert "sparsity.counter.rows_since_fired" in model.state_dict()


def test_evaluation_weighs_images_equally_and_leaves_the_random_state():
    model = small().eval()
    images = torch.from_numpy(rendered(300, seed=0).images)
    state = torch.get_rng_state()
    measured = evaluate(model, images)
    sampled = evaluate(model, images, sample_seed=1)
    assert evaluate(model, images, sample_seed=1) == sampled != measured
    assert torch.equal(torch.get_rng_state(), state)
    pixels = images.unsqueeze(1).float()
    whole = vae_sae_loss(VAESAEOutput(*(t.detach() for t in model(pixels))), pixels)
    # Float32 sums over two batches instead of one.
    assert measured["reconstruction"] == pytest.approx(float(whole.reconstruction), rel=1e-5)
    assert measured["l0"] == pytest.approx((model(pixels).values > 0).sum(1).double().mean())


def losses(backend, dtype, steps=30):
    """The loss of the first steps, with k falling from 60 to 6 so that both paths are taken."""
    images = sprites(8 * steps, dtype)
    model = small(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    out = []
    with sparsekern.backend(backend), torch.random.fork_rng([]):
        torch.manual_seed(3)
        for step, part in enumerate(images.split(8)):
            model.k = 60 - 54 * step // (steps - 1)
            loss = vae_sae_loss(model(part), part).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.append(loss.detach().double())
    return torch.stack(out)


def test_kernels_and_reference_train_alike_over_thirty_steps():
    """The error rule over a trajectory: |kernel - truth| <= 2 |reference - truth| + 4 eps scale.

    The truth is the reference in float64. Rounding differs at random from step to step, so both
    errors are taken at their largest over the steps; scale is the largest loss.
    """
    truth = losses("reference", torch.float64)
    reference = (losses("reference", torch.float32) - truth).abs().max()
    kernels = (losses("auto", torch.float32) - truth).abs().max()
    assert truth[-1] < 0.5 * truth[0], "thirty steps must have learnt something"
    assert kernels <= 2 * reference + 4 * torch.finfo(torch.float32).eps * truth.max()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k_end": 0}, r"k_end must lie in 1\.\.500 \(the number of units\), got 0"),
        ({"k_start": 501}, r"k_start must lie in 1\.\.500"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"images": -3}, "images must be at least 1, got -3"),
        ({"seed": -1}, "seed must lie in 0..18446744073709551615, got -1"),
        ({"seed": 2**64}, "seed must lie in 0..18446744073709551615, got 18446744073709551616"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0 and finite, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0 and finite, got inf"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"beta": float("nan")}, "beta must be at least 0 and finite, got nan"),
        ({"beta": float("inf")}, "beta must be at least 0 and finite, got inf"),
        ({"backend": "gpu"}, "backend must be one of auto, reference, native, triton, got gpu"),
        ({"schedule": "fast"}, "schedule must be one of linear, cosine, geometric, step"),
    ],
)
def test_config_rejects_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        VAESAEConfig(**change)
