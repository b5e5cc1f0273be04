"""linear_topk on every backend: exactly the dense layer's codes, in slices, with the dense
gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import FLOATS

import sparsekern
from sparsekern import testing
from sparsekern.ops.linear_topk import slices as linear_slices

F = torch.nn.functional


def whole(*shape: int, high: int = 3) -> torch.Tensor:
    """Small integers: their products and sums are exact in every dtype, and full of ties."""
    return torch.randint(-high, high + 1, shape).float()


def dense(x, weight, bias, k, *, pre_bias=None, scale=None, latents=None, relu=True):
    """The definition, with the dense scores and autograd: (values, indices), ascending indices."""
    scores = F.linear(x if pre_bias is None else x - pre_bias, weight, bias)
    scores = scores if scale is None else scores * scale
    if latents is not None:
        mask = torch.full_like(scores, -torch.inf)
        mask[..., latents] = 0
        scores = scores + mask
    indices = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(-1).values
    values = scores.gather(-1, indices)
    return (values.relu() if relu else values), indices


@pytest.fixture(params=["one slice", "slices", "slices and row parts"])
def sliced(request, monkeypatch):
    """Buffers so small that a few dozen latents make several slices, and a few rows several
    parts."""
    monkeypatch.setattr(linear_slices, "SMALL_TERMS", 0)
    monkeypatch.setattr(linear_slices, "FEW_ROWS", 0)
    if request.param != "one slice":
        elements = 16 if request.param == "slices" else 5 * 8
        monkeypatch.setattr(linear_slices, "SMALLEST_SLICE", 8)
        monkeypatch.setattr(
            linear_slices, "BUFFER_ELEMENTS", dict.fromkeys(("cpu", "cuda"), elements)
        )
    return request.param


SIZES = [(1, 3, 7, 1), (4, 5, 40, 3), (7, 6, 33, 33), (3, 4, 65, 12), (12, 2, 50, 49), (5, 1, 9, 2)]


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_equal_the_dense_layers(target, counted, sliced, dtype):
    for rows, d, n, k in SIZES:
        for options in ({}, {"pre_bias": whole(d)}, {"scale": 2.0 ** whole(n, high=1)}):
            x, weight, bias = whole(rows, d), whole(n, d), whole(n)
            expected = dense(x, weight, bias, k, **options)
            for weight_dtype in {dtype, torch.float32}:
                moved = [t.to(weight_dtype).to(target.device) for t in (weight, bias)]
                there = {
                    name: value.to(weight_dtype).to(target.device)
                    for name, value in options.items()
                }
                codes = sparsekern.linear_topk(x.to(dtype).to(target.device), *moved, k, **there)
                assert codes.values.dtype == dtype
                testing.assert_same("values", codes.values.float(), expected[0])
                testing.assert_same("indices", codes.indices, expected[1])
                counted()


def test_sorted_codes_have_the_order_of_topk(target, sliced):
    x, weight = whole(6, 4).to(target.device), whole(60, 4).to(target.device)
    codes = sparsekern.linear_topk(x, weight, None, 20, relu=False, sorted=True)
    expected = sparsekern.topk(F.linear(x, weight), 20)
    testing.assert_same("values", codes.values, expected.values)
    testing.assert_same("indices", codes.indices, expected.indices)


def test_only_the_given_latents_are_selected(target, sliced):
    x, weight, bias = whole(5, 4), whole(60, 4), whole(60)
    latents = torch.arange(2, 60, 3)
    expected = dense(x, weight, bias, 7, latents=latents, relu=False)
    moved = [t.to(target.device) for t in (x, weight, bias)]
    codes = sparsekern.linear_topk(*moved, 7, latents=latents.to(target.device), relu=False)
    testing.assert_same("values", codes.values, expected[0])
    testing.assert_same("indices", codes.indices, expected[1])


GROUPS = [(2, 20, 4), (5, 40, 10), (20, 60, 20), (3, 33, 33), (1, 30, 7)]


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("sorted_", [False, True])
def test_groups_are_selected_separately(target, counted, sliced, sorted_):
    for groups, n, k in GROUPS:
        x, weight, bias = whole(7, 4), whole(n, 4), whole(n)
        moved = [t.to(target.device) for t in (x, weight, bias)]
        codes = sparsekern.linear_topk(*moved, k, groups=groups, sorted=sorted_)
        scores = F.linear(x, weight, bias).unflatten(1, (groups, n // groups))
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., : k // groups]
        order = order if sorted_ else order.sort(-1).values
        starts = torch.arange(groups).unsqueeze(1) * (n // groups)
        testing.assert_same("values", codes.values, scores.gather(-1, order).relu().flatten(1))
        testing.assert_same("indices", codes.indices, (order + starts).flatten(1))
        counted()


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("k", [4, 45], ids=["few", "more than the positive ones"])
def test_gradients_equal_dense_autograd(target, counted, sliced, k):
    torch.manual_seed(k)
    rows, d, n = 9, 6, 50
    x, weight, bias = torch.randn(rows, d), torch.randn(n, d), torch.randn(n) - 0.5
    pre_bias, scale = torch.randn(d), torch.rand(n) + 0.5
    tensors = [t.to(target.device) for t in (x, weight, bias, pre_bias, scale)]
    upstream = torch.randn(k, rows, device=target.device).t()  # not contiguous
    ours = [t.clone().requires_grad_() for t in tensors]
    codes = sparsekern.linear_topk(*ours[:3], k, pre_bias=ours[3], scale=ours[4])
    grads = torch.autograd.grad(codes.values, ours, upstream)
    truth = [t.double().cpu().requires_grad_() for t in tensors]
    values, indices = dense(*truth[:3], k, pre_bias=truth[3], scale=truth[4])
    testing.assert_same("indices", codes.indices, indices)
    if k == 45:
        assert (values == 0).any(), "the case must have fewer than k positive scores"
    expected = torch.autograd.grad(values, truth, upstream.double().cpu())
    plain = [t.cpu().requires_grad_() for t in tensors]
    plain_values, _ = dense(*plain[:3], k, pre_bias=plain[3], scale=plain[4])
    plains = torch.autograd.grad(plain_values, plain, upstream.cpu())
    for name, grad, right, rough in zip(
        ("x", "weight", "bias", "pre_bias", "scale"), grads, expected, plains, strict=True
    ):
        assert grad.dtype == torch.float32
        testing.assert_error_rule(f"d {name}", grad, right, rough, right.abs().max() * 4)
        counted()


@pytest.mark.parametrize("rows", [1, 20], ids=["fewer codes than latents", "more"])
def test_gradient_of_pre_bias_alone(target, rows):
    """Without a gradient of x, whose rows would only be summed."""
    x, weight, pre_bias = torch.randn(rows, 6), torch.randn(30, 6), torch.randn(6)
    grads = torch.randn(rows, 4)
    ours = pre_bias.clone().to(target.device).requires_grad_()
    codes = sparsekern.linear_topk(
        x.to(target.device), weight.to(target.device), None, 4, pre_bias=ours
    )
    codes.values.backward(grads.to(target.device))
    theirs = pre_bias.double().requires_grad_()
    dense(x.double(), weight.double(), None, 4, pre_bias=theirs)[0].backward(grads.double())
    torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.slow_on("native-cpu")
def test_second_derivatives(target):
    target.require_float64()
    torch.manual_seed(0)
    shapes = ((4, 5), (20, 5), (20,), (5,))
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    leaves.append(torch.rand(20, dtype=torch.float64).add(0.5).requires_grad_())

    def values(x, weight, bias, pre_bias, scale):
        return sparsekern.linear_topk(x, weight, bias, 12, pre_bias=pre_bias, scale=scale).values

    assert torch.autograd.gradcheck(values, leaves)
    assert torch.autograd.gradgradcheck(values, leaves)


def test_the_transposition_is_shared(target):
    x, weight = torch.randn(6, 5, device=target.device), torch.randn(30, 5, device=target.device)
    weight.requires_grad_()
    (values, indices), transposition = sparsekern.linear_topk_transposed(x, weight, None, 4)
    again = sparsekern.transpose_codes(indices, 30)
    testing.assert_same("offsets", transposition.offsets, again.offsets)
    testing.assert_same("positions", transposition.positions, again.positions)
    counts = sparsekern.count_active(indices, 30)
    testing.assert_same("counts", transposition.counts, counts)
    dictionary = torch.randn(30, 5, device=target.device, requires_grad=True)
    with_it = sparsekern.sparse_matmul(values, indices, dictionary, transposition=transposition)
    without = sparsekern.sparse_matmul(*sparsekern.linear_topk(x, weight, None, 4), dictionary)
    for shared, own in zip(
        torch.autograd.grad(with_it.square().sum(), (weight, dictionary)),
        torch.autograd.grad(without.square().sum(), (weight, dictionary)),
        strict=True,
    ):
        target.assert_repeated("gradient", shared, own)


def test_leading_dimensions_and_empty_batches(target):
    weight, bias = torch.randn(30, 4, device=target.device), torch.randn(30, device=target.device)
    x = torch.randn(2, 3, 4, device=target.device)
    codes = sparsekern.linear_topk(x, weight, bias, 5)
    assert codes.values.shape == codes.indices.shape == (2, 3, 5)
    flat = sparsekern.linear_topk(x.view(6, 4), weight, bias, 5)
    testing.assert_same("indices", codes.indices.view(6, 5), flat.indices)
    weight.requires_grad_()
    empty = sparsekern.linear_topk(x[:0], weight, bias, 5)
    assert empty.values.shape == (0, 3, 5)
    empty.values.sum().backward()
    assert not weight.grad.any()


def test_autocast_keeps_the_weight_and_its_gradient_in_float32(target):
    x, weight = torch.randn(8, 6, device=target.device), torch.randn(40, 6, device=target.device)
    weight.requires_grad_()
    with torch.autocast(target.device, torch.bfloat16):
        values, _ = sparsekern.linear_topk(x, weight, None, 5)
    assert values.dtype == torch.bfloat16
    expected = sparsekern.linear_topk(x.bfloat16(), weight, None, 5)
    testing.assert_same("values", values, expected.values)
    values.float().sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.slow_on("triton-interpreter")
def test_operator_registration(target):
    x, weight = torch.randn(5, 4, device=target.device), torch.randn(20, 4, device=target.device)
    bias, scale = torch.randn(20, device=target.device), torch.rand(20, device=target.device) + 1
    for tensor in (x, weight, bias, scale):
        tensor.requires_grad_()
    for transpose in (False, True):
        args = (x, weight, bias, 4, None, scale, None, 2, True, False, transpose)
        torch.library.opcheck(torch.ops.sparsekern.linear_topk.default, args)
    indices = torch.randint(0, 9, (4, 3), device=target.device)
    torch.library.opcheck(torch.ops.sparsekern.transpose_codes.default, (indices, 9))


def test_compiled_equals_eager(target):
    torch.compiler.reset()
    x, weight = torch.randn(5, 4, device=target.device), torch.randn(20, 4, device=target.device)
    weight.requires_grad_()

    def step(x, weight):
        (values, indices), grouped = sparsekern.linear_topk_transposed(x, weight, None, 3)
        out = sparsekern.sparse_matmul(values, indices, weight, transposition=grouped)
        return (out - x).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x, weight), weight)[0]
    expected = torch.autograd.grad(step(x, weight), weight)[0]
    torch.testing.assert_close(actual, expected)


def test_vmap_over_layers(target):
    x = torch.randn(3, 5, 4, device=target.device)
    weights = torch.randn(3, 20, 4, device=target.device)

    def encode(x, weight):
        return sparsekern.linear_topk(x, weight, None, 3)

    values, indices = torch.vmap(encode)(x, weights)
    for at in range(3):
        testing.assert_same("values", values[at], encode(x[at], weights[at]).values)
        testing.assert_same("indices", indices[at], encode(x[at], weights[at]).indices)


def test_the_scores_are_never_all_there():
    """A step at n = 65536 allocates less than its scores would take."""
    x, weight = torch.randn(256, 8), torch.randn(65536, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        sparsekern.linear_topk(x, weight, None, 4).values.sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 256 * 65536 * 4, f"one operation allocated {largest} bytes"


X, WEIGHT = torch.zeros(2, 4), torch.zeros(9, 4)
BAD = {
    "k = 0": (ValueError, "k must lie in 1..9", lambda: sparsekern.linear_topk(X, WEIGHT, None, 0)),
    "k > n": (ValueError, "got 10", lambda: sparsekern.linear_topk(X, WEIGHT, None, 10)),
    "k > latents": (
        ValueError,
        r"1\.\.2 \(the size of latents\)",
        lambda: sparsekern.linear_topk(X, WEIGHT, None, 3, latents=torch.tensor([1, 2])),
    ),
    "float k": (TypeError, "integer", lambda: sparsekern.linear_topk(X, WEIGHT, None, 2.0)),
    "integer x": (TypeError, "x must be", lambda: sparsekern.linear_topk(X.int(), WEIGHT, None, 2)),
    "width": (
        ValueError,
        r"weight must be \[latents, 4\]",
        lambda: sparsekern.linear_topk(X, WEIGHT.t(), None, 2),
    ),
    "weight dtype": (
        TypeError,
        "weight must have x's dtype",
        lambda: sparsekern.linear_topk(X, WEIGHT.double(), None, 2),
    ),
    "bias": (
        ValueError,
        r"bias must be \[9\]",
        lambda: sparsekern.linear_topk(X, WEIGHT, X[0], 2),
    ),
    "pre_bias": (
        ValueError,
        r"pre_bias must be \[4\]",
        lambda: sparsekern.linear_topk(X, WEIGHT, None, 2, pre_bias=WEIGHT[:, 0]),
    ),
    "latents": (
        ValueError,
        r"latents must be \[M\] int64",
        lambda: sparsekern.linear_topk(X, WEIGHT, None, 2, latents=torch.tensor([1.0])),
    ),
    "groups that do not divide k": (
        ValueError,
        "groups must divide k = 4 and the number of latents 9, got 3",
        lambda: sparsekern.linear_topk(X, WEIGHT, None, 4, groups=3),
    ),
    "groups of given latents": (
        ValueError,
        "groups must be 1 when latents is given",
        lambda: sparsekern.linear_topk(
            X, WEIGHT, None, 2, groups=2, latents=torch.tensor([1, 2, 4, 5])
        ),
    ),
    "transposition": (
        ValueError,
        "transposition must come from",
        lambda: sparsekern.sparse_matmul(
            X,
            X.long(),
            WEIGHT,
            transposition=sparsekern.transpose_codes(torch.zeros(3, dtype=torch.int64), 9),
        ),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    error, text, call = BAD[name]
    with pytest.raises(error, match=text):
        call()


def test_latents_out_of_range(target):
    if target.device != "cpu":
        pytest.skip("an index out of range is an assertion on the GPU; run on a CPU target")
    for wrong in ([1, 9], [-1, 3]):
        with pytest.raises(IndexError, match=r"latents must lie in 0\.\.8"):
            sparsekern.linear_topk(X, WEIGHT, None, 2, latents=torch.tensor(wrong))
    for wrong in ([5, 3, 7], [3, 3, 4]):
        with pytest.raises(ValueError, match="latents must ascend, each once, got"):
            sparsekern.linear_topk(X, WEIGHT, None, 2, latents=torch.tensor(wrong))


def test_latents_of_scale_zero_pass_nothing_on(target):
    torch.manual_seed(0)
    device = target.device
    x, weight = torch.randn(6, 4, device=device), torch.randn(5, 4, device=device)
    scale = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0], device=device, requires_grad=True)
    weight.requires_grad_()
    values = sparsekern.linear_topk(x, weight, None, 5, scale=scale).values
    found = torch.autograd.grad(values.square().sum(), (weight, scale), create_graph=True)
    dense = ((x @ weight.t()).relu() * scale).square().sum()
    wanted = torch.autograd.grad(dense, (weight, scale), create_graph=True)
    torch.testing.assert_close(found, wanted)
    second = torch.autograd.grad(found[1].square().sum(), (weight, scale))
    assert all(gradient.isfinite().all() for gradient in second)


def test_gradients_of_the_scale_do_not_overflow_on_the_way():
    x, weight = torch.full((1, 4), 8.0).half(), torch.full((1, 4), 8.0).half()
    scale = torch.full((1,), 16.0).half().requires_grad_()
    values = sparsekern.linear_topk(x, weight, None, 1, scale=scale).values  # 4096
    values.backward(torch.full((1, 1), 64.0).half())
    assert scale.grad.item() == 64 * 256
