"""JumpReLU: the activation, the step, their straight-through gradients, and the layer."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FLOATS
from torch import nn

import sparsekern
from sparsekern import JumpReLU, testing
from sparsekern.ops import codes_to_dense, jumprelu, step


def expected_gradients(x, theta, bandwidth, upstream, of_step):
    """The formulas of the paper, element by element, in float64."""
    band = ((x - theta) / bandwidth).abs() < 0.5
    factor = -1 / bandwidth if of_step else -theta / bandwidth
    d_x = torch.zeros_like(x) if of_step else upstream * (x > theta)
    return d_x, (upstream * factor * band).reshape(-1, x.shape[-1]).sum(0)


@pytest.mark.parametrize("leading", [(), (50,), (4, 30)])
def test_jumprelu_is_the_definition(leading):
    x = torch.randn(*leading, 7, dtype=torch.float64)
    upstream = torch.randn_like(x)
    thresholds = torch.rand(7, dtype=torch.float64) + 0.1
    for function, of_step in ((jumprelu, False), (step, True)):
        ours, theta = x.clone().requires_grad_(), thresholds.clone().requires_grad_()
        y = function(ours, theta, 0.8)
        right = (x > thresholds).double() * (1 if of_step else x)
        testing.assert_same("forward", y, right)
        y.backward(upstream)
        d_x, d_theta = expected_gradients(x, thresholds, 0.8, upstream, of_step)
        if of_step:
            assert ours.grad is None
        else:
            testing.assert_same("d x", ours.grad, d_x)
        torch.testing.assert_close(theta.grad, d_theta)
        scalar = thresholds[0].clone().requires_grad_()  # 0-d: the sum over all columns
        function(x, scalar, 0.8).backward(upstream)
        d_theta = expected_gradients(x, thresholds[0], 0.8, upstream, of_step)[1].sum()
        torch.testing.assert_close(scalar.grad, d_theta)


def test_a_threshold_for_each_element_gives_the_same_gradients():
    """What codes need: the thresholds of their latents, gathered."""
    x = torch.randn(9, 7, dtype=torch.float64)
    for function in (jumprelu, step):
        theta = (torch.rand(7, dtype=torch.float64) + 0.1).requires_grad_()
        upstream = torch.randn_like(x)
        both = function(x, theta, 0.8), function(x, theta.expand(9, 7), 0.8)
        testing.assert_same("forward", *both)
        grads = [torch.autograd.grad(y, theta, upstream)[0] for y in both]
        torch.testing.assert_close(*grads)


def test_corners_of_jumprelu():
    theta = torch.tensor(1.0, requires_grad=True)
    corners = [1.0, math.nextafter(1, 2), 1.25, 0.75, math.nan, math.inf, -math.inf]
    x = torch.tensor(corners, dtype=torch.float64)
    y = jumprelu(x, theta, 0.5)  # a threshold itself is off, half a bandwidth away is outside
    assert y[:4].tolist() == [0, math.nextafter(1, 2), 1.25, 0] and y[4].isnan()
    assert y[5:].tolist() == [math.inf, 0]
    y.sum().backward()
    assert theta.grad.item() == -2 * 1 / 0.5
    assert step(x, theta, 0.5).tolist() == [0, 1, 1, 0, 1, 1, 0]
    assert jumprelu(x[:0], theta, 0.5).shape == (0,)


def test_second_derivatives_of_jumprelu():
    """In the upstream gradient and in theta; step and rectangle count as constant."""
    x = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    theta = (torch.rand(5, dtype=torch.float64) + 0.2).requires_grad_()
    (d_theta,) = torch.autograd.grad(jumprelu(x, theta, 0.7).pow(2).sum(), theta, create_graph=True)
    band = ((x - theta) / 0.7).abs() < 0.5
    both = band & (x > theta)
    expected = (-theta / 0.7 * (2 * x * both)).sum(0)
    torch.testing.assert_close(d_theta, expected)
    to_x, to_theta = torch.autograd.grad(d_theta.sum(), (x, theta))
    torch.testing.assert_close(to_x, -2 * theta / 0.7 * both)
    # through the factor theta, and through y inside the upstream gradient 2 y
    own = (-2 * x * both / 0.7).sum(0) + (2 * (theta / 0.7) ** 2 * band).sum(0)
    torch.testing.assert_close(to_theta, own)


def test_numerical_gradients_of_jumprelu():
    """Away from the band both functions are smooth, and the gradients are the true ones."""
    x = torch.tensor([[0.3, -2.0, 1.8], [2.5, 0.1, -0.4]], dtype=torch.float64).requires_grad_()
    theta = torch.tensor([1.0, 0.5, 1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: jumprelu(x, t, 0.2), (x, theta))
    assert torch.autograd.gradgradcheck(lambda x, t: jumprelu(x, t, 0.2), (x, theta))
    assert torch.autograd.gradcheck(lambda t: step(x.detach(), t, 0.2), (theta,))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_of_jumprelu(dtype):
    """16-bit activations with float32 thresholds, as under autocast: sums run in float32."""
    x = (1 + torch.randn(5000, 3) * 0.1).to(dtype).requires_grad_()
    theta = torch.tensor([0.99, 1.0, 1.02], requires_grad=True)
    y = jumprelu(x, theta, 0.5)
    assert y.dtype == dtype
    testing.assert_same("forward", y.float(), x.float() * (x.float() > theta))
    y.sum().backward()
    ones = torch.ones(5000, 3)
    d_x, d_theta = expected_gradients(x.detach().float(), theta.detach(), 0.5, ones, False)
    testing.assert_same("d x", x.grad.float(), d_x)
    assert theta.grad.dtype == torch.float32
    torch.testing.assert_close(theta.grad, d_theta)


def test_jumprelu_under_vmap_and_compiled():
    torch.compiler.reset()
    x, theta = torch.randn(4, 6, 5), torch.rand(5)

    def loss(x, theta):
        return jumprelu(x, theta, 0.9).square().sum() + step(x, theta, 0.9).sum()

    gradient = torch.func.grad(loss, argnums=(0, 1))
    entries = [gradient(entry, theta) for entry in x]
    mapped = torch.vmap(gradient, in_dims=(0, None))(x, theta)
    for at, entry in enumerate(entries):
        for one, right in zip(mapped, entry, strict=True):
            torch.testing.assert_close(one[at], right)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        leaves = x.clone().requires_grad_(), theta.clone().requires_grad_()
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for one, right in zip(*results, strict=True):
        torch.testing.assert_close(one, right)


def test_jumprelu_layer():
    layer = JumpReLU(9, threshold=0.25, bandwidth=0.5)
    assert list(layer.state_dict()) == ["log_threshold"]
    torch.testing.assert_close(layer.threshold, torch.full((9,), 0.25))
    x = torch.randn(3, 4, 9)
    theta = layer.threshold.detach()
    testing.assert_same("forward", layer(x), x * (x > theta))
    l0 = layer.l0(x)
    assert l0.shape == () and l0.item() == pytest.approx(int((x > theta).sum()) / 12)
    assert layer.l0(x.bfloat16()).dtype == torch.float32
    l0.backward()
    _, d_theta = expected_gradients(x, theta, 0.5, torch.full_like(x, 1 / 12), True)
    torch.testing.assert_close(layer.log_threshold.grad, d_theta * theta)
    other = JumpReLU(9)
    other.load_state_dict(layer.state_dict())
    testing.assert_same("restored", other(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = nn.functional.linear(x, torch.randn(9, 9))
        y = layer(hidden)
    testing.assert_same("autocast", y, hidden * (hidden > theta))


def test_a_relative_bandwidth_learns_alike_at_any_scale():
    x, theta = torch.randn(50, 9).double(), torch.rand(9).double() + 0.1
    band = (x - theta).abs() < 0.25 * theta
    for scale in (1e-3, 1.0, 1e3):
        leaf = (scale * theta).requires_grad_()
        active = step(scale * x, leaf, 0.5, True)
        (d_theta,) = torch.autograd.grad(active.sum(), leaf)
        torch.testing.assert_close(d_theta * scale * theta, -band.double().sum(0) / 0.5)
        kept = jumprelu(scale * x, leaf, 0.5, True)
        (d_theta,) = torch.autograd.grad(kept.sum(), leaf)
        torch.testing.assert_close(d_theta, -(x * 0 + band).sum(0) / 0.5)
        testing.assert_same("forward", kept, scale * x * (scale * x > scale * theta))


@pytest.mark.parametrize("scale", [0.25, 7.5])
def test_the_default_learns_sparsity_on_inputs_of_usual_scale(scale):
    layer = JumpReLU(16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(600):
        optimizer.zero_grad()
        l0 = layer.l0(scale * torch.randn(256, 16))
        l0.backward()
        optimizer.step()
    assert l0.item() < 0.25 * 8


@pytest.mark.parametrize("l0", [1, 2.5, 9])
def test_calibration_gives_the_wanted_number_of_active_latents(l0):
    layer = JumpReLU(9, threshold=0.3)
    with torch.no_grad():
        layer.log_threshold[4] += 1
    before, x = layer.threshold.detach().clone(), torch.rand(40, 9) + 0.1
    layer.calibrate(x, l0)
    assert layer.l0(x).item() == pytest.approx(l0, abs=1 / 39)
    ratio = layer.threshold.detach() / before
    torch.testing.assert_close(ratio, ratio[0].expand(9))
    other = JumpReLU(9, threshold=0.3)
    with torch.no_grad():
        other.log_threshold[4] += 1
    other.calibrate_parts(x.split(7), 40, l0)
    torch.testing.assert_close(other.threshold, layer.threshold)
    layer.calibrate(x - 10, 3)
    assert layer.l0(x - 10).item() == 0, "no more than are positive"
    for wrong, error in ((0, ValueError), (10, ValueError), ("3", TypeError)):
        with pytest.raises(error, match=r"^JumpReLU.calibrate: l0 must"):
            layer.calibrate(x, wrong)
    with pytest.raises(ValueError, match=r"^JumpReLU.calibrate: x must have at least one row"):
        layer.calibrate(x[:0], 2)


def test_the_sparsity_loss_raises_thresholds():
    layer = JumpReLU(6, threshold=0.5, bandwidth=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x = torch.rand(1000, 6)
    before = layer.l0(x).item()
    for _ in range(20):
        optimizer.zero_grad()
        layer.l0(x).backward()
        optimizer.step()
    assert layer.l0(x).item() < 0.8 * before


@pytest.mark.parametrize("trained", [True, False])
def test_codes_of_jumprelu(target, trained):
    """Gradients of the dense layer, those of thresholds that stand just above an entry included."""
    x = torch.randn(4, 6, 40, device=target.device)
    weight = torch.randn(40, 5, device=target.device)
    results = []
    for sparse in (True, False):
        layer = JumpReLU(40, threshold=1.5, bandwidth=0.6).to(target.device)
        layer.log_threshold.requires_grad_(trained)
        leaf = x.clone().requires_grad_()
        if sparse:
            values, indices = layer.codes(leaf)
            assert values.shape[-1] < 20 and (indices.diff(dim=-1) > 0).all()
            testing.assert_same("codes", codes_to_dense(values, indices, 40), layer(x))
            out = sparsekern.sparse_matmul(values, indices, weight)
        else:
            out = layer(leaf) @ weight
        out.square().sum().backward()
        results.append((out, leaf.grad, layer.log_threshold.grad))
    for one, right in zip(*results, strict=True):
        if one is None:
            assert right is None and not trained
        else:
            torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)  # sums in another order
    with torch.no_grad():
        narrow = layer.codes(x).values.shape[-1]
    assert narrow == int((layer(x) != 0).sum(-1).max())
    silent = layer.codes(-torch.ones(3, 40, device=target.device))
    assert silent.values.shape == (3, 1) and not silent.values.any()


T = torch.ones(3)


@pytest.mark.parametrize(
    ("x", "theta", "bandwidth", "error", "message"),
    [
        (
            T,
            torch.ones(2),
            0.1,
            ValueError,
            r"theta must be \[3\] for x \[3\], 0-d, or of x.s shape, got",
        ),
        (T, torch.ones(1, 3), 0.1, ValueError, r"theta must be \[3\]"),
        (T, 0.5, 0.1, TypeError, "theta must be a floating point tensor, got 0.5"),
        (T, torch.ones(3).long(), 0.1, TypeError, "theta must be a floating point tensor"),
        (T.long(), T, 0.1, TypeError, "x must be float32.* got torch.int64"),
        (torch.tensor(1.0), T[0], 0.1, ValueError, "x must have at least one dimension"),
        (T, T, 0, ValueError, "bandwidth must be above 0 and finite, got 0"),
        (T, T, -0.1, ValueError, "bandwidth must be above 0 and finite, got -0.1"),
        (T, T, math.nan, ValueError, "bandwidth must be above 0 and finite, got nan"),
        (T, T, "1", TypeError, "bandwidth must be a number, got '1'"),
        (T, T, True, TypeError, "bandwidth must be a number, got True"),
    ],
)
def test_bad_input_of_jumprelu(x, theta, bandwidth, error, message):
    for function in (jumprelu, step):
        with pytest.raises(error, match=f"^{function.__name__}: {message}"):
            function(x, theta, bandwidth)


def test_bad_sizes_of_jumprelu():
    for n, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match=r"^JumpReLU: n must"):
            JumpReLU(n)
    for name in ("threshold", "bandwidth"):
        with pytest.raises(ValueError, match=f"^JumpReLU: {name} must be above 0"):
            JumpReLU(3, **{name: 0.0})
    with pytest.raises(ValueError, match=r"theta must be \[4\] for x \[2, 4\]"):
        JumpReLU(3)(torch.randn(2, 4))


def test_compiled_jumprelu_takes_any_sizes():
    compiled = torch.compile(JumpReLU(20), fullgraph=True, backend="aot_eager")
    for shape in ((6, 20), (3, 20), (2, 3, 20), (20,), (0, 20)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), torch.where(x > 0.1, x, 0))
