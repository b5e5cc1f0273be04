"""The 1x1 convolution of codes on every backend, against torch's convolutions: the error rule for
the output and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FLOATS, TARGETS, activated
from test_sparse_matmul import DTYPE_PAIRS, PAIR_IDS, double

import sparsekern
from sparsekern import testing
from sparsekern.ops.pointwise_conv.reference import (
    pointwise_conv_backward_reference,
    pointwise_conv_reference,
)

# (shape, dimension of the channels, outputs, codes): images, sequences, volumes and rows; channels
# first and last; one channel, one output, more outputs than a warp takes; short and long runs; no
# code, several at one place, more than places.
CASES = {
    "image": ((2, 3, 5, 7), 1, 4, 20),
    "image, long runs": ((2, 3, 20, 33), 1, 8, 40),
    "channels last": ((2, 5, 7, 3), -1, 8, 20),
    "sequence": ((3, 4, 31), 1, 5, 30),
    "sequence, aligned": ((2, 4, 32), 1, 8, 30),
    "volume": ((2, 3, 2, 3, 4), 1, 6, 25),
    "rows": ((40, 6), 1, 9, 30),
    "rows, many outputs": ((9, 6), 1, 130, 20),
    "first dimension": ((4, 60), 0, 3, 20),
    "one channel": ((3, 1, 17), 1, 2, 9),
    "one output": ((3, 5, 17), 1, 1, 25),
    "short runs": ((50, 4, 3), 1, 7, 90),
    "no codes": ((2, 3, 4), 1, 5, 0),
    "one code": ((2, 3, 4), 1, 5, 1),
    "duplicates": ((2, 2, 3), 1, 5, 300),
    "one place": ((1, 1, 1), 1, 3, 40),
    "one site": ((6, 40), 1, 5, 80),
    "empty batch": ((0, 3, 4), 1, 5, 0),
    "no sites": ((2, 3, 0), 1, 5, 0),
}
LAYOUTS = ("contiguous", "transposed", "kernel", "every second", "expanded")


@pytest.fixture(
    params=[target for target in TARGETS if target.backend != "triton"],
    ids=lambda target: target.name,
)
def target(request):
    """The targets but those of Triton, which has no such operation."""
    yield from activated(request.param)


def make(name, dtype, weight_dtype=None, device="cpu", layout="contiguous"):
    """values, indices [M], unsorted, weight [E, C] or [E, C, 1, ..], bias [E]."""
    shape, dim, outputs, count = CASES[name]
    generator = torch.Generator().manual_seed(count + outputs)
    channels = shape[dim]
    values = torch.randn(count, generator=generator).to(dtype)
    indices = torch.randint(0, max(1, math.prod(shape)), (count,), generator=generator)
    if name == "one site":
        indices = indices % channels + 3 * channels
    weight = torch.randn(outputs, channels, generator=generator).to(weight_dtype or dtype)
    bias = torch.randn(outputs, generator=generator).to(weight.dtype)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "kernel":
        weight = weight.view(outputs, channels, 1, 1)
    elif layout == "every second":
        weight = weight.repeat_interleave(2, 1)[:, ::2]
    elif layout == "expanded":
        weight = weight[:, :1].expand(outputs, channels)
    return [t.to(device) for t in (values, indices, weight, bias)]


def dense_convolution(name, values, indices, weight, bias):
    """The tensor with its zeros, through torch's conv1d, conv2d or conv3d."""
    shape, dim, outputs, _ = CASES[name]
    x = torch.zeros(math.prod(shape), dtype=values.dtype).index_add(0, indices, values).view(shape)
    x = x.movedim(dim, 1)
    if x.numel() == 0:
        return x.new_empty(x.shape[0], outputs, *x.shape[2:]).movedim(1, dim)
    spatial = max(1, x.dim() - 2)
    image = x.view(*x.shape[:2], *x.shape[2:] or (1,))
    kernel = weight.reshape(outputs, shape[dim], *[1] * spatial)
    out = (torch.conv1d, torch.conv2d, torch.conv3d)[spatial - 1](image, kernel, bias)
    return out.view(x.shape[0], outputs, *x.shape[2:]).movedim(1, dim)


def plain(function, *tensors):
    return function(*(t.detach().cpu() if isinstance(t, torch.Tensor) else t for t in tensors))


def check_output(name, values, indices, weight, bias):
    shape, dim, _, _ = CASES[name]
    out = sparsekern.pointwise_conv(values, indices, shape, weight, bias, channel_dim=dim)
    wide, where = double(values, weight, bias), indices.cpu().long()
    truth = dense_convolution(name, wide[0], where, *wide[1:])
    assert out.dtype == values.dtype and out.shape == truth.shape and out.is_contiguous()
    inner = math.prod(shape[dim % len(shape) + 1 :])
    sizes = (math.prod(shape[: dim % len(shape)]), inner)
    flat = weight.flatten(1)
    near = plain(pointwise_conv_reference, values, where, flat, bias, *sizes).view(out.shape)
    scale = dense_convolution(
        name, wide[0].abs(), where, wide[1].abs(), None if bias is None else wide[2].abs()
    )
    testing.assert_error_rule(name, out, truth, near, scale)
    return out


def check_gradients(name, values, indices, weight, bias):
    shape, dim, outputs, _ = CASES[name]
    leaves = [t.detach().requires_grad_() for t in (values, weight, bias) if t is not None]
    out = sparsekern.pointwise_conv(leaves[0], indices, shape, *leaves[1:], channel_dim=dim)
    upstream = torch.randn(out.shape[::-1]).to(out.dtype).to(out.device)
    upstream = upstream.permute(*range(out.dim())[::-1])  # not contiguous
    grads = torch.autograd.grad(out, leaves, upstream)
    flat, where = weight.flatten(1), indices.cpu().long()
    at = dim % len(shape)
    seen = upstream.reshape(math.prod(shape[:at]), outputs, math.prod(shape[at + 1 :]))

    def all_three(g, v, w):
        return pointwise_conv_backward_reference(g, v, where, w)

    wide = double(seen, values, flat)
    truths, scales = all_three(*wide), all_three(*(t.abs() for t in wide))
    nears = plain(all_three, seen, values, flat)
    for what, grad, truth, scale, near, leaf in zip(
        ("values", "weight", "bias"), grads, truths, scales, nears, leaves, strict=False
    ):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        grad = grad.view(truth.shape)
        testing.assert_error_rule(f"{name}: d {what}", grad, truth, near, scale)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPE_PAIRS, ids=PAIR_IDS)
def test_output_and_gradients(target, counted, dtype, weight_dtype):
    for number, name in enumerate(CASES):
        inputs = make(name, dtype, weight_dtype, target.device)
        if number % 3 == 0:
            inputs[3] = None
        before = [None if t is None else t.clone() for t in inputs]
        check_output(name, *inputs)
        check_gradients(name, *inputs)
        for tensor, copy in zip(inputs, before, strict=True):
            if tensor is not None:
                testing.assert_same(f"{name}: an input", tensor, copy)
        counted()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_weight(target, counted, layout):
    for name in ("image", "channels last", "rows, many outputs"):
        for dtype in FLOATS[:2]:
            inputs = make(name, dtype, device=target.device, layout=layout)
            check_output(name, *inputs)
            check_gradients(name, *inputs)
            counted()


def test_float64_is_exact_to_its_own_rounding(target, counted):
    target.require_float64()
    for name in CASES:
        inputs = make(name, torch.float64)
        check_output(name, *inputs)
        check_gradients(name, *inputs)
        counted()


def test_order_and_type_of_the_indices(target):
    """Codes in another order, or with int32 indices, are the same tensor."""
    shape = CASES["image"][0]
    values, indices, weight, bias = make("image", torch.float32, device=target.device)
    out = sparsekern.pointwise_conv(values, indices, shape, weight, bias)
    small = sparsekern.pointwise_conv(values, indices.int(), shape, weight, bias)
    target.assert_repeated("int32", small, out)
    order = indices.argsort()
    turned = sparsekern.pointwise_conv(values[order], indices[order], shape, weight, bias)
    torch.testing.assert_close(turned, out)
    strided = values.repeat_interleave(2)[::2], indices.repeat_interleave(2)[::2]
    again = sparsekern.pointwise_conv(*strided, shape, weight, bias)
    target.assert_repeated("strided", again, out)


def test_codes_of_a_threshold(target):
    """As in a model: threshold_codes, then the convolution, forward and backward."""
    device = target.device
    x = torch.randn(4, 6, 9, 10, device=device, requires_grad=True)
    dense_x = x.detach().clone().requires_grad_()
    conv = torch.nn.Conv2d(6, 5, 1, device=device)
    threshold = sparsekern.channel_threshold(x, 0.02)
    codes = sparsekern.threshold_codes(x, threshold)
    out = sparsekern.pointwise_conv(codes.values, codes.indices, x.shape, conv.weight, conv.bias)
    out.square().sum().backward()
    grads = [p.grad.clone() for p in conv.parameters()]
    conv.zero_grad()
    expected = conv((dense_x - threshold.view(6, 1, 1)).relu())
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for grad, parameter in zip(grads, conv.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad, dense_x.grad)


def test_special_values_pass_through(target):
    weight = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0]])
    values, indices = torch.tensor([1.0, torch.inf, 3.0]), torch.tensor([0, 5, 3])
    inputs = [t.to(target.device) for t in (values, indices, weight)]
    out = sparsekern.pointwise_conv(*inputs[:2], (3, 2), inputs[2])
    assert out[2].tolist() == [torch.inf, torch.inf] and out[1].tolist() == [torch.inf, 6.0]
    assert out[0, 0] == 1.0 and out[0, 1].isnan()


def test_repeats_give_the_same_bits(target):
    target.require_repeats()
    shape = CASES["duplicates"][0]
    values, indices, weight, bias = make("duplicates", torch.float32, device=target.device)
    runs = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in (values, weight, bias)]
        out = sparsekern.pointwise_conv(leaves[0], indices, shape, *leaves[1:])
        out.square().sum().backward()
        runs.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for run in runs[1:]:
        for actual, first in zip(run, runs[0], strict=True):
            assert torch.equal(actual, first)


# -- derivatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["image", "channels last", "one code"])
def test_numerical_gradients(target, name):
    target.require_float64()
    shape, dim, _, _ = CASES[name]
    values, indices, weight, bias = make(name, torch.float64)
    inputs = [t[:6].clone().requires_grad_() for t in (values, weight, bias)]
    indices = indices[:6]
    indices[: len(indices) // 2] = indices[0].clone()  # duplicates

    def convolve(v, w, b):
        return sparsekern.pointwise_conv(v, indices, shape, w, b, channel_dim=dim)

    assert torch.autograd.gradcheck(convolve, inputs)
    assert torch.autograd.gradgradcheck(convolve, inputs)


def test_second_derivatives_equal_the_dense_expression(target):
    inputs = make("image", torch.float32, device=target.device)

    def second(function, dtype, device):
        v, w, b = (inputs[i].to(dtype).to(device).requires_grad_() for i in (0, 2, 3))
        out = function(v, inputs[1].to(device), w, b)
        first = torch.autograd.grad(out.pow(3).sum(), (v, w, b), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (v, w, b))

    def ours(v, i, w, b):
        return sparsekern.pointwise_conv(v, i, CASES["image"][0], w, b)

    def dense(v, i, w, b):
        return dense_convolution("image", v, i, w, b)

    truth = second(dense, torch.float64, "cpu")
    near = second(dense, torch.float32, "cpu")
    actual = second(ours, torch.float32, target.device)
    for name, a, t, p in zip(("values", "weight", "bias"), actual, truth, near, strict=True):
        # Terms are bounded by the largest element times their number.
        testing.assert_error_rule(name, a, t, p, 16 * t.abs().max())


# -- torch's own machinery -------------------------------------------------------------------------


def test_operator_registration(target):
    ops = torch.ops.sparsekern
    for name in ("sequence", "rows"):
        shape, dim, outputs, _ = CASES[name]
        outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        values, indices, weight, bias = make(name, torch.float32, device=target.device)
        leaves = [t.requires_grad_() for t in (values, weight, bias)]
        args = (leaves[0], indices, *leaves[1:], outer, inner)
        torch.library.opcheck(ops.pointwise_conv.default, args)
        grad = torch.randn(outer, outputs, inner, device=target.device)
        args = (grad, values.detach(), indices, weight.detach())
        torch.library.opcheck(ops.pointwise_conv_backward.default, args)


def test_compiled_equals_eager(target):
    torch.compiler.reset()
    shape = CASES["image"][0]
    values, indices, weight, bias = make("image", torch.float32, device=target.device)

    def step(v, w):
        return sparsekern.pointwise_conv(v.relu(), indices, shape, w, bias).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = values.requires_grad_(), weight.requires_grad_()
    for actual, right in zip(
        torch.autograd.grad(compiled(*leaves), leaves),
        torch.autograd.grad(step(*leaves), leaves),
        strict=True,
    ):
        target.assert_repeated("gradient", actual, right)


def test_autocast(target):
    shape = CASES["image"][0]
    values, indices, weight, bias = make("image", torch.float32, device=target.device)
    leaves = [t.clone().requires_grad_() for t in (values, weight, bias)]
    with torch.autocast(target.device, torch.bfloat16):
        out = sparsekern.pointwise_conv(leaves[0], indices, shape, *leaves[1:])
    assert out.dtype == torch.bfloat16
    right = sparsekern.pointwise_conv(values.bfloat16(), indices, shape, weight, bias)
    target.assert_repeated("out", out, right)
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


# -- the CPU kernels' own corners ------------------------------------------------------------------


def test_thread_counts_and_instruction_sets(instruction_sets):
    """The same bits for every thread count; every instruction set keeps the error rule."""
    for _ in instruction_sets:
        for case in ("image, long runs", "channels last", "duplicates", "rows, many outputs"):
            inputs = make(case, torch.float32)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with sparsekern.backend("native"):
                    out = check_output(case, *inputs)
                    check_gradients(case, *inputs)
                    shape, dim, outputs, _ = CASES[case]
                    inner = math.prod(shape[dim % len(shape) + 1 :])
                    grad = out.view(-1, outputs, inner)
                    backward = torch.ops.sparsekern.pointwise_conv_backward
                    results.append((out, *backward(grad, *inputs[:3])))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# -- bad input -------------------------------------------------------------------------------------

V, INDICES, W = torch.ones(3), torch.zeros(3, dtype=torch.int64), torch.ones(5, 4)
SHAPE = (2, 4, 6)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((V, INDICES.float(), SHAPE, W), TypeError, "indices must be int64 or int32"),
        ((V, INDICES[:2], SHAPE, W), ValueError, "values and indices must have the same shape"),
        ((V.long(), INDICES, SHAPE, W), TypeError, "values must be float32"),
        (
            (V[None], INDICES[None], SHAPE, W),
            ValueError,
            r"values must have shape \[M\], got \[1, 3",
        ),
        ((V, INDICES, SHAPE, W[0]), ValueError, r"weight must have shape \[5?E?, 4\]"),
        ((V, INDICES, SHAPE, W[:, :3]), ValueError, r"weight must have shape .*4 channels.*5, 3"),
        ((V, INDICES, SHAPE, W.view(5, 4, 1).expand(5, 4, 2)), ValueError, "weight must have"),
        ((V, INDICES, SHAPE, W.long()), TypeError, "weight must be float32"),
        ((V, INDICES, SHAPE, W.double()), TypeError, "weight must have values' dtype"),
        ((V, INDICES, SHAPE, W.bfloat16()), TypeError, "weight must have values' dtype"),
        ((V, INDICES, SHAPE, W, torch.ones(4)), ValueError, r"bias must have shape \[5\]"),
        ((V, INDICES, SHAPE, W.to("meta")), ValueError, "all tensors must be on one device"),
        (
            (V, INDICES, (), W),
            ValueError,
            r"channel_dim must lie in 0..-1 \(shape has 0 dim.*got 1",
        ),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=f"^pointwise_conv: {message}"):
        sparsekern.pointwise_conv(*args)


@pytest.mark.parametrize("wrong", [-1, 48, 2**31 + 1, -(2**40)])
def test_indices_outside(target, wrong):
    indices = torch.tensor([0, wrong, 5], device=target.device)
    values, weight = (t.to(target.device) for t in (V, W))
    if target.device != "cpu":  # such a code is left out
        target.require_any_index()
        some = values[::2].clone().requires_grad_(), weight.clone().requires_grad_()
        leaves = values.clone().requires_grad_(), weight.clone().requires_grad_()
        kept = sparsekern.pointwise_conv(some[0], indices[::2], SHAPE, some[1])
        out = sparsekern.pointwise_conv(leaves[0], indices, SHAPE, leaves[1])
        testing.assert_same("out", out, kept)
        for again in (False, True):  # the kernels' backward pass, and one to differentiate
            of_values, of_weight = torch.autograd.grad(
                out.square().sum(), leaves, retain_graph=True, create_graph=again
            )
            kept_values, kept_weight = torch.autograd.grad(
                kept.square().sum(), some, retain_graph=True, create_graph=again
            )
            assert of_values[1] == 0
            torch.testing.assert_close(of_values[::2], kept_values)
            torch.testing.assert_close(of_weight, kept_weight)
        return
    with pytest.raises(
        IndexError, match=rf"pointwise_conv: .*0..47.*got {wrong} at flat position 1"
    ):
        sparsekern.pointwise_conv(values, indices, SHAPE, weight)
