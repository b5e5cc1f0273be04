"""Sparse codes times a dictionary on every backend: the error rule for the product and its
gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import FLOATS

import sparsekern
from sparsekern import testing
from sparsekern.ops.sparse_matmul.reference import (
    sparse_matmul_backward_reference,
    sparse_matmul_reference,
)

DTYPE_PAIRS = [(dtype, dtype) for dtype in FLOATS] + [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
PAIR_IDS = [f"{a}-{b}".replace("torch.", "") for a, b in DTYPE_PAIRS]
CASES = {case.name: case for case in testing.PRODUCT_CASES}


def double(*tensors):
    return [None if t is None else t.detach().double().cpu() for t in tensors]


def magnitudes(values, weight, bias):
    return [None if t is None else t.abs() for t in (values, weight, bias)]


def check_product(case, values, indices, weight, bias):
    actual = sparsekern.sparse_matmul(values, indices, weight, bias)
    assert actual.dtype == values.dtype and actual.shape == (*values.shape[:-1], weight.shape[1])
    values64, weight64, bias64 = double(values, weight, bias)
    where = indices.cpu().long()
    truth = sparse_matmul_reference(values64, where, weight64, bias64)
    v, w, b = magnitudes(values64, weight64, bias64)
    scale = sparse_matmul_reference(v, where, w, b)
    plain = sparse_matmul_reference(
        values.detach().cpu(),
        where,
        weight.detach().cpu(),
        None if bias is None else bias.detach().cpu(),
    )
    testing.assert_error_rule(case.name, actual, truth, plain, scale)


def check_gradients(case, values, indices, weight, bias):
    leaves = [t.detach().requires_grad_() for t in (values, weight)]
    bias = None if bias is None else bias.detach().requires_grad_()
    out = sparsekern.sparse_matmul(leaves[0], indices, leaves[1], bias)
    upstream = torch.randn(out.shape[::-1]).to(out.dtype).to(out.device).t()  # not contiguous
    wanted = [*leaves] + ([] if bias is None else [bias])
    grads = torch.autograd.grad(out, wanted, upstream)
    where = indices.cpu().long()

    def both(g, v, w):
        return sparse_matmul_backward_reference(g, v, where, w, True, True)

    g64, v64, w64 = double(upstream, values, weight)
    truths = both(g64, v64, w64)
    scales = both(g64.abs(), v64.abs(), w64.abs())
    plains = both(upstream.cpu(), values.cpu(), weight.cpu())
    for name, grad, truth, scale, plain, leaf in zip(
        ("values", "weight"), grads, truths, scales, plains, leaves, strict=False
    ):
        assert grad.dtype == leaf.dtype
        testing.assert_error_rule(f"{case.name}: d {name}", grad, truth, plain, scale)
    if bias is not None:
        truth = g64.sum(0)
        plain = upstream.float().sum(0).to(bias.dtype)
        testing.assert_error_rule(f"{case.name}: d bias", grads[2], truth, plain, g64.abs().sum(0))
    if case.layout == "column-major" and weight.shape[1] > 1:
        assert grads[1].stride() == weight.stride(), "the gradient keeps the layout of nn.Linear"


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPE_PAIRS, ids=PAIR_IDS)
def test_product_and_gradients(target, counted, dtype, weight_dtype):
    for case in testing.PRODUCT_CASES:
        inputs = case.make(dtype, weight_dtype, target.device)
        before = [None if t is None else t.clone() for t in inputs]
        check_product(case, *inputs)
        if case.rows:
            check_gradients(case, *inputs)
        for tensor, copy in zip(inputs, before, strict=True):
            if tensor is not None:
                testing.assert_same(f"{case.name}: an input", tensor, copy)
        counted()


def test_float64_is_exact_to_its_own_rounding(target, counted):
    target.require_float64()
    for case in testing.PRODUCT_CASES:
        inputs = case.make(torch.float64)
        check_product(case, *inputs)
        if case.rows:
            check_gradients(case, *inputs)
        counted()


def test_int32_indices_and_leading_dimensions(target):
    values = torch.randn(2, 3, 4, device=target.device)
    indices = torch.randint(0, 9, (2, 3, 4), device=target.device)
    weight = torch.randn(9, 6, device=target.device)
    out = sparsekern.sparse_matmul(values, indices, weight)
    assert out.shape == (2, 3, 6)
    small = sparsekern.sparse_matmul(values, indices.int(), weight)
    target.assert_repeated("int32", small, out)
    flat = sparsekern.sparse_matmul(values.view(6, 4), indices.view(6, 4), weight)
    target.assert_repeated("flat", out.view(6, 6), flat)
    one = sparsekern.sparse_matmul(values[0, 0], indices[0, 0], weight)
    target.assert_repeated("one row", one, out[0, 0])
    turned = sparsekern.sparse_matmul(values.transpose(0, 1), indices.transpose(0, 1), weight)
    target.assert_repeated("transposed", turned, out.transpose(0, 1))


def test_special_values_pass_through(target):
    weight = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0], [3.0, 4.0]], device=target.device)
    values = torch.tensor([[1.0, 2.0], [torch.inf, 1.0]], device=target.device)
    indices = torch.tensor([[0, 2], [2, 2]], device=target.device)
    out = sparsekern.sparse_matmul(values, indices, weight)
    assert out.tolist() == [[7.0, torch.inf], [torch.inf, torch.inf]]


@pytest.mark.slow_on("triton-interpreter")
def test_repeats_give_the_same_bits(target):
    target.require_repeats()
    case = CASES["skewed"]
    values, indices, weight, _ = case.make(torch.float32, device=target.device)
    runs = []
    for _ in range(3):
        v, w = values.clone().requires_grad_(), weight.clone().requires_grad_()
        out = sparsekern.sparse_matmul(v, indices, w)
        out.square().sum().backward()
        runs.append((out.detach(), v.grad, w.grad))
    for run in runs[1:]:
        for actual, first in zip(run, runs[0], strict=True):
            assert torch.equal(actual, first)


# -- derivatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["row-major", "column-major"])
def test_numerical_gradients(target, layout):
    target.require_float64()
    case = testing.ProductCase("gradcheck", 3, 2, 5, 4, layout=layout, bias=True)
    values, indices, weight, bias = case.make(torch.float64)
    indices[0] = 1  # a duplicate
    inputs = [t.requires_grad_() for t in (values, weight, bias)]
    product = lambda v, w, b: sparsekern.sparse_matmul(v, indices, w, b)  # noqa: E731
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


def test_second_derivatives_equal_the_dense_expression(target):
    values, indices, weight, bias = CASES["usual"].make(torch.float32, device=target.device)

    def second(function, dtype, device):
        v, w, b = (t.to(dtype).to(device).requires_grad_() for t in (values, weight, bias))
        out = function(v, indices.to(device), w, b)
        first = torch.autograd.grad(out.pow(3).sum(), (v, w, b), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (v, w, b))

    def dense(v, i, w, b):
        return (v.unsqueeze(-1) * w[i]).sum(-2) + b

    truth = second(dense, torch.float64, "cpu")
    plain = second(dense, torch.float32, "cpu")
    actual = second(sparsekern.sparse_matmul, torch.float32, target.device)
    for name, a, t, p in zip(("values", "weight", "bias"), actual, truth, plain, strict=True):
        # the terms of a derivative of order two are bounded by its largest element times their
        # number
        testing.assert_error_rule(name, a, t, p, 16 * t.abs().max())


def test_gradients_only_where_asked(target):
    values, indices, weight, _ = CASES["usual"].make(torch.float32, device=target.device)
    for ask_values, ask_weight in ((True, False), (False, True)):
        v = values.clone().requires_grad_(ask_values)
        w = weight.clone().requires_grad_(ask_weight)
        sparsekern.sparse_matmul(v, indices, w).sum().backward()
        assert (v.grad is not None) == ask_values and (w.grad is not None) == ask_weight


def test_linear_decoder_trains_in_place(target):
    """The [D, N] weight of an nn.Linear is used through its transposed view; its gradient is not
    copied."""
    decoder = torch.nn.Linear(12, 7, device=target.device)
    values, indices = sparsekern.topk(torch.randn(5, 12, device=target.device), 3)
    out = sparsekern.sparse_matmul(values, indices, decoder.weight.t(), decoder.bias)
    dense = torch.zeros(5, 12, device=target.device).scatter(-1, indices, values)
    torch.testing.assert_close(out, decoder(dense))
    out.square().sum().backward()
    assert decoder.weight.grad.is_contiguous()


# -- torch's own machinery -------------------------------------------------------------------------


@pytest.mark.slow_on("triton-interpreter")
def test_operator_registration(target):
    for name in ("usual", "nn.Linear weight", "padded rows"):
        values, indices, weight, bias = CASES[name].make(torch.float32, device=target.device)
        grad = torch.randn(values.shape[0], weight.shape[1], device=target.device)
        ops = torch.ops.sparsekern
        values.requires_grad_(), weight.requires_grad_()
        torch.library.opcheck(ops.sparse_matmul.default, (values, indices, weight, bias))
        for ask in ((True, True), (True, False), (False, True)):
            args = (grad.requires_grad_(), values, indices, weight, *ask)
            torch.library.opcheck(ops.sparse_matmul_backward.default, args)


def test_compiled_equals_eager(target):
    torch.compiler.reset()
    values, indices, weight, bias = CASES["usual"].make(torch.float32, device=target.device)

    def step(v, w):
        return sparsekern.sparse_matmul(v.relu(), indices, w, bias).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    v, w = values.requires_grad_(), weight.requires_grad_()
    for actual, expected in zip(
        torch.autograd.grad(compiled(v, w), (v, w)),
        torch.autograd.grad(step(v, w), (v, w)),
        strict=True,
    ):
        target.assert_repeated("gradient", actual, expected)


def test_autocast(target):
    values, indices, weight, bias = CASES["usual"].make(torch.float32, device=target.device)
    v, w = values.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast(target.device, torch.bfloat16):
        out = sparsekern.sparse_matmul(v, indices, w, bias)
    assert out.dtype == torch.bfloat16
    target.assert_repeated(
        "out", out, sparsekern.sparse_matmul(values.bfloat16(), indices, weight, bias)
    )
    out.float().sum().backward()
    assert v.grad.dtype == w.grad.dtype == torch.float32


def test_vmap(target):
    values = torch.randn(3, 4, 2, device=target.device)
    indices = torch.randint(0, 6, (3, 4, 2), device=target.device)
    weights = torch.randn(3, 6, 5, device=target.device)
    bias = torch.randn(3, 5, device=target.device)
    loop = torch.stack(
        [
            sparsekern.sparse_matmul(*args)
            for args in zip(values, indices, weights, bias, strict=True)
        ]
    )
    torch.testing.assert_close(
        torch.vmap(sparsekern.sparse_matmul)(values, indices, weights, bias), loop
    )
    shared = torch.vmap(sparsekern.sparse_matmul, in_dims=(0, 0, None, None))(
        values, indices, weights[0], bias[0]
    )
    # the mapped rule adds the bias last, so the rounding may differ
    torch.testing.assert_close(
        shared, sparsekern.sparse_matmul(values, indices, weights[0], bias[0])
    )
    w = weights[0].requires_grad_()
    out = sparsekern.sparse_matmul(values[0], indices[0], w)
    upstream = torch.randn(7, *out.shape, device=target.device)
    (batched,) = torch.autograd.grad(out, w, upstream, is_grads_batched=True, retain_graph=True)
    for g, expected in zip(batched, upstream, strict=True):
        torch.testing.assert_close(g, torch.autograd.grad(out, w, expected, retain_graph=True)[0])


# -- the CPU kernels' own corners ------------------------------------------------------------------


def test_thread_counts_and_instruction_sets(instruction_sets):
    """The gradients have the same bits for every thread count; every instruction set keeps the
    error rule."""
    for _ in instruction_sets:
        for case in (CASES["skewed"], CASES["nn.Linear weight"], CASES["wide"]):
            inputs = case.make(torch.float32)
            with sparsekern.backend("native"):
                check_product(case, *inputs)
                check_gradients(case, *inputs)
            values, indices, weight, _ = inputs
            grad = torch.randn(values.shape[0], weight.shape[1])
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with sparsekern.backend("native"):
                    results.append(
                        torch.ops.sparsekern.sparse_matmul_backward(
                            grad, values, indices, weight, True, True
                        )
                    )
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


# -- bad input -------------------------------------------------------------------------------------

V, INDICES, W = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((V, INDICES.float(), W), TypeError, "indices must be int64 or int32, got torch.float32"),
        (
            (V, INDICES[:, :2], W),
            ValueError,
            r"values and indices must have the same shape, got \[2, 3\]",
        ),
        ((V.long(), INDICES, W), TypeError, "values must be float32"),
        ((V, INDICES, W[0]), ValueError, r"weight must be \[latents, features\], got shape \[4\]"),
        ((V, INDICES, W.long()), TypeError, "weight must be float32"),
        ((V, INDICES, W.double()), TypeError, "weight must have values' dtype"),
        ((V, INDICES, W.bfloat16()), TypeError, "weight must have values' dtype"),
        ((V, INDICES, W, torch.ones(3)), ValueError, r"bias must be \[4\]"),
        ((V, INDICES, W, torch.ones(4).double()), TypeError, "bias must have weight's dtype"),
        (
            (V, INDICES, W.to("meta")),
            ValueError,
            "all tensors must be on one device, got values on cpu",
        ),
        ((V[0, 0], INDICES[0, 0], W), ValueError, "indices must have at least one dimension"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=f"^sparse_matmul: {message}"):
        sparsekern.sparse_matmul(*args)


@pytest.mark.parametrize("wrong", [-1, 5, 2**31 + 1, -(2**40)])
@pytest.mark.parametrize("column_major", [False, True])
def test_index_out_of_range(target, wrong, column_major):
    indices = INDICES.clone()
    indices[1, 2] = wrong
    weight = (W.t().contiguous().t() if column_major else W).to(target.device)
    values, indices = V.to(target.device), indices.to(target.device)
    if target.checks_indices:
        message = f"sparse_matmul: indices must lie in 0..4 .*got {wrong} at flat position 5"
        with pytest.raises(IndexError, match=message):
            sparsekern.sparse_matmul(values, indices, weight)
        return
    target.require_any_index()
    # CUDA kernels cannot raise without waiting: such a code contributes nothing
    values, weight = values.clone().requires_grad_(), weight.detach().requires_grad_()
    out = sparsekern.sparse_matmul(values, indices, weight)
    assert out.tolist() == [[3.0] * 4, [2.0] * 4]
    out.sum().backward()
    assert values.grad.tolist() == [[4.0, 4.0, 4.0], [4.0, 4.0, 0.0]]
    assert weight.grad.tolist() == [[5.0] * 4] + [[0.0] * 4] * 4


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    ("values", "weight"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
def test_autocast_does_not_mix_with_float64(backend, values, weight):
    with sparsekern.backend(backend), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="autocast leaves float64 alone"):
            sparsekern.sparse_matmul(V.to(values), INDICES, W.to(weight))
