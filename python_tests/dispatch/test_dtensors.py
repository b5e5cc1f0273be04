"""Operations on DTensors, in two processes: the parts' results are those of the whole, gradients
too, and nothing is sent; what cannot be computed from parts is an error with a remedy."""

from __future__ import annotations

import json
import traceback

import pytest
import torch
from processes import run_together
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import sparsekern as sk
from sparsekern import ops
from sparsekern.dispatch.operations import operations

B, D, N, K = 5, 8, 32, 4
ROWS = {"x", "z", "values", "indices", "image"}  # what is cut by rows
LATENTS = {"z": 1, "weight": 0, "bias": 0, "values": 1, "indices": 1, "image": 1, "levels": 0,
           "theta": 0}  # fmt: skip
# Calls by name: what they take, the function, and False where rows must not be cut.
CALLS = {
    "topk": ("z", lambda z: sk.topk(z, K), True),
    "topk_mask": ("z", lambda z: sk.topk_mask(z, K), True),
    "topk_counts": ("z", lambda z: (*sk.topk_counts(z, K)[0], sk.topk_counts(z, K)[1]), True),
    "batch_topk": ("z", lambda z: sk.batch_topk(z, K), False),
    "linear_topk": (
        "x weight bias centre",
        lambda x, w, b, c: sk.linear_topk(x, w, b, K, pre_bias=c),
        True,
    ),
    "linear_topk_transposed": (
        "x weight bias",
        lambda x, w, b: sum(sk.linear_topk_transposed(x, w, b, K), ()),
        False,
    ),
    "gather_dot": ("x weight indices", sk.gather_dot, True),
    "linear_at": ("x weight bias indices", sk.linear_at, True),
    "sparse_matmul": ("values indices weight centre", sk.sparse_matmul, True),
    "codes_to_dense": ("values indices", lambda v, i: ops.codes_to_dense(v, i, N), True),
    "count_active": ("indices values", lambda i, v: sk.count_active(i, N, v), True),
    "transpose_codes": ("indices", lambda i: sk.transpose_codes(i, N), False),
    "jumprelu": ("z theta", lambda z, t: ops.jumprelu(z, t, 0.5), True),
    "step": ("z theta", lambda z, t: ops.step(z, t, 0.5), True),
    "channel_threshold": ("image", lambda x: sk.channel_threshold(x, 0.3), False),
    "threshold_relu": ("image levels", sk.threshold_relu, True),
    "threshold_codes": ("image levels", sk.threshold_codes, False),
    "pointwise_conv": (
        "image levels square",
        lambda x, t, w: sk.pointwise_conv(*sk.threshold_codes(x, t)[:2], x.shape, w),
        False,
    ),
    "batch_norm": ("x centre", lambda x, c: ops.batch_norm(x, c, c), False),
}
# Operations that public functions of other names call.
CALLED = {"sparse_matmul_backward", "batch_norm_backward", "pointwise_conv_backward", "adam_step",
          "first_pass"}  # fmt: skip
# Where latents are cut and the result is right all the same.
BY_LATENTS = {"count_active", "jumprelu", "step", "batch_norm"}


def _tensors():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(B, D), torch.randn(N, D), torch.randn(N)
    z = x @ weight.T + bias
    values, indices = z.topk(K)
    return {
        "x": x, "weight": weight, "bias": bias, "centre": torch.randn(D), "z": z,
        "values": values, "indices": indices, "theta": torch.rand(N), "levels": torch.rand(4),
        "image": torch.randn(B, 4, 6), "square": torch.randn(3, 4),
    }  # fmt: skip


def _placed(name, tensor, kind, mesh):
    placement = Replicate()
    if kind == "partial" and tensor.is_floating_point():
        return DTensor.from_local(tensor / mesh.size(), mesh, [Partial()])
    if kind == "rows" and name in ROWS:
        placement = Shard(0)
    if kind == "latents" and name in LATENTS:
        placement = Shard(LATENTS[name])
    return distribute_tensor(tensor, mesh, [placement])


def _results(call, given):
    """Outputs and gradients."""
    for tensor in given:
        if tensor.is_floating_point():
            tensor.requires_grad_()
    outputs = call(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for output in outputs:
        if output.requires_grad:
            output.square().sum().backward(retain_graph=True)
    return [*outputs, *(tensor.grad for tensor in given if tensor.is_floating_point())]


def _check(name, kind, mesh):
    names, call, by_rows = CALLS[name]
    tensors = {n: _tensors()[n] for n in names.split()}
    fine = {"whole": True, "rows": by_rows, "latents": name in BY_LATENTS, "partial": False}[kind]
    given = [_placed(n, tensor, kind, mesh).detach() for n, tensor in tensors.items()]
    if kind == "partial" and name in ("jumprelu", "step", "transpose_codes"):
        return  # torch's own arithmetic, or integers
    if not fine:
        with (
            CommDebugMode() as sent,
            pytest.raises((ValueError, TypeError), match=r"redistribute it|all tensors must be"),
        ):
            _results(call, given)
        assert sent.get_total_counts() == 0
        return
    with CommDebugMode() as sent:
        call(*given)
    assert sent.get_total_counts() == 0, sent.get_comm_counts()
    expected = _results(call, list(tensors.values()))
    with CommDebugMode() as sent:
        actual = _results(call, given)
    gathers = {str(k): v for k, v in sent.get_comm_counts().items() if "reduce" not in str(k)}
    assert not gathers, gathers
    for one, other in zip(actual, expected, strict=True):
        if other is None:
            assert one is None
            continue
        torch.testing.assert_close(one.full_tensor(), other)


def _main(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    mesh, said = init_device_mesh("cpu", (2,)), {}
    for name in CALLS:
        for kind in ("whole", "rows", "latents", "partial"):
            try:
                _check(name, kind, mesh)
                said[f"{name} {kind}"] = ""
            except Exception:  # reported by the test of this name
                said[f"{name} {kind}"] = traceback.format_exc()
    for name, check in {"plain": _plain_ones, "meshes": _meshes, "torch": _torch_ops}.items():
        try:
            check(mesh)
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(said))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _plain_ones(mesh):
    t = _tensors()
    weight = distribute_tensor(t["weight"], mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"linear_topk: .* plain x, bias and DTensors weight"):
        sk.linear_topk(t["x"], weight, t["bias"], K)
    with pytest.raises(TypeError, match="jumprelu: all tensors must be DTensors or none"):
        ops.jumprelu(t["z"], distribute_tensor(t["theta"], mesh, [Replicate()]), 0.5)


def _meshes(mesh):
    """Rows cut along two dimensions of a mesh, and arguments of different meshes."""
    both = init_device_mesh("cpu", (2, 1))
    x = torch.randn(4, 3, N)
    cut = distribute_tensor(x, both, [Shard(1), Shard(0)])
    torch.testing.assert_close(sk.topk(cut, K).values.full_tensor(), sk.topk(x, K).values)
    t = _tensors()
    values = distribute_tensor(t["values"], both, [Shard(0), Replicate()])
    indices = distribute_tensor(t["indices"], mesh, [Shard(0)])
    with pytest.raises(ValueError, match="codes_to_dense: all DTensors must be of one mesh"):
        ops.codes_to_dense(values, indices, N)


def _torch_ops(mesh):
    """torch.ops itself has no rule for any operation, and says so."""
    z = distribute_tensor(_tensors()["z"], mesh, [Shard(1)])
    with pytest.raises(NotImplementedError, match=r"sparsekern.topk.default does not have a shard"):
        torch.ops.sparsekern.topk(z, K, True, False, False, False)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_together(_main, 2, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_operation_is_called():
    assert set(operations) <= set(CALLS) | CALLED


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [f"{n} {kind}" for n in CALLS for kind in ("whole", "rows", "latents", "partial")]
    + ["plain", "meshes", "torch"],
)
def test_parts(outcomes, name):
    assert [of_rank[name] for of_rank in outcomes] == ["", ""]
