"""Batch normalisation by a batch's statistics: the error rule for the output and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import FLOATS, TARGETS, activated
from test_channel_threshold import LAYOUTS, lay_out

import sparsekern
from sparsekern import testing
from sparsekern.ops import batch_norm

# (shape, dimension of the channels): rows that fill vectors evenly and rows that do not, long runs
# in several pieces, one channel, several parts.
CASES = {
    "columns": ((1000, 10), 1),
    "columns, wide": ((100, 65), 1),
    "columns, very wide": ((40, 1300), 1),
    "columns, several parts": ((8000, 10), 1),
    "image": ((3, 5, 7, 6), 1),
    "image, long runs": ((2, 3, 20, 33), 1),
    "image, pieces of runs": ((2, 3, 70, 63), 1),
    "channels last": ((2, 31, 33, 4), -1),
    "volume": ((2, 3, 4, 5, 6), 1),
    "middle": ((5, 17, 9), 2),
    "one channel": ((2, 1, 5), 1),
    "one channel, long": ((1, 1, 30000), 1),
    "first dimension": ((4, 60), 0),
    "two elements": ((2, 3), 1),
}
CPU_TARGETS = [t for t in TARGETS if t.name in ("reference", "native-cpu", "reference-cuda")]


@pytest.fixture(params=CPU_TARGETS, ids=lambda target: target.name)
def target(request):
    """The reference and the kernels for the CPU; there are none for GPUs."""
    yield from activated(request.param)


def make(name, dtype, device="cpu"):
    shape, dim = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(shape, generator=generator) * 2 + 3).to(device, dtype)
    weight, bias = (torch.randn(shape[dim], generator=generator).to(device, wide) for _ in "wb")
    return x, weight, bias, torch.randn(shape, generator=generator).to(device, dtype)


def torch_norm(x, weight, bias, dim, eps=1e-5):
    columns = x.movedim(dim, -1)
    flat = columns.reshape(-1, x.shape[dim])
    return (
        F.batch_norm(flat, None, None, weight, bias, True, eps=eps)
        .view(columns.shape)
        .movedim(-1, dim)
    )


def results(function, x, weight, bias, grad, dtype=None, **options):
    """Output and gradients, and whatever else the function returns."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves, **options)
    z, *rest = out if isinstance(out, tuple) else (out,)
    return [z.detach(), *torch.autograd.grad(z, leaves, grad.to(z.dtype)), *rest]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_rule(target, counted, dtype):
    for name, (_, dim) in CASES.items():
        inputs = make(name, dtype, target.device)
        truth = results(torch_norm, *inputs, torch.float64, dim=dim)
        near = results(torch_norm, *inputs, torch.float32, dim=dim)
        columns = inputs[0].double().movedim(dim, -1).flatten(0, -2)
        statistics = columns.mean(0), columns.var(0, unbiased=False)
        *actual, mean, var = results(batch_norm, *inputs, channel_dim=dim)
        n = len(columns)
        for what, a, t, p in zip(("z", "dx", "dw", "db"), actual, truth, near, strict=True):
            scale = t.abs().max() + (n**0.5 if what in ("dw", "db") else 1)
            testing.assert_error_rule(f"{name}: {what}", a, t, p.to(a.dtype), scale)
            assert a.dtype == (dtype if what in ("z", "dx") else inputs[1].dtype)
        for what, a, t in zip(("mean", "var"), (mean, var), statistics, strict=True):
            testing.assert_error_rule(f"{name}: {what}", a, t, t.to(a.dtype), t.abs().max() + 1)
        counted()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(target, counted, layout):
    for name in ("image", "image, long runs", "volume", "columns, wide"):
        x, weight, bias, grad = make(name, torch.float32, target.device)
        dim = CASES[name][1]
        x, strided = lay_out(x, layout), lay_out(grad, layout)
        for of_z in (grad, strided):
            right = results(
                batch_norm, x.contiguous(), weight, bias, of_z.contiguous(), channel_dim=dim
            )
            actual = results(batch_norm, x, weight, bias, of_z, channel_dim=dim)
            for what, a, r in zip(
                ("z", "dx", "dw", "db", "mean", "var"), actual, right, strict=True
            ):
                # Sums of as many terms as a channel has, in another order. In dx they are divided
                # by the deviation, and may cancel.
                size = (of_z.abs().max() * weight.abs().max() / right[5].min().sqrt()).item()
                atol = max(1e-4, 1e-5 * size) if what == "dx" else 1e-4
                torch.testing.assert_close(
                    a, r, rtol=1e-5, atol=atol, msg=lambda m, w=f"{name}: {what}": f"{w}: {m}"
                )
            counted()


def test_options(target):
    x, weight, bias, _ = make("image", torch.float32, target.device)
    for options in ({}, {"weight": weight}, {"bias": bias}, {"weight": weight, "eps": 0.5}):
        x.requires_grad_()
        expected = torch_norm(
            x, options.get("weight"), options.get("bias"), 1, options.get("eps", 1e-5)
        )
        actual = batch_norm(x, **options).tensor
        torch.testing.assert_close(actual, expected)
        for a, e in zip(
            *(torch.autograd.grad(z.pow(3).sum(), x) for z in (actual, expected)), strict=True
        ):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_a_mean_far_from_zero(target):
    """The variance is that around the mean, not a difference of large squares."""
    x = torch.randn(4000, 3, device=target.device) + torch.tensor([1e4, -3e3, 0.0]).to(
        target.device
    )
    var = batch_norm(x).var
    torch.testing.assert_close(var.double(), x.double().var(0, unbiased=False), rtol=1e-5, atol=0)


def test_one_outlier_does_not_spoil_the_rest(target):
    x = torch.randn(4000, 2, device=target.device)
    x[0] = 1e6
    found = batch_norm(x)
    torch.testing.assert_close(
        found.var.double(), x.double().var(0, unbiased=False), rtol=1e-5, atol=0
    )


def test_a_constant_channel(target):
    """Whose float32 sum is off by more than its deviation, which is zero."""
    for constant in (1000.1, 12345.678, -3e7):
        x = torch.full((4, 2, 4096), constant, device=target.device)
        found = batch_norm(x)
        assert float((found.mean - x[0, 0, 0]).abs().max()) <= abs(constant) * 1.2e-7
        if target.name == "native-cpu":
            assert float(found.tensor.abs().max()) <= abs(constant) * 1.2e-7 / 1e-5**0.5


def test_nan_and_infinity_stay_in_their_channel(target):
    for odd in (float("nan"), float("inf")):
        x = torch.randn(50, 3, device=target.device)
        x[7, 1] = odd
        z = batch_norm(x).tensor
        assert z[:, 1].isnan().all() and not z[:, [0, 2]].isnan().any()


def test_numerical_gradients(target):
    target.require_float64()
    for name in ("middle", "one channel", "image"):
        x, weight, bias, _ = make(name, torch.float64)
        x = x.flatten()[: x.numel() // x.shape[CASES[name][1]] * x.shape[CASES[name][1]]].view(
            x.shape
        )
        inputs = [t.requires_grad_() for t in (x.narrow(0, 0, 2).clone(), weight, bias)]

        def norm(x, w, b, dim=CASES[name][1]):
            return batch_norm(x, w, b, channel_dim=dim).tensor

        assert torch.autograd.gradcheck(norm, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(norm, inputs, fast_mode=True)


def test_operator_registration(target):
    x, weight, bias, grad = make("image", torch.float32, target.device)
    ops = torch.ops.sparsekern
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(ops.batch_norm.default, (*leaves, 1e-5, 1))
    torch.library.opcheck(ops.batch_norm.default, (leaves[0], None, None, 1e-5, 3))
    with torch.no_grad():
        _, mean, var = ops.batch_norm(x, weight, bias, 1e-5, 1)
    last = x.detach().contiguous(memory_format=torch.channels_last)
    for tensor in (x.detach(), last, x.detach().mT.contiguous().mT):
        torch.library.opcheck(ops.batch_norm.default, (tensor, None, None, 1e-5, 1))
        for upstream in (grad, grad.contiguous(memory_format=torch.channels_last)):
            args = (upstream, tensor, weight.detach(), mean, var, 1e-5, 1)
            torch.library.opcheck(ops.batch_norm_backward.default, args)


def test_compiled_and_mapped_equal_eager(target):
    torch.compiler.reset()
    x, weight, bias, _ = make("volume", torch.float32, target.device)

    def step(x, w):
        return batch_norm(x.relu(), w, bias).tensor.square().sum()

    leaves = x.requires_grad_(), weight.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    pairs = zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step)), strict=True)
    for actual, right in pairs:
        testing.assert_same("gradient", actual, right)
    mapped = torch.func.vmap(lambda entry: batch_norm(entry, channel_dim=0).tensor)(x.detach())
    for entry, right in zip(mapped, x.detach(), strict=True):
        testing.assert_same("entry", entry, batch_norm(right, channel_dim=0).tensor)


def test_thread_counts_and_instruction_sets(instruction_sets):
    """The same bits for every thread count; every instruction set keeps near to torch's."""
    for name in instruction_sets:
        for case, dtype in (
            ("columns, several parts", FLOATS[0]),
            ("image, pieces of runs", FLOATS[1]),
        ):
            inputs = make(case, dtype)
            runs = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                runs.append(results(batch_norm, *inputs, channel_dim=CASES[case][1]))
            for run in runs[1:]:
                for actual, first in zip(run, runs[0], strict=True):
                    testing.assert_same(f"{name}, {case}", actual, first)
            near = results(torch_norm, *inputs, torch.float64, dim=CASES[case][1])
            for a, t in zip(runs[0], near, strict=False):
                scale = float(t.abs().max())
                assert float((a - t).abs().max()) <= scale * (1e-5 if a.itemsize == 4 else 1e-2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.ones(2, 3, dtype=torch.int32),),
            TypeError,
            "x must be float32, .*, got torch.int32",
        ),
        ((torch.ones(0, 3),), ValueError, r"x must not be empty, got shape \[0, 3\]"),
        ((torch.ones(3),), ValueError, "channel_dim must lie in -1..0"),
        ((torch.ones(2, 3), torch.ones(2)), ValueError, r"weight must have shape \[3\].*got \[2\]"),
        (
            (torch.ones(2, 3), None, torch.ones(4)),
            ValueError,
            r"bias must have shape \[3\].*got \[4\]",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=f"^batch_norm: {message}"):
        batch_norm(*arguments)


def test_kernels_for_the_cpu_only():
    emulation = next(chosen for chosen in TARGETS if chosen.emulated)
    if reason := emulation.missing():
        pytest.skip(reason)
    with (
        emulation.active(),
        pytest.raises(
            sparsekern.BackendUnavailableError, match="batch_norm has kernels for the CPU only"
        ),
    ):
        batch_norm(torch.ones(2, 3))
