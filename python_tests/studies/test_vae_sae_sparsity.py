"""What decides the sparsity of the VAE-SAE study: the steering of L1, the gate of k, revival."""

import math
from itertools import pairwise

import pytest
import torch

from sparsekern.models import SparseBottleneck
from sparsekern.studies.vae_sae import revival
from sparsekern.studies.vae_sae.sparsity import STRONGEST, WEAKEST, L1Steering, ValidationGate

# -- steering --------------------------------------------------------------------------------------

# The study's schedule, with 40 steps an epoch.
FALLING = [500 - 450 * epoch / 49 for epoch in range(50) for _ in range(40)]


def follow(steering, targets, most=250.0, half=0.3, delay=20):
    """A plant that L1 makes sparser with a delay: its L0 goes a share of the way each step to what
    the strength leaves of `most`, one half at a strength of `half`."""
    l0, found = most, []
    for target in targets:
        steering.update(torch.tensor(l0), target)
        wanted = most / (1 + float(steering.strength) / half)
        l0 += (wanted - l0) / delay
        found.append(l0)
    return found


def test_l0_follows_a_falling_target():
    found = follow(L1Steering(), FALLING)
    assert found[0] == pytest.approx(250, rel=0.05), "above 250 there is nothing to do"
    assert found[-1] == pytest.approx(50, rel=0.1)


def test_l0_follows_where_only_a_strong_penalty_acts():
    """As in a trained network, whose weights give way: the target binds late, and the strength has
    to grow a thousandfold within a few epochs."""
    found = follow(L1Steering(), FALLING, most=150.0, half=10.0)
    lags = [found[i] / FALLING[i] - 1 for i in range(39, len(FALLING), 40)]
    assert max(lags[40:]) < 0.2
    assert max(map(abs, lags[44:])) < 0.05


@pytest.mark.slow
@pytest.mark.study
def test_a_target_out_of_reach_does_not_wind_it_up():
    """However long L0 stayed below the target, it takes as long to follow the next one."""
    finals = []
    for wait in (10, 10_000):
        steering = L1Steering()
        follow(steering, [500.0] * wait)
        assert float(steering.strength) >= WEAKEST * (1 - 1e-9)
        finals.append(follow(steering, [100.0] * 400)[-1])
    assert finals[0] == pytest.approx(100, rel=0.1) and finals[1] == pytest.approx(100, rel=0.1)
    steering = L1Steering()
    for _ in range(100_000):
        steering.update(torch.tensor(500.0), 1.0)
    assert float(steering.strength) <= STRONGEST * (1 + 1e-9)
    steering.update(torch.tensor(0.0), 50.0)  # no active unit at all
    assert math.isfinite(float(steering.strength))


def test_its_state_is_saved():
    one, other = L1Steering(), L1Steering()
    one.update(torch.tensor(80.0), 50.0)
    assert float(other.strength) != float(one.strength)
    other.load_state_dict(one.state_dict())
    one.update(torch.tensor(70.0), 50.0)
    other.update(torch.tensor(70.0), 50.0)
    assert float(other.strength) == float(one.strength)


# -- gate ------------------------------------------------------------------------------------------


def ks(gate, losses):
    found = []
    for epoch, loss in enumerate(losses):
        found.append(gate.k)
        gate.update(loss, epoch)
    return found


def test_a_gate_that_always_recovers_goes_down_at_once():
    found = ks(ValidationGate(500, 50, 50), [100.0] * 50)
    assert found[0] == 500 and found[16:] == [50] * 34
    assert all(a > b for a, b in pairwise(found[:17]))


def test_a_gate_that_never_recovers_goes_down_as_late_as_it_can():
    # Only the first loss is the best; the following ones are far above.
    found = ks(ValidationGate(500, 50, 50), [1.0] + [100.0] * 49)
    assert found[-1] == 50 and found[-2] > 50
    assert found[1] < 500, "the first loss is the best one so far"
    assert len(set(found[1:34])) == 1, "it waits"


def test_a_gate_waits_for_the_loss():
    # Each step down is followed by two epochs of a worse loss.
    losses = [10.0, 11.0, 10.9, 10.1, 11.0, 10.9, 10.1]
    found = ks(ValidationGate(500, 50, 50), losses)
    assert found[1] == found[2] == found[3] < found[0] and found[4] == found[5] < found[3]


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_a_short_gate_ends_at_the_final_k(epochs):
    assert ks(ValidationGate(500, 50, epochs), [3.0] + [9.0] * (epochs - 1))[-1] == 50


# -- revival ---------------------------------------------------------------------------------------


@pytest.fixture
def passed():
    """A layer of 6 units of which 2 are dead, and what went through it, with gradients."""
    torch.manual_seed(0)
    layer = SparseBottleneck(4, 6, 3, 2)
    with torch.no_grad():
        layer.to_units.bias[4:] = -100.0
    sparse = layer(torch.randn(32, 4))
    sparse.output.retain_grad()
    (sparse.output - torch.randn(32, 3)).square().sum().backward()
    layer.zero_grad()
    dead = torch.zeros(6, dtype=torch.bool)
    dead[4:] = True
    assert (layer.activity.rows_since_fired[4:] == 32).all()
    return layer, sparse, dead


def test_the_residual_of_a_squared_error_is_the_error():
    layer = SparseBottleneck(4, 6, 3, 2)
    sparse = layer(torch.randn(32, 4))
    sparse.output.retain_grad()
    target = torch.randn(32, 3)
    (sparse.output - target).square().sum().backward()
    error = (target - sparse.output).detach()
    assert torch.allclose(revival.residual(sparse), error / error.square().mean().sqrt(), atol=1e-5)


def test_the_auxiliary_loss_trains_dead_units_only(passed):
    layer, sparse, dead = passed
    error = revival.auxiliary_loss(layer, sparse, dead)
    error.backward()
    # Before they have learnt anything they are not better than silence, which has the error 1.
    assert error > 0.9
    for grad in (layer.to_units.weight.grad, layer.to_units.bias.grad, layer.dictionary.grad):
        assert (grad[4:] != 0).any() and (grad[:4] == 0).all()


def test_the_auxiliary_loss_falls_and_is_zero_without_dead_units(passed):
    layer, sparse, dead = passed
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(600):
        optimizer.zero_grad()
        loss = revival.auxiliary_loss(layer, sparse, dead)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 < losses[0]
    nothing = revival.auxiliary_loss(layer, sparse, torch.zeros_like(dead))
    optimizer.zero_grad()
    nothing.backward()
    assert nothing == 0 and (layer.dictionary.grad == 0).all()


def test_homeostasis_raises_the_biases_of_dead_units(passed):
    layer, sparse, dead = passed
    before = layer.to_units.bias.detach().clone()
    revival.raise_biases(layer, sparse, dead)
    change = layer.to_units.bias.detach() - before
    size = sparse.values.mean().item()
    assert (change[:4] == 0).all()
    # The biases are near -100, where float32 has steps of 8e-6.
    assert torch.allclose(change[4:], torch.tensor(revival.BIAS_RATE * size), atol=2e-5)


def test_resampled_units_fire_and_forget(passed):
    layer, sparse, dead = passed
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = [p.detach().clone() for p in (layer.to_units.weight, layer.dictionary)]
    revival.resample(layer, sparse, dead, optimizer)
    for old, new in zip(before, (layer.to_units.weight, layer.dictionary), strict=True):
        assert torch.equal(old[:4], new[:4]) and not torch.equal(old[4:], new[4:])
        moments = optimizer.state[new]
        assert (moments["exp_avg"][4:] == 0).all() and (moments["exp_avg"][:4] != 0).all()
        assert (moments["exp_avg_sq"][4:] == 0).all()
    assert (layer.activity.rows_since_fired[4:] == 0).all()
    fired = set(layer(sparse.input.detach()).indices.flatten().tolist())
    assert {4, 5} & fired, "their weights detect inputs of this batch"


def test_resampling_without_dead_units_changes_nothing(passed):
    layer, sparse, dead = passed
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = torch.optim.Adam(layer.parameters())
    revival.resample(layer, sparse, torch.zeros_like(dead), optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
