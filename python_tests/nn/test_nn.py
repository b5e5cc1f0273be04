"""The layers: drop-in top-k activation and the counter of dead neurons."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern import DeadNeuronCounter, TopK, testing


def dense_topk(x, k, post=torch.relu):
    """What the layer replaces, for rows without ties."""
    values, indices = torch.topk(x, k, dim=-1)
    return torch.zeros_like(x).scatter(-1, indices, post(values))


# -- TopK ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (0, 9)])
def test_equals_the_dense_expression(target, shape):
    x = torch.randn(shape, device=target.device)
    ours, dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = TopK(3)(ours), dense_topk(dense, 3)
    testing.assert_same("forward", actual, expected)
    upstream = torch.randn(shape, device=target.device)
    actual.backward(upstream), expected.backward(upstream)
    testing.assert_same("gradient", ours.grad, dense.grad)


def test_posts(target):
    x = torch.randn(5, 9, device=target.device) - 1
    testing.assert_same("None", TopK(3, None)(x), dense_topk(x, 3, lambda v: v))
    testing.assert_same("a function", TopK(3, torch.tanh)(x), dense_topk(x, 3, torch.tanh))
    testing.assert_same("a module", TopK(3, nn.Softplus())(x), dense_topk(x, 3, nn.Softplus()))
    for relu in (torch.relu, nn.functional.relu, nn.ReLU()):
        testing.assert_same("relu", TopK(3, relu)(x), dense_topk(x, 3))
    signed = TopK(3, abs=True)(x)
    kept = x.abs().topk(3).indices
    testing.assert_same("abs", signed, torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept)))


def test_gradient_of_a_custom_post(target):
    x = torch.randn(5, 9, device=target.device)
    ours, dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    TopK(3, torch.tanh)(ours).pow(2).sum().backward()
    dense_topk(dense, 3, torch.tanh).pow(2).sum().backward()
    torch.testing.assert_close(ours.grad, dense.grad)


def test_codes(target):
    x = torch.randn(2, 5, 9, device=target.device)
    layer = TopK(3)
    for sort in (False, True):
        values, indices = layer.codes(x, sorted=sort)
        dense = torch.zeros_like(x).scatter(-1, indices, values)
        testing.assert_same("codes", dense, layer(x))
    assert (layer.codes(x).indices.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("post", [torch.relu, torch.tanh, None])
def test_groups_are_selected_separately(target, post):
    x = torch.randn(4, 5, 12, device=target.device)
    counter = DeadNeuronCounter(12).to(target.device)
    layer = TopK(6, post, groups=3, counter=counter)
    parts = x.unflatten(-1, (3, 4))
    expected = dense_topk(parts, 2, post or (lambda v: v)).flatten(-2)
    testing.assert_same("dense", layer(x), expected)
    fired = (expected != 0).reshape(-1, 12).any(0)
    testing.assert_same("counter", counter.rows_since_fired == 0, fired)
    for sort in (False, True):
        values, indices = layer.codes(x, sorted=sort)
        testing.assert_same("codes", torch.zeros_like(x).scatter(-1, indices, values), expected)
    with pytest.raises(ValueError, match="multiple of groups = 3, got 4"):
        layer.k = 4
    with pytest.raises(ValueError, match="groups must divide the last dimension of x, 10, got 3"):
        TopK(6, groups=3)(x[..., :10])


def test_k_changes_during_training():
    layer, x = TopK(5), torch.randn(3, 9)
    for k in (5, 2, 9):
        layer.k = k
        assert int((TopK(layer.k, None)(x) != 0).sum()) == 3 * k
    for wrong, error in ((0, ValueError), (-3, ValueError), (2.5, TypeError), ("3", TypeError)):
        with pytest.raises(error, match="TopK: k must"):
            layer.k = wrong
        with pytest.raises(error, match="TopK: k must"):
            TopK(wrong)
    assert layer.k == 9
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.8 .*got 9"):
        layer(torch.randn(3, 8))


def test_post():
    x = torch.randn(4, 3, 9)
    testing.assert_same("given", TopK(3, nn.ReLU())(x), TopK(3)(x))
    testing.assert_same("identity", TopK(3, nn.Identity())(x), TopK(3, None)(x))
    for wrong in ("relu", True):
        with pytest.raises(TypeError, match=f"post must be callable or None, got {wrong!r}"):
            TopK(3, wrong)


def test_state_dicts():
    model = nn.Sequential(nn.Linear(4, 9), TopK(3), nn.Linear(9, 4))
    assert not [key for key in model.state_dict() if key.startswith("1.")]
    plain = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))
    model.load_state_dict(plain.state_dict())
    model[1].k = 7
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False)[1].k == 7


def test_compiled_and_autocast(target):
    torch.compiler.reset()
    layer = TopK(3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 9, device=target.device, requires_grad=True)
    testing.assert_same("compiled", compiled(x), layer(x))
    with torch.autocast(target.device, torch.bfloat16):
        y = layer(nn.functional.linear(x, torch.randn(12, 9, device=target.device)))
    assert y.dtype == torch.bfloat16


def test_a_schedule_of_k_does_not_compile_for_every_k():
    torch.compiler.reset()
    layer = TopK(50)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 60)
    for k in range(50, 0, -1):  # torch gives up after 8 compilations
        layer.k = k
        testing.assert_same(f"k = {k}", compiled(x), sparsekern.topk_mask(x, k, relu=True))


@pytest.mark.slow
def test_inductor():
    """The default compiler, forward and backward, on the automatic backend."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(8, 20), TopK(4), nn.Linear(20, 8))
    x = torch.randn(6, 8)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), model[0].weight)
    (expected,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    torch.testing.assert_close(grad, expected)


# -- DeadNeuronCounter -----------------------------------------------------------------------------


def simulate(batches, n):
    """Rows since each latent last fired, batch by batch, in plain Python."""
    since = [0] * n
    for batch in batches:
        fired = {i for row in batch.tolist() for i, v in enumerate(row) if v != 0}
        since = [0 if i in fired else s + len(batch) for i, s in enumerate(since)]
    return since


def test_all_forms_of_update_agree(target):
    batches = [dense_topk(torch.randn(rows, 12) - 1, 2) for rows in (3, 1, 8, 5)]
    expected = simulate(batches, 12)
    dense, codes, counts = (DeadNeuronCounter(12, device=target.device) for _ in range(3))
    for batch in batches:
        batch = batch.to(target.device)
        dense.update(batch)
        values, indices = sparsekern.topk(batch, 3)
        codes.update(indices=indices, values=values)
        fired = sparsekern.count_active(indices, 12, values)
        counts.update(counts=fired, rows=len(batch))
    for counter in (dense, codes, counts):
        assert counter.rows_since_fired.tolist() == expected
        for threshold in (0, 4, 100):
            dead = [since > threshold for since in expected]
            assert counter.dead(threshold).tolist() == dead
            assert counter.fraction(threshold).item() == pytest.approx(sum(dead) / 12)


def test_counter_inside_the_layer(target):
    counter = DeadNeuronCounter(12, device=target.device)
    batches = [torch.randn(4, 12, device=target.device) - 1 for _ in range(3)]
    for post in ({}, {"post": torch.tanh}, {"abs": True}):
        layer = TopK(2, counter=counter, **post)
        counter.reset()
        outputs = [layer(batch) for batch in batches]
        assert counter.rows_since_fired.tolist() == simulate(outputs, 12)
    layer.eval()
    before = counter.rows_since_fired.clone()
    layer(batches[0])
    assert torch.equal(counter.rows_since_fired, before)
    counter.reset()
    layer.train().codes(batches[0])
    assert counter.rows_since_fired.tolist() == simulate([layer.eval()(batches[0])], 12)


def test_counter_is_saved_moved_and_reset():
    model = nn.ModuleDict({"counter": DeadNeuronCounter(3)})
    model["counter"].update(torch.tensor([[1.0, 0.0, 0.0]] * 4))
    copy = nn.ModuleDict({"counter": DeadNeuronCounter(3)})
    copy.load_state_dict(model.state_dict())
    assert copy["counter"].rows_since_fired.tolist() == [0, 4, 4]
    copy["counter"].reset(torch.tensor([False, True, False]))
    assert copy["counter"].rows_since_fired.tolist() == [0, 0, 4]
    copy["counter"].reset()
    assert copy["counter"].rows_since_fired.tolist() == [0, 0, 0]
    model.half()
    assert model["counter"].rows_since_fired.dtype == torch.int64


def test_counter_in_a_compiled_step():
    torch.compiler.reset()
    eager, compiled = TopK(2, counter=DeadNeuronCounter(9)), TopK(2, counter=DeadNeuronCounter(9))
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 9)
        eager(x), step(x)
    assert torch.equal(eager.counter.rows_since_fired, compiled.counter.rows_since_fired)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "give exactly one of"),
        ({"activations": torch.ones(2, 5), "counts": torch.ones(5)}, TypeError, "exactly one"),
        ({"activations": torch.ones(2, 4)}, ValueError, r"must be n = 5, got \[2, 4\]"),
        ({"activations": torch.ones(2, 5).long()}, TypeError, "must be float32"),
        ({"counts": torch.ones(5).long()}, TypeError, "counts need rows"),
        ({"counts": torch.ones(6).long(), "rows": 1}, ValueError, r"counts must be \[5\]"),
        ({"counts": torch.ones(3, 5).long(), "rows": 1}, ValueError, r"counts must be \[5\]"),
        ({"counts": torch.ones(5), "rows": 1}, ValueError, "got .* torch.float32"),
        ({"counts": torch.ones(5).long(), "rows": -1}, ValueError, "rows must be .* got -1"),
        ({"activations": torch.ones(2, 5), "rows": 2}, TypeError, "rows belong to counts"),
        (
            {"activations": torch.ones(2, 5), "values": torch.ones(2)},
            TypeError,
            "values belong to indices",
        ),
        ({"indices": torch.tensor([7])}, IndexError, "indices must lie in 0..4"),
    ],
)
def test_counter_bad_input(arguments, error, message):
    counter = DeadNeuronCounter(5)
    with pytest.raises(error, match=message):
        counter.update(**arguments)
    assert counter.rows_since_fired.tolist() == [0] * 5
    for threshold in (-1, 2.5, True):
        with pytest.raises(ValueError, match="threshold must be a number of rows"):
            counter.dead(threshold)


def test_layer_and_counter_must_fit():
    layer = TopK(2, counter=DeadNeuronCounter(50))
    for call in (layer, layer.codes):
        with pytest.raises(ValueError, match=r"must be the counter's n = 50, got \[3, 10\]"):
            call(torch.randn(3, 10))
    with pytest.raises(TypeError, match="counter must be a DeadNeuronCounter"):
        TopK(2, counter="x")
