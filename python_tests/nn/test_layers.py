"""BatchTopK: selection over the batch in training, its threshold in evaluation."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern import BatchTopK, DeadNeuronCounter, JumpReLU, SparseLinear, testing
from sparsekern.ops import codes_to_dense


@pytest.mark.parametrize("shape", [(9,), (4, 9), (2, 3, 9), (0, 9)])
def test_batch_topk_in_training(target, shape):
    x = torch.randn(shape, device=target.device)
    ours, op = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual = BatchTopK(2.5, device=target.device)(ours)
    expected = sparsekern.batch_topk(op, 2.5, relu=True)
    testing.assert_same("forward", actual, expected)
    upstream = torch.randn(shape, device=target.device)
    actual.backward(upstream), expected.backward(upstream)
    testing.assert_same("gradient", ours.grad, op.grad)


def test_threshold_is_the_average_of_the_smallest_positive_value(target):
    layer = BatchTopK(1, momentum=0.75, device=target.device)
    batches = (
        ([[-1.0, -2.0], [-3.0, -4.0]], None),  # nothing positive is kept: still not set
        ([[8.0, 1.0], [4.0, 1.0]], 4.0),  # the first one counts in full
        ([[2.0, 9.0], [1.0, 8.0]], 0.75 * 4 + 0.25 * 8),
        ([[-1.0, -2.0], [-3.0, 6.0]], 0.75 * 5 + 0.25 * 6),  # a kept negative does not count
        ([[0.0, -2.0], [-3.0, -0.0]], 5.25),
        ([[math.inf, -2.0], [math.inf, 0.0]], 5.25),  # nor does what is not finite
        ([[math.nan, 1.0], [math.nan, 2.0]], 5.25),
    )
    for batch, expected in batches:
        layer(torch.tensor(batch, device=target.device))
        threshold = layer.threshold.item()
        assert math.isnan(threshold) if expected is None else threshold == expected


def active_per_row(layer, scale=1.0, rows=4096):
    return (layer.eval()(torch.randn(rows, 512) * scale) != 0).sum(1).float().mean().item()


FALLING = {
    "linearly": lambda done: 3 - 2 * done,
    "by equal ratios": lambda done: 3 ** (1 - done),
    "not": lambda done: 1.0,
}


@pytest.mark.parametrize(
    ("falling", "steps"), [("linearly", 100), ("by equal ratios", 100), ("not", 2)]
)
def test_k_is_kept_in_evaluation_while_scores_fall(falling, steps):
    layer, scale = BatchTopK(8), FALLING[falling]
    for step in range(steps):
        layer(torch.randn(256, 512) * scale(step / steps))
    assert active_per_row(layer, scale(1)) == pytest.approx(8, rel=0.05)


SCHEDULES = {
    "gradual": lambda step: round(32 - 24 * step / 99),
    "early": lambda step: max(8, 32 - step),
    "in levels": lambda step: (32, 16, 8)[step * 3 // 100],
    "in the last step": lambda step: 8 if step == 99 else 32,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_k_is_kept_in_evaluation_after_a_schedule(schedule):
    layer = BatchTopK(32)
    for step in range(100):
        layer.k = SCHEDULES[schedule](step)
        layer(torch.randn(256, 512))
    assert active_per_row(layer) == pytest.approx(8, rel=0.06)


def test_the_trend_is_saved_and_older_states_are_loaded():
    layer, other = BatchTopK(4), BatchTopK(4)
    for _ in range(9):
        layer(torch.randn(20, 64))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(20, 64)
    layer(x), other(x)
    testing.assert_same("goes on", other.threshold, layer.threshold)
    old = {"threshold": torch.tensor(0.7)}
    other.load_state_dict(old)
    assert list(old) == ["threshold"] and other.threshold.item() == pytest.approx(0.7)
    other(x)
    fresh = BatchTopK(4)
    fresh(x)
    testing.assert_same("begins anew", other.threshold, fresh.threshold)
    layer.half()
    assert layer.trend.dtype == layer.threshold.dtype == torch.float32


def test_statistics_are_float32_whatever_the_default_dtype():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        layer = sparsekern.BatchTopK(3)
    finally:
        torch.set_default_dtype(before)
    assert layer.trend.dtype == layer.threshold.dtype == torch.float32


@pytest.mark.parametrize("k", [1, 3, 2.5])
def test_calibration_gives_k_active_entries(k):
    layer, x = BatchTopK(k), torch.randn(8, 10, 40)
    layer.calibrate(x)
    assert int((layer.eval()(x) != 0).sum()) == int(k * 80)
    parts = copy.deepcopy(layer)
    parts.calibrate_parts(x.split(3), 80)
    testing.assert_same("in parts", parts.threshold, layer.threshold)
    layer.calibrate(-x.abs() + (x > 2.5) * 10)
    assert layer.threshold.item() == 0, "all that is positive, where it is less"
    with pytest.raises(ValueError, match="must have at least one row, got none"):
        layer.calibrate(x[:0])
    with pytest.raises(TypeError, match=r"^BatchTopK.calibrate: x must be float"):
        layer.calibrate(torch.ones(3, 40).long())


def test_evaluation_does_not_depend_on_the_batch(target):
    layer = BatchTopK(2, device=target.device)
    layer(torch.randn(20, 9, device=target.device))
    before = layer.threshold.clone()
    assert before > 0
    layer.eval()
    x = torch.randn(6, 9, device=target.device, requires_grad=True)
    y = layer(x)
    testing.assert_same("evaluation", y, x * (x > before))
    for row in range(6):
        testing.assert_same("a row alone", layer(x[row]), y[row])
    y.sum().backward()
    testing.assert_same("gradient", x.grad, (x > before).float())
    testing.assert_same("threshold", layer.threshold, before)
    with pytest.raises(TypeError, match=r"BatchTopK: x must be float32.* got torch.int64"):
        layer(torch.ones(3).long())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_evaluation_compares_in_float32(target, dtype):
    """1 is above 0.99999, which would be 1 in 16 bits."""
    layer = BatchTopK(1, device=target.device).eval()
    layer.threshold.fill_(0.99999)
    x = torch.tensor([[1.0, 0.5]], dtype=dtype, device=target.device)
    assert layer(x).tolist() == [[1.0, 0.0]] and layer(x).dtype == dtype
    layer.to(dtype)
    assert layer.threshold.dtype == torch.float32
    assert layer(x).tolist() == [[1.0, 0.0]]


def test_evaluation_without_a_threshold():
    layer, x = BatchTopK(1), torch.randn(3, 5)
    message = "^BatchTopK: threshold must be set before evaluation"
    with pytest.raises(RuntimeError, match=message):
        layer.eval()(x)
    with pytest.raises(RuntimeError, match=message):
        layer.codes(x)
    layer.train()(-x.abs() - 1)  # nothing positive
    with pytest.raises(RuntimeError, match=message):
        layer.eval()(x)
    trained = BatchTopK(1)
    trained(x)
    with pytest.raises(RuntimeError, match=r"Missing key.*threshold"):
        layer.load_state_dict({})
    layer.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match=message):
        layer(x)
    layer.load_state_dict(trained.state_dict())
    testing.assert_same("restored", layer(x), trained.eval()(x))
    layer._known = True  # as on a GPU, where the host asks once
    layer.load_state_dict(BatchTopK(1).state_dict())  # one that was saved before training
    with pytest.raises(RuntimeError, match=message):
        layer(x)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=message):
        compiled(x)
    layer.threshold.fill_(0.5)
    testing.assert_same("compiled", compiled(x), layer(x))


def test_batch_topk_is_saved_and_copied():
    model = nn.Sequential(nn.Linear(4, 9), BatchTopK(2.25, momentum=0.5))
    model(torch.randn(6, 4))
    assert [key for key in model.state_dict() if key.startswith("1.")] == ["1.threshold"]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        assert other[1].k == 2.25 and other[1].momentum == 0.5
        testing.assert_same("threshold", other[1].threshold, model[1].threshold)
    assert "k=2.25, momentum=0.5" in repr(model)


def test_k_of_batch_topk_changes_during_training():
    layer, x = BatchTopK(5), torch.rand(10, 9) + 1
    for k in (5, 2, 0.1, 0.7, 1 / 3, 8.999, 9, 9.0):
        layer.k = k
        assert layer.k == k and type(layer.k) is type(k)
        assert int((layer(x) != 0).sum()) == int(k * 10)
    wrong = ((0, ValueError), (0.0, ValueError), (math.nan, ValueError), ("3", TypeError))
    for k, error in wrong:
        with pytest.raises(error, match=r"^BatchTopK: k must"):
            layer.k = k
        with pytest.raises(error, match=r"^BatchTopK: k must"):
            BatchTopK(k)
    assert layer.k == 9.0
    with pytest.raises(ValueError, match=r"batch_topk: k must be above 0 and at most 8 .*got 9"):
        layer(x[:, :8])


@pytest.mark.slow
def test_a_schedule_of_batch_topk_does_not_compile_for_every_k():
    x = torch.randn(7, 60)
    schedules = [float(k) for k in range(1, 51)], [k + 0.3 for k in range(1, 51)], range(50, 0, -1)
    for schedule in schedules:
        torch.compiler.reset()
        layer = BatchTopK(50)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for k in schedule:  # torch gives up after 8 compilations
            layer.k = k
            expected = sparsekern.batch_topk(x, k, relu=True)
            testing.assert_same(f"k = {k}", compiled(x), expected)


def test_compiled_training_updates_threshold_and_counter(target):
    torch.compiler.reset()
    layers = [
        BatchTopK(2, counter=DeadNeuronCounter(9, device=target.device), device=target.device)
        for _ in range(2)
    ]
    compiled = torch.compile(layers[1], fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 9, device=target.device)
        ours = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = layers[0](ours[0]), compiled(ours[1])
        testing.assert_same("compiled", outputs[1], outputs[0])
        for y in outputs:
            y.square().sum().backward()
        testing.assert_same("gradient", ours[1].grad, ours[0].grad)
    assert not layers[0].threshold.isnan()
    testing.assert_same("threshold", layers[1].threshold, layers[0].threshold)
    counts = [layer.counter.rows_since_fired for layer in layers]
    testing.assert_same("counts", counts[1], counts[0])


def test_counter_of_batch_topk(target):
    inside, outside = (DeadNeuronCounter(12, device=target.device) for _ in range(2))
    layer = BatchTopK(1, counter=inside, device=target.device)
    for leading in ((4,), (2, 3), ()):
        x = torch.randn(*leading, 12, device=target.device) - 1
        outside.update(layer(x))
        testing.assert_same("rows", inside.rows_since_fired, outside.rows_since_fired)
    assert inside.rows_since_fired.any()
    layer.threshold.fill_(0.1)
    layer.eval()(x)
    testing.assert_same("rows", inside.rows_since_fired, outside.rows_since_fired)
    with pytest.raises(ValueError, match=r"^BatchTopK: .* counter's n = 12, got \[3, 10\]"):
        layer.train()(torch.randn(3, 10))
    with pytest.raises(TypeError, match=r"^BatchTopK: counter must be a DeadNeuronCounter"):
        BatchTopK(2, counter="x")


@pytest.mark.parametrize("momentum", [-0.1, 1, 1.5, math.nan])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match=r"^BatchTopK: momentum must be in 0..1 and below 1, got"):
        BatchTopK(2, momentum=momentum)
    with pytest.raises(TypeError, match=r"^BatchTopK: momentum must be a number, got '0.9'"):
        BatchTopK(2, momentum="0.9")


def test_codes_of_batch_topk(target):
    x = torch.randn(2, 5, 30, device=target.device)
    x[1, 2] += 3  # one row has more than its share
    weight = torch.randn(30, 4, device=target.device)
    layer = BatchTopK(3, device=target.device)
    for training in (True, False):
        layer.train(training)
        sparse, dense = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = layer(dense)
        values, indices = layer.codes(sparse)
        assert (indices.diff(dim=-1) > 0).all()
        assert values.shape[-1] == int((y != 0).sum(-1).max()) < 30
        testing.assert_same("codes", codes_to_dense(values, indices, 30), y)
        sparsekern.sparse_matmul(values, indices, weight).square().sum().backward()
        (y @ weight).square().sum().backward()
        # sums in another order
        torch.testing.assert_close(sparse.grad, dense.grad, rtol=1e-4, atol=1e-4)
    silent = -torch.ones(3, 30, device=target.device)
    for x in (silent, silent[:0]):
        values, indices = layer.codes(x)
        assert values.shape == indices.shape == (len(x), 1) and not values.any()


@pytest.mark.slow
def test_inductor_trains_all_of_them():
    """The default compiler, forward and backward, on the automatic backend."""
    torch.compiler.reset()
    for activation in (BatchTopK(3), JumpReLU(20, threshold=0.3, bandwidth=0.5)):
        model = nn.Sequential(nn.Linear(8, 20), activation, SparseLinear(20, 8))
        x = torch.randn(6, 8)
        compiled = torch.compile(model, fullgraph=True)
        weights = list(model.parameters())
        expected = torch.autograd.grad(model(x).square().sum(), weights)
        gradients = torch.autograd.grad(compiled(x).square().sum(), weights)
        for one, right in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, right, rtol=1e-4, atol=1e-4)  # other order of sums
