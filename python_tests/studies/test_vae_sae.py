"""The VAE-SAE model: formulas, placements, both ways through the sparse layer, backends; and what
its study measures."""

import functools
import json

import pytest
import torch
from one_thread import one_thread
from quick_pictures import quick_pictures
from torch.distributions import Bernoulli, Normal, kl_divergence

import sparsekern
from sparsekern.data import rendered
from sparsekern.models import VAESAE, SparseBottleneck, bottleneck, vae_sae, vae_sae_loss
from sparsekern.studies.vae_sae import VAESAEConfig, evaluate, run
from sparsekern.studies.vae_sae.images import mean_pixel, shrunk
from sparsekern.studies.vae_sae.task import CheckpointedModel
from sparsekern.training import checkpoints

__all__ = ["one_thread", "quick_pictures"]  # fixtures


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
    layer = model.bottleneck
    assert layer.dictionary.shape == (500, 256) and layer.to_units.weight.shape == (500, 10)
    assert model.k == 500 and model.activity.n == 500
    convolutions = [m for m in model.encoder if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [16, 16, 32, 32]
    assert all(m.kernel_size == (4, 4) and m.stride == (2, 2) for m in convolutions)


@pytest.mark.parametrize("placement", vae_sae.PLACEMENTS)
@pytest.mark.parametrize("sparsifier", bottleneck.SPARSIFIERS)
@pytest.mark.parametrize("side", [32, 64])
def test_every_placement_trains_all_its_weights(placement, sparsifier, side):
    model = small(channels=3, latents=7, placement=placement, sparsifier=sparsifier, side=side)
    images = torch.rand(5, 3, side, side)
    output = model(images)
    assert output.logits.shape == images.shape and output.mean.shape == (5, 7)
    sizes = {"decoder": (7, 32), "code": (7, 7), "encoder": (32, 14)}[placement]
    assert (output.sparse.input.shape[1], output.sparse.output.shape[1]) == sizes
    if sparsifier == "l1":
        assert output.indices is None and torch.equal(output.values, output.sparse.scores.relu())
    else:
        assert output.values.shape == output.indices.shape == (5, 12)
    if sparsifier == "topk":
        everything = small(channels=3, placement=placement, side=side, k=60).eval()
        found = everything(images)
        assert found.indices is None and found.values.shape == (5, 60)
        everything.bottleneck.sparsifier = "through the selection"
        selected = everything(images)
        # The same products, in the order of the units in both.
        assert torch.equal(selected.values, found.values)
        assert torch.allclose(selected.logits, found.logits, atol=1e-5)
    assert (output.values < 0).any() == (sparsifier == "magnitude")
    vae_sae_loss(output, images).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert model.decode(torch.zeros(2, 7)).shape == (2, 3, side, side)


def test_magnitude_selects_by_magnitude():
    layer = SparseBottleneck(4, 3, 2, 1, sparsifier="magnitude")
    with torch.no_grad():
        layer.to_units.weight.copy_(torch.eye(4)[:3])
    values, indices = layer(torch.tensor([[1.0, -2.0, 0.5, 9.0]]))[2:4]
    assert values.tolist() == [[-2.0]] and indices.tolist() == [[1]]


def test_standardized_inputs_in_training_and_evaluation():
    layer = SparseBottleneck(4, 8, 2, 2, standardize=True)
    x = 3 + 5 * torch.randn(400, 4)
    seen = layer(x).input
    assert seen.mean(0).abs().max() < 1e-5 and torch.allclose(seen.std(0), torch.ones(4), rtol=1e-2)
    for _ in range(100):  # the running estimates come near the data's
        layer(x)
    layer.eval()
    assert torch.allclose(layer(x).input, seen, rtol=0.05, atol=0.05)
    layer.train()
    assert layer(x[:1]).input.isfinite().all()  # one row has no variance of its own


def test_a_tied_start_passes_the_input_on():
    """E relu(w z) w = z / 2 * E w^2 for random w: with enough units the output is near z."""
    torch.manual_seed(0)
    layer = SparseBottleneck(6, 60_000, 6, 60_000, tied=True)
    z = torch.randn(5, 6)
    assert torch.allclose(layer(z).output, z, atol=0.1)
    with pytest.raises(ValueError, match="tied needs as many outputs as inputs, got 5 and 6"):
        SparseBottleneck(6, 10, 5, 2, tied=True)


def test_the_penalty_weighs_activations_by_their_rows_of_the_dictionary():
    layer = SparseBottleneck(4, 3, 2, 3, sparsifier="l1")
    values = torch.tensor([[1.0, 0.0, 2.0], [3.0, 1.0, 0.0]])
    with torch.no_grad():
        layer.dictionary.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]]))
    # (1 + 3) * 5 + 1 * 1 + 2 * 2, over two rows
    assert layer.penalty(values).item() == pytest.approx(12.5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"side": 40}, "side must be a multiple of 16, got 40"),
        ({"placement": "middle"}, "placement must be one of decoder, code, encoder, got 'middle'"),
        ({"sparsifier": "l2"}, "sparsifier must be one of topk, magnitude, l1, got 'l2'"),
        ({"tied": True}, "tied needs placement 'code'"),
        ({"mean_pixel": 1.0}, "mean_pixel must lie inside 0..1, got 1.0"),
    ],
)
def test_the_model_rejects_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        VAESAE(**change)


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
    with pytest.raises(ValueError, match=r"k must lie in 0\.\.60"):
        model(sprites(3))
    with pytest.raises(ValueError, match="k must lie in"):
        model.k = 0


@pytest.mark.parametrize("k", [1, 12, 60])
def test_both_ways_through_the_sparse_layer_agree(k, monkeypatch):
    """Value and gradients of the dense product against sparse_matmul, in double precision."""
    images, results = sprites(4, torch.float64), []
    for share in (0.0, 1.0):
        monkeypatch.setattr(bottleneck, "DENSE_SHARE", share)
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
    assert "bottleneck.activity.rows_since_fired" in model.state_dict()


def test_evaluation_weighs_images_equally_and_leaves_the_random_state():
    model = small().eval()
    images = torch.from_numpy(rendered(300, seed=0).images).unsqueeze(1) * 255
    state = torch.get_rng_state()
    measured = evaluate(model, images)
    sampled = evaluate(model, images, sample_seed=1)
    assert evaluate(model, images, sample_seed=1) == sampled != measured
    assert torch.equal(torch.get_rng_state(), state)
    pixels = images.float() / 255
    with torch.no_grad():
        whole = vae_sae_loss(model(pixels), pixels)
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
        ({"schedule": "fast"}, "schedule must be one of linear, cosine, geometric, step, gated"),
        ({"dataset": "faces"}, "dataset must be one of dsprites, shapes3d, got faces"),
        ({"side": 48}, "side must be one of 64, 32, got 48"),
        ({"extra_epochs": -1}, "extra_epochs must be at least 0, got -1"),
        ({"warm_epochs": 50}, r"warm_epochs must lie in 0\.\.49 \(below epochs\), got 50"),
        ({"tied": True}, "tied needs placement code, which is encoder, got True"),
        ({"sparsifier": "l1", "revival": "auxk"}, "revival must be none under l1"),
    ],
)
def test_config_rejects_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        VAESAEConfig(**change)


# -- the study's task ------------------------------------------------------------------------------

TINY = {
    "images": 48, "epochs": 2, "batch_size": 16, "eval_images": 16, "test_images": 40, "units": 20,
    "k_start": 20, "k_end": 4, "width": 2, "side": 32, "progress": False,
}  # fmt: skip


def test_images_are_shrunk_by_means_of_squares():
    images = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    images[0, 0, :2, :4] = torch.tensor([[255, 255, 1, 0], [255, 254, 1, 0]])
    small_images = shrunk(images, 32)
    assert small_images.shape == (1, 1, 32, 32) and small_images.dtype == torch.uint8
    # 1019 / 4 = 254.75 and 2 / 4, which is rounded up.
    assert small_images[0, 0, 0, :3].tolist() == [255, 1, 0]
    assert shrunk(images, 64) is images
    assert mean_pixel(images) == pytest.approx((255 * 3 + 254 + 2) / (255 * 64 * 64))


def test_when_units_died():
    trained = CheckpointedModel(
        small(units=4, k=2), VAESAEConfig(**{**TINY, "units": 4, "k_start": 4})
    )
    trained.active = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 0, 1]]).bool()
    # Died last; silent for an epoch; never active; born late and alive.
    assert trained.death_epochs(3) == [1, None, -1, None]
    # The last epoch is out of sight: neither its death nor its revival counts.
    assert trained.death_epochs(2) == [None, 0, -1, None]


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsifier": "l1", "extra_epochs": 1, "dataset": "shapes3d"},
        {"schedule": "gated", "warm_epochs": 1, "placement": "code", "tied": True},
        {"revival": "auxk", "dead_after": 16, "placement": "encoder", "dataset": "shapes3d"},
        {"revival": "resample", "dead_after": 16, "standardize": True},
        {"revival": "homeostasis", "dead_after": 16, "sparsifier": "magnitude"},
        {"precision": "bfloat16", "compile": True, "side": 64},
    ],
    ids=str,
)
def test_every_kind_of_run(settings, tmp_path, monkeypatch):
    """The compiler itself is torch's; that its modules keep their names is ours."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile_eagerly))
    config = VAESAEConfig(**{**TINY, **settings})
    results = run(config, tmp_path / "run").results
    assert results["k"] == results["schedule"]["k"] == 4
    assert len(results["death_epoch"]) == len(results["units"]["frequency"]) == 20
    assert_deaths_are_those_of_the_records(results, config, tmp_path / "run")
    assert all(torch.isfinite(torch.tensor(results["units"]["selectivity"])))
    for moment in ("schedule", "untrained"):
        assert -1 <= results[moment]["mig"]["low"] <= results[moment]["mig"]["high"] <= 1
    again = run(config, tmp_path / "run", resume=True).results
    assert again["dead"] == results["dead"] and again["mig"] == results["mig"]
    saved = checkpoints.read_checkpoint(tmp_path / "run").tensors
    assert "model.vae.bottleneck.dictionary" in saved and "model.vae.encoder.0.weight" in saved


def assert_deaths_are_those_of_the_records(results, config, folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    dead = [r["eval_dead"] for r in map(json.loads, lines) if r["kind"] == "epoch"]
    for name, epochs in (("death_epoch", config.epochs), ("death_epoch_after", config.all_epochs)):
        assert sum(e is not None for e in results[name]) == pytest.approx(20 * dead[epochs - 1])
        assert all(e is None or -1 <= e < epochs - 1 for e in results[name])


def compile_eagerly(module):
    module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")
