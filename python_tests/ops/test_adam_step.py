"""The fused Adam step equals torch.optim.Adam with the separate steps, on every backend."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsekern import testing
from sparsekern.ops.adam_step import adam_step
from sparsekern.ops.adam_step.reference import adam_step_reference
from sparsekern.optim import Adam

SHAPES = [(1, 1), (3, 5), (7, 16), (5, 33), (2, 1030), (40, 257)]


def tensors(shape, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    parameter, grad, mean = (torch.randn(shape, generator=generator) for _ in range(3))
    square = torch.rand(shape, generator=generator)
    return [t.to(device) for t in (parameter, grad, mean * 0.1, square)]


@pytest.mark.parametrize("unit_rows", [False, True], ids=["plain", "unit rows"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_follows_the_definition(target, counted, unit_rows, weight_decay):
    for shape in [*SHAPES, *([] if unit_rows else [(), (9,), (2, 3, 4), (0, 4)])]:
        for step in (1, 1000):
            options = (1e-2, 0.9, 0.999, 1e-8, weight_decay, step, unit_rows)
            actual = tensors(shape, target.device)
            truth = [t.double() for t in tensors(shape)]
            plain = tensors(shape)
            adam_step(
                *actual,
                lr=options[0],
                betas=options[1:3],
                eps=options[3],
                weight_decay=weight_decay,
                step=step,
                unit_rows=unit_rows,
            )
            adam_step_reference(*truth, *options)
            adam_step_reference(*plain, *options)
            for name, a, t, p in zip(
                ("parameter", "grad", "mean", "square"), actual, truth, plain, strict=True
            ):
                testing.assert_error_rule(f"{shape} {name}", a, t, p, t.abs() + 1)
            testing.assert_same("grad", actual[1], tensors(shape)[1])
            counted()


def test_steps_equal_torchs_adam_and_the_separate_steps(target):
    torch.manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(20, 12), dim=1)
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in (start, start[0])] for _ in range(2))
    ours = [torch.nn.Parameter(p.detach().to(target.device)) for p in ours]
    groups = [{"params": ours[:1], "unit_rows": True}, {"params": ours[1:]}]
    optimizer = Adam(groups, lr=1e-2)
    torchs = torch.optim.Adam(theirs, lr=1e-2)
    for _ in range(20):
        grads = [torch.randn(20, 12), torch.randn(12)]
        for parameter, twin, grad in zip(ours, theirs, grads, strict=True):
            parameter.grad, twin.grad = grad.to(target.device), grad.clone()
        optimizer.step()
        with torch.no_grad():
            d = theirs[0]
            share = (d.grad * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True)
            d.grad -= share * d
            torchs.step()
            d /= d.norm(dim=1, keepdim=True)
        testing.assert_same("the gradient", ours[0].grad, grads[0].to(target.device))
    for parameter, twin in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameter.detach().cpu(), twin.detach(), rtol=2e-5, atol=2e-6)


def test_rows_of_zeros_and_silent_rows_stay_finite(target):
    parameter, grad, mean, square = (torch.zeros(4, 6, device=target.device) for _ in range(4))
    parameter[1] = 2.0
    adam_step(parameter, grad, mean, square, lr=0.1, step=1, unit_rows=True)
    assert not parameter[0].any()
    torch.testing.assert_close(parameter[1].norm(), torch.ones((), device=target.device))


def test_the_same_bits_for_every_thread_count(eager_teams):
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for unit_rows in (False, True):
                parts = tensors((300, 517))
                adam_step(*parts, lr=0.1, step=3, unit_rows=unit_rows)
                results.append(parts[0])
    finally:
        torch.set_num_threads(before)
    for at in range(2, len(results)):
        testing.assert_same("parameter", results[at], results[at % 2])


def test_other_dtypes_and_layouts_follow_the_definition():
    for change in (lambda t: t.double(), lambda t: t.bfloat16(), lambda t: t.t()):
        parts, expected = ([change(t) for t in tensors((6, 9))] for _ in range(2))
        adam_step(*parts, lr=0.1, step=2, unit_rows=True)
        adam_step_reference(*expected, 0.1, 0.9, 0.999, 1e-8, 0.0, 2, True)
        testing.assert_same("parameter", parts[0], expected[0])


def test_state_fits_torchs_adam_and_back():
    parameters = [torch.nn.Parameter(torch.randn(5, 4)), torch.nn.Parameter(torch.randn(()))]
    optimizer = Adam(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    other = torch.optim.Adam(copy.deepcopy(parameters))
    saved = optimizer.state_dict()
    theirs = other.state_dict()
    theirs["state"] = saved["state"]
    other.load_state_dict(theirs)
    restored = Adam(copy.deepcopy(parameters))
    restored.load_state_dict(saved)
    for group in (other, restored):
        for parameter in group.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
    other.step(), restored.step()
    for a, b in zip(
        other.param_groups[0]["params"], restored.param_groups[0]["params"], strict=True
    ):
        torch.testing.assert_close(a, b)


def test_operator_registration(target):
    for unit_rows in (False, True):
        args = (*tensors((6, 5), target.device), 0.1, 0.9, 0.999, 1e-8, 0.0, 1, unit_rows)
        torch.library.opcheck(torch.ops.sparsekern.adam_step.default, args)


def test_closure_and_learning_rate_schedule():
    parameter = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = Adam([parameter], lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(10):
        losses.append(float(optimizer.step(closure)))
        schedule.step()
    assert losses == sorted(losses, reverse=True)


MATRIX = torch.zeros(3, 4)
BAD = {
    "lr": ("lr must be at least 0, got -1", lambda: Adam([MATRIX], lr=-1)),
    "betas": ("betas must lie in", lambda: Adam([MATRIX], betas=(0.9, 1.0))),
    "rank": ("unit_rows needs parameters", lambda: Adam([MATRIX[0]], unit_rows=True)),
    "step": (
        "step must be at least 1",
        lambda: adam_step(MATRIX, MATRIX, MATRIX, MATRIX, lr=1, step=0),
    ),
    "shape": (
        "grad must be like parameter",
        lambda: adam_step(MATRIX, MATRIX[0], MATRIX, MATRIX, lr=1, step=1),
    ),
    "dtype": (
        "square must be like parameter",
        lambda: adam_step(MATRIX, MATRIX, MATRIX, MATRIX.double(), lr=1, step=1),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    text, call = BAD[name]
    with pytest.raises(ValueError, match=text):
        call()


def test_states_of_torchs_adam_load_and_step():
    start, grad = torch.randn(5, 3), torch.randn(5, 3)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    torchs = torch.optim.Adam([theirs], lr=0.1)
    optimizer = Adam([ours], lr=0.1)
    theirs.grad = grad
    torchs.step()
    optimizer.load_state_dict(torchs.state_dict())
    ours.data.copy_(theirs.data)
    ours.grad = grad
    torchs.step(), optimizer.step()
    torch.testing.assert_close(ours, theirs)
    for option in ("maximize", "amsgrad"):
        other = torch.optim.Adam([torch.nn.Parameter(start)], **{option: True})
        with pytest.raises(ValueError, match=f"{option} must be False, got True"):
            optimizer.load_state_dict(other.state_dict())


def test_autograd_notices_a_step():
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = Adam([parameter])
    loss = (torch.randn(4, 3) @ parameter).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    x = torch.randn(2, 4, requires_grad=True)
    y = (x @ torch.randn(4, 3) @ parameter).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_steps_are_counted_in_float32_whatever_the_default(dtype):
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Adam([parameter])
    torch.set_default_dtype(dtype)
    try:
        parameter.grad = torch.ones(2, 2, dtype=torch.float32)
        optimizer.step()
        optimizer.state[parameter]["step"].fill_(5000)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[parameter]["step"].dtype == torch.float32
    assert optimizer.state[parameter]["step"] == 5001
