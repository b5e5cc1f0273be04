"""The bottleneck of Sparling and the annealing of its density."""

import warnings

import pytest
import torch

import sparsekern
from sparsekern import SpatialSparsity
from sparsekern.training import AccuracyGatedDensity


def published(x, threshold, density, momentum, norm):
    """The layer for channels last, from the paper's formulas: new threshold and output."""
    z = norm(x)
    columns = z.flatten(0, -2)
    quantile = columns.kthvalue(max(1, int(len(columns) * (1 - density))), dim=0).values
    threshold = (1 - momentum) * threshold + momentum * quantile.detach()
    return threshold, (z - threshold).relu()


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("affine", [True, False])
def test_training_equals_the_published_formulas(channel_dim, affine):
    torch.manual_seed(0)
    layer = SpatialSparsity(3, 0.07, 0.3, affine=affine, channel_dim=channel_dim)
    norm = torch.nn.BatchNorm1d(3, affine=affine)
    if affine:
        for module in (layer, norm):
            module.weight.data.copy_(torch.tensor([1.5, -0.5, 2.0]))
            module.bias.data.copy_(torch.tensor([0.5, 0.0, -1.0]))
    threshold = torch.zeros(3)
    for _ in range(5):
        x = torch.randn(4, 9, 10, 3)
        moved = x.movedim(-1, channel_dim).detach().requires_grad_()
        theirs = x.clone().requires_grad_()
        threshold, expected = published(
            theirs, threshold, 0.07, 0.3, lambda t: norm(t.flatten(0, -2)).view(t.shape)
        )
        y = layer(moved)
        torch.testing.assert_close(y.movedim(channel_dim, -1), expected)
        torch.testing.assert_close(layer.threshold, threshold)
        upstream = torch.randn(x.shape)
        y.backward(upstream.movedim(-1, channel_dim))
        expected.backward(upstream)
        torch.testing.assert_close(moved.grad.movedim(channel_dim, -1), theirs.grad)


def test_evaluation_stands_still_and_equals_dense_pytorch():
    torch.manual_seed(1)
    layer = SpatialSparsity(5, 0.1)
    layer.weight.data.uniform_(0.5, 2)
    for _ in range(20):
        layer(torch.randn(8, 5, 30))
    layer.eval()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(8, 5, 30, requires_grad=True)
    y = layer(x)
    z = torch.nn.functional.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias
    )
    torch.testing.assert_close(y, (z - layer.threshold.view(-1, 1)).relu())
    after = layer.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert layer.measured_density() == pytest.approx(float((y > 0).float().mean()))
    codes = layer.codes(x)
    assert torch.equal(codes.indices, y.flatten().nonzero().flatten())
    assert torch.equal(codes.values, y.flatten()[codes.indices])
    assert torch.equal(codes.counts, layer.counts)


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_density_is_reached_and_may_change(per_channel):
    torch.manual_seed(2)
    layer = SpatialSparsity(4, 0.2, 0.5, per_channel)
    assert len(layer.threshold) == (4 if per_channel else 1)
    scale = torch.tensor([1.0, 2.0, 3.0, 9.0]).view(-1, 1, 1)
    for density in (0.2, 0.01):
        layer.density = density
        for _ in range(30):
            layer(scale * torch.randn(8, 4, 20, 20))
        assert layer.measured_density() == pytest.approx(density, rel=0.15)
        shares = layer.counts / layer.counts.sum()
        if per_channel:
            assert (shares - 0.25).abs().max() < 0.1


def test_without_normalisation():
    layer = SpatialSparsity(2, 0.5, 1.0, affine=None)
    x = torch.arange(8.0).view(1, 2, 4)
    assert layer(x).tolist() == [[[0, 0, 1, 2], [0, 0, 1, 2]]]
    assert layer.threshold.tolist() == [1, 5]
    assert set(layer.state_dict()) == {"threshold"}
    layer.eval()
    assert layer(x + 1).tolist() == [[[0, 1, 2, 3], [0, 1, 2, 3]]]
    assert layer.threshold.tolist() == [1, 5]


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("per_channel", [True, False])
def test_accumulated_batches_give_the_quantile_of_all(channel_dim, per_channel):
    """One update from six batches equals the quantile over their concatenation."""
    torch.manual_seed(3)
    layer = SpatialSparsity(3, 0.005, 1.0, per_channel, 9, affine=None, channel_dim=channel_dim)
    columns = 1 if per_channel else 3
    rows = -(-9 // (0.005 * 300 * columns))  # batches until nine motifs are expected
    seen = []
    for step in range(int(rows)):
        assert not layer.threshold.any(), f"too early, before batch {step}"
        x = torch.randn(10, 3, 30)
        seen.append(x)
        layer(x.movedim(1, channel_dim))
    together = torch.cat(seen)
    if not per_channel:
        together = together.reshape(-1, 1)
    expected = sparsekern.channel_threshold(together, 0.005)
    assert torch.equal(layer.threshold, expected)
    assert int(layer.rows) == 0 and layer.largest.isneginf().all()


def test_accumulation_survives_saving():
    torch.manual_seed(4)
    layers = [SpatialSparsity(2, 0.01, 1.0, accumulate=5, affine=None) for _ in range(2)]
    batches = [torch.randn(4, 2, 40) for _ in range(4)]
    for x in batches[:2]:
        layers[0](x)
    layers[1](torch.randn(4, 2, 40))  # another past, which is forgotten
    layers[1].load_state_dict(layers[0].state_dict())
    for x in batches[2:]:
        for layer in layers:
            layer(x)
    assert layers[0].threshold.any()
    assert torch.equal(layers[0].threshold, layers[1].threshold)


def test_a_batch_too_small_says_so_once():
    layer = SpatialSparsity(2, 1e-3)
    with pytest.warns(UserWarning, match="less than one.* use larger batches or accumulate=10"):
        layer(torch.randn(4, 2, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(4, 2, 20))
        SpatialSparsity(2, 1e-3, accumulate=10)(torch.randn(4, 2, 20))
        SpatialSparsity(2, 0.1)(torch.randn(4, 2, 20))


def test_thresholds_are_constants_to_the_gradient():
    layer = SpatialSparsity(2, 0.1, affine=None)
    x = torch.randn(4, 2, 20, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad, (y > 0).float())
    assert not layer.threshold.requires_grad


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 0.1), "SpatialSparsity: channels must lie in 1.."),
        ((2, 0.0), "SpatialSparsity: density must be above 0 and at most 1, got 0.0"),
        ((2, 1.5), "SpatialSparsity: density must be above 0 and at most 1, got 1.5"),
        ((2, float("nan")), "SpatialSparsity: density must be above 0 and at most 1, got nan"),
        ((2, 0.1, 0.0), "SpatialSparsity: momentum must be above 0 and at most 1, got 0.0"),
        ((2, 0.1, 0.1, True, 0), "SpatialSparsity: accumulate must lie in 1.."),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpatialSparsity(*arguments)


def test_bad_input():
    layer = SpatialSparsity(3, 0.1)
    with pytest.raises(ValueError, match=r"must have 3 channels in dimension 1, got shape \[2, 4"):
        layer(torch.randn(2, 4, 5))
    for wrong in ({"per_channel": "yes"}, {"affine": 1.0}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be one of "):
            SpatialSparsity(3, 0.1, **wrong)
    with pytest.raises(TypeError, match="density must be a number, got 'half'"):
        layer.density = "half"
    x = torch.randn(2, 3, 5)
    x[0, 1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"x must be finite, .* got 10 activations"):
        layer(x)
    assert not layer.threshold.any(), "nothing was taken in"


def test_what_is_not_finite():
    plain = SpatialSparsity(2, 0.5, affine=None)
    for odd in (float("inf"), float("nan")):
        x = torch.randn(4, 2, 9)
        x[1, 0, 3] = odd
        with pytest.raises(ValueError, match=r"x must be finite, .* got 1 activations"):
            plain(x)
    plain(torch.tensor([[3e38, -3e38], [3e38, 3e38]]))  # whose sum is not, but each of them is
    layer = SpatialSparsity(2, 0.5)
    layer.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="as must weight and bias, got 20 activations"):
        layer(torch.randn(20, 2))
    with pytest.raises(ValueError, match=r"more than one activation per channel.*\[1, 2, 1\]"):
        SpatialSparsity(2, 0.1)(torch.randn(1, 2, 1))


def test_running_statistics_are_those_of_batch_normalisation():
    """By the kernel, and where torch's own is used (long periods of channels)."""
    torch.manual_seed(0)
    for channels, space in ((3, (7, 5)), (600, (2,)), (4, (100,))):
        layer = SpatialSparsity(channels, 0.1)
        norm = torch.nn.BatchNorm1d(channels)
        for _ in range(4):
            x = torch.randn(6, channels, *space) * 3 + 1
            layer(x), norm(x.flatten(2))
        torch.testing.assert_close(layer.running_mean, norm.running_mean)
        torch.testing.assert_close(layer.running_var, norm.running_var)


@pytest.mark.parametrize("affine", [True, False, None])
def test_training_compiles_into_one_graph(affine):
    torch.compiler.reset()
    eager, compiled = (SpatialSparsity(3, 0.1, affine=affine) for _ in range(2))
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(step(x), eager(x))
    torch.testing.assert_close(compiled.threshold, eager.threshold)
    assert compiled.threshold.any()


def test_a_density_that_rises_starts_accumulating_anew():
    torch.manual_seed(0)
    layer = SpatialSparsity(2, 1e-3, 1.0, accumulate=5, affine=None)
    for _ in range(4):
        layer(torch.randn(1000, 2))
    assert int(layer.rows) == 4000 and not layer.threshold.any()
    layer.density = 4e-3
    x = torch.randn(1000, 2)
    layer(x)  # 20 activations are expected of all, for which too few were kept; 4 of this one
    assert int(layer.rows) == 1000 and not layer.threshold.any()
    more = torch.randn(1000, 2)
    layer(more)
    kept = torch.cat((x, more)).kthvalue(1992, dim=0).values
    torch.testing.assert_close(layer.threshold, kept)


def test_a_batch_that_is_enough_by_itself_is_taken_alone():
    layer = SpatialSparsity(1, 0.01, 1.0, accumulate=5, affine=None)
    layer(torch.arange(1000.0, 1400.0).view(-1, 1))
    assert int(layer.rows) == 400
    layer(torch.arange(600.0).view(-1, 1))
    assert float(layer.threshold) == 593 and int(layer.rows) == 0
    layer(torch.zeros(400, 1))
    layer(torch.zeros(100, 1))
    assert float(layer.threshold) == 0, "nothing of the first batch is left"


# -- annealing -------------------------------------------------------------------------------------


def test_the_published_rule_by_hand():
    gate = AccuracyGatedDensity(0.5, 0.2, fall=1e-5)
    assert gate.update(0.7, 10_000) == 0.5  # T = 0.9
    assert float(gate.target) == pytest.approx(0.9)
    assert gate.update(0.95, 20_000) == 0.375  # T = 0.8, then 0.95
    assert float(gate.target) == pytest.approx(0.95)
    assert float(gate.trained_density) == 0.5, "what the weights of this moment were trained at"
    assert gate.update(0.85, 30_000) == 0.375, "T = 0.85: not exceeded"
    assert gate.update(0.84, 40_000) == 0.28125
    assert gate.update(0.9, 50_000) == pytest.approx(0.2109375) and not gate.done
    assert gate.update(0.95, 60_000) == 0.2 and gate.done
    assert int(gate.reached) == 60_000
    assert gate.update(1.0, 70_000) == 0.2


def test_its_state_is_saved():
    one, other = (AccuracyGatedDensity(0.5, 0.1, fall=1e-6) for _ in range(2))
    one.update(1.0, 10_000)
    one.update(0.5, 20_000)
    other.load_state_dict(one.state_dict())
    assert one.update(0.999, 30_000) == other.update(0.999, 30_000)
    assert float(one.target) == float(other.target)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"start": 0.0}, "start must be above 0 and at most 1, got 0.0"),
        ({"end": 0.6}, "end must be above 0 and at most start = 0.5, got 0.6"),
        ({"factor": 1.0}, "factor must be above 0 and below 1, got 1.0"),
        ({"fall": -1.0}, "fall must be at least 0 and finite, got -1.0"),
        ({"target": 2.0}, "target must be in 0..1, got 2.0"),
    ],
)
def test_bad_annealing(settings, message):
    with pytest.raises(ValueError, match=message):
        AccuracyGatedDensity(**{"start": 0.5, "end": 0.1, **settings})


def test_bad_validations():
    gate = AccuracyGatedDensity(0.5, 0.1)
    with pytest.raises(ValueError, match=r"accuracy must lie in 0\.\.1, got nan"):
        gate.update(float("nan"), 10)
    gate.update(0.5, 10)
    with pytest.raises(ValueError, match="samples must be at least 10"):
        gate.update(0.5, 9)
