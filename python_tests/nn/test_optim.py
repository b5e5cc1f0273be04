"""Adam on parameters of every kind: 16 bits, sharded, changed from outside, loaded from torch."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from processes import run_together

import sparsekern
from sparsekern.ops.adam_step import adam_step
from sparsekern.optim import Adam

SHORT = [torch.bfloat16, torch.float16]


def stepped(optimizer, parameters, grads):
    for grad in grads:
        for parameter in parameters:
            parameter.grad = grad[: len(parameter)].to(parameter.dtype)
        optimizer.step()


# -- 16-bit parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("unit_rows", [False, True])
def test_short_parameters_follow_those_of_float32(dtype, unit_rows):
    torch.manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(6, 8)).to(dtype)
    short = torch.nn.Parameter(start.clone())
    full = torch.nn.Parameter(start.float())
    grads = [torch.randn(6, 8).to(dtype).float() for _ in range(60)]
    pair = [Adam([p], lr=1e-4, unit_rows=unit_rows) for p in (short, full)]
    stepped(pair[0], [short], grads)
    stepped(pair[1], [full], grads)
    assert torch.equal(short.detach(), full.detach().to(dtype))
    assert not torch.equal(short.detach(), start)


@pytest.mark.parametrize("dtype", SHORT)
def test_small_steps_add_up(dtype):
    parameter = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = Adam([parameter], lr=1e-4)
    stepped(optimizer, [parameter], [torch.ones(4)] * 200)
    assert parameter.max() < 0.985  # 0.98 in float32; torch's Adam ends at 1 in bfloat16


def test_short_parameters_resume_bit_by_bit():
    torch.manual_seed(0)
    grads = list(torch.randn(10, 5, 3))
    straight, first = (torch.nn.Parameter(torch.ones(5, 3).bfloat16()) for _ in range(2))
    stepped(Adam([straight], lr=1e-3), [straight], grads)
    optimizer = Adam([first], lr=1e-3)
    stepped(optimizer, [first], grads[:6])
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["master"].dtype == torch.float32
    resumed = torch.nn.Parameter(first.detach().clone())
    second = Adam([resumed], lr=1e-3)
    second.register_load_state_dict_pre_hook(lambda _, state: copy.deepcopy(state))
    second.load_state_dict(saved)
    assert {t.dtype for t in second.state[resumed].values()} == {torch.float32}
    stepped(second, [resumed], grads[6:])
    assert torch.equal(resumed, straight)


def test_values_written_into_a_short_parameter_go_on():
    parameter = torch.nn.Parameter(torch.ones(3).bfloat16())
    optimizer = Adam([parameter], lr=1e-4)
    stepped(optimizer, [parameter], [torch.ones(3)] * 3)
    with torch.no_grad():
        parameter[1] = 5.0  # as a dead latent that starts anew
    stepped(optimizer, [parameter], [torch.ones(3)] * 40)
    assert parameter.tolist()[1] == pytest.approx(5.0, abs=0.01)
    assert optimizer.state[parameter]["master"].tolist()[0] == pytest.approx(1 - 43e-4, abs=1e-5)


def test_states_of_torchs_adam_in_16_bits_load_and_go_back():
    theirs, ours = (torch.nn.Parameter(torch.ones(4).bfloat16()) for _ in range(2))
    torchs, optimizer = torch.optim.Adam([theirs], lr=0.1), Adam([ours], lr=0.1)
    stepped(torchs, [theirs], [torch.ones(4)])
    optimizer.load_state_dict(torchs.state_dict())
    stepped(optimizer, [ours], [torch.ones(4)])
    assert optimizer.state[ours]["exp_avg"].dtype == torch.float32
    torchs.load_state_dict(
        optimizer.state_dict()
        | {"param_groups": torchs.param_groups[:0]}
        | {"param_groups": torchs.state_dict()["param_groups"]}
    )
    stepped(torchs, [theirs], [torch.ones(4)])
    assert theirs.isfinite().all()


def test_a_model_that_became_float32_drops_the_copies():
    short, full = torch.nn.Parameter(torch.ones(4).bfloat16()), torch.nn.Parameter(torch.ones(4))
    optimizer, other = Adam([short]), Adam([full])
    stepped(optimizer, [short], [torch.ones(4)])
    other.load_state_dict(optimizer.state_dict())
    assert set(other.state[full]) == {"step", "exp_avg", "exp_avg_sq"}
    stepped(other, [full], [torch.ones(4)])


# -- groups, gradients and options -----------------------------------------------------------------


def test_groups_loaded_from_torchs_adam_keep_their_unit_rows():
    parameter = torch.nn.Parameter(torch.eye(3))
    torchs = torch.optim.Adam([parameter], fused=True)
    stepped(torchs, [parameter], [torch.ones(3, 3)])
    optimizer = Adam([parameter], lr=0.1, unit_rows=True)
    optimizer.load_state_dict(torchs.state_dict())
    assert optimizer.param_groups[0]["unit_rows"] is True
    stepped(optimizer, [parameter], [torch.randn(3, 3)])
    torch.testing.assert_close(parameter.detach().norm(dim=1), torch.ones(3))


WRONG = {
    "a group's lr": ({"lr": -1.0}, torch.zeros(2), "lr must be at least 0"),
    "a group's betas": ({"betas": (0.9, 1.5)}, torch.zeros(2), "betas must lie in"),
    "maximize": ({"maximize": True}, torch.zeros(2), "maximize must be False, got True"),
    "differentiable": ({"differentiable": True}, torch.zeros(2), "differentiable must be False"),
    "AdamW's decay": (
        {"decoupled_weight_decay": True}, torch.zeros(2), "decoupled_weight_decay must be False"
    ),
    "complex": ({}, torch.zeros(2, dtype=torch.complex64), "must be float32, .* got torch.complex"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_groups_that_ask_for_another_step_are_refused(name):
    options, tensor, message = WRONG[name]
    optimizer = Adam([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(tensor)], **options})
    assert len(optimizer.param_groups) == 1


def test_states_that_ask_for_another_step_are_refused():
    decoupled = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="decoupled_weight_decay must be False, got True"):
        Adam([torch.nn.Parameter(torch.zeros(3))]).load_state_dict(decoupled.state_dict())


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradients must be dense, got one of torch\.sparse_coo"):
        Adam(table.parameters()).step()


def test_parameters_without_elements_and_of_no_dimension_step():
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(0, 4), (3, 0), ()]]
    optimizer = Adam([{"params": parameters[:2], "unit_rows": True}, {"params": parameters[2:]}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert float(parameters[2].detach()) == pytest.approx(-1e-3, rel=1e-3)


def test_scaled_gradients():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = Adam([parameter], lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((parameter * 3).sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.full((3,), 0.3))
    parameter.grad.fill_(torch.inf)
    scaler.update()
    before = parameter.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(parameter, before)


# -- versions --------------------------------------------------------------------------------------

CALLS = {
    "function": lambda *tensors: adam_step(*tensors, lr=0.1, step=1),
    "torch.ops": lambda *tensors: torch.ops.sparsekern.adam_step(
        *tensors, 0.1, 0.9, 0.999, 1e-8, 0.0, 1, False
    ),
    "compiled": torch.compile(
        lambda *tensors: adam_step(*tensors, lr=0.1, step=1), backend="eager"
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_step_outdates_what_autograd_saved(name, backend):
    weight = torch.randn(4, 3)
    x = torch.randn(2, 4, requires_grad=True)
    y = (x @ weight).sum()
    moments = [torch.zeros(4, 3) for _ in range(2)]
    versions = [t._version for t in (weight, *moments)]
    grad = torch.ones(4, 3)
    with sparsekern.backend(backend), torch.no_grad():
        CALLS[name](weight, grad, *moments)
    assert all(t._version > v for t, v in zip((weight, *moments), versions, strict=True))
    assert grad._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        tensors = [torch.ones(3) for _ in range(4)]
        for call in (CALLS["function"], CALLS["torch.ops"]):
            call(*tensors)
    assert (tensors[0] < 1).all()


# -- sharded parameters ----------------------------------------------------------------------------


def _step_in_a_process(rank: int, folder: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(5, 4))  # 3 rows and 2
    grads = [torch.randn(5, 4) for _ in range(3)]
    found = []
    for placement, grad_placement, dtype in (
        (Shard(0), Shard(0), torch.float32),
        (Replicate(), Replicate(), torch.float32),
        (Shard(0), Replicate(), torch.float32),
        (Shard(0), Shard(0), torch.bfloat16),
    ):
        sharded = torch.nn.Parameter(
            distribute_tensor(start.to(dtype, copy=True), mesh, [placement])
        )
        plain = torch.nn.Parameter(torch.ones(4))
        optimizer = Adam([{"params": [sharded], "unit_rows": True}, {"params": [plain]}], lr=0.01)
        version = sharded._version
        for grad in grads:
            sharded.grad = distribute_tensor(grad.to(dtype), mesh, [grad_placement])
            plain.grad = grad[0]
            optimizer.step()
        assert sharded._version > version and type(sharded.data) is type(sharded.grad)
        found.append((sharded.detach().full_tensor(), plain.detach()))
        state = optimizer.state[sharded]
        assert all(t.placements == sharded.placements for k, t in state.items() if k != "step")
    cut = torch.nn.Parameter(distribute_tensor(start, mesh, [Shard(1)]))
    try:
        Adam([cut], unit_rows=True)
        refused = ""
    except ValueError as error:
        refused = str(error)
    optimizer = Adam([cut], lr=0.01)
    cut.grad = distribute_tensor(grads[0], mesh, [Shard(1)])
    optimizer.step()
    torch.save((found, refused, cut.detach().full_tensor()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_rows_along_the_last_of_several_dimensions():
    for dtype in (torch.float32, torch.bfloat16):
        start = torch.nn.functional.normalize(torch.randn(12, 5), dim=1).to(dtype)
        flat = torch.nn.Parameter(start.clone())
        deep = torch.nn.Parameter(start.clone().view(3, 4, 5))
        optimizers = [Adam([p], lr=0.1, unit_rows=True) for p in (flat, deep)]
        for _ in range(3):
            flat.grad = torch.randn_like(flat)
            deep.grad = flat.grad.view(3, 4, 5)
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(deep.view(12, 5), flat)
    with pytest.raises(ValueError, match="unit_rows needs contiguous parameters"):
        Adam([torch.nn.Parameter(torch.ones(3, 4, 5).transpose(0, 1))], unit_rows=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo between processes: run on POSIX")
def test_sharded_parameters_step_as_whole_ones(tmp_path):
    run_together(_step_in_a_process, 2, str(tmp_path))
    torch.manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(5, 4))
    grads = [torch.randn(5, 4) for _ in range(3)]
    for rank in range(2):
        found, refused, cut = torch.load(tmp_path / f"{rank}.pt")
        for whole, plain in found:
            parameter = torch.nn.Parameter(start.to(whole.dtype, copy=True))
            other = torch.nn.Parameter(torch.ones(4))
            groups = [{"params": [parameter], "unit_rows": True}, {"params": [other]}]
            optimizer = Adam(groups, lr=0.01)
            for grad in grads:
                parameter.grad, other.grad = grad.to(whole.dtype), grad[0]
                optimizer.step()
            assert torch.equal(whole, parameter) and torch.equal(plain, other)
        assert "unit_rows needs whole rows on each process" in refused
        parameter = torch.nn.Parameter(start.clone())
        stepped(Adam([parameter], lr=0.01), [parameter], grads[:1])
        torch.testing.assert_close(cut, parameter.detach())
