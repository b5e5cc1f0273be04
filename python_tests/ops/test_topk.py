"""Top-k on every backend: exact values, indices and masks, gradients, and what may go wrong."""

from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import FLOATS, TARGETS, activated

import sparsekern
from sparsekern import testing
from sparsekern.ops import codes_to_dense
from sparsekern.ops.topk import mask_with_codes
from sparsekern.ops.topk.reference import topk_mask_reference, topk_reference

# Slow targets (a host thread per CUDA thread, an interpreter) take part of the sweep, dealt evenly.
THINNING = {"cuda-emulation": 7, "triton-interpreter": 9}
FLAGS = [
    (sort, relu, magnitude) for sort in (True, False) for relu in (0, 1) for magnitude in (0, 1)
]


def sweep(target, offset=0):
    widths = testing.WIDTHS if target.thorough or target.device == "cuda" else (1, 7, 33, 257, 1025)
    cases = list(testing.topk_cases(widths))
    return cases[offset :: THINNING.get(target.name, 1)]


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_equal_the_reference(target, counted, dtype):
    for number, case in enumerate(sweep(target, FLOATS.index(dtype))):
        x = case.make(dtype, target.device)
        sort, relu, magnitude = FLAGS[number % len(FLAGS)]
        before = x.clone()
        codes, counts = sparsekern.topk_counts(
            x, case.k, sorted=sort, relu=bool(relu), abs=bool(magnitude)
        )
        expected = topk_reference(x.cpu(), case.k, sort, bool(relu), bool(magnitude), True)
        names = ("values", "indices", "counts")
        for name, actual, right in zip(names, (*codes, counts), expected, strict=True):
            testing.assert_same(f"{case.name}: {name}", actual, right)
        testing.assert_same("the input", x, before)
        counted()


@pytest.mark.slow_on("triton-interpreter", torch.bfloat16, torch.float16)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masks_equal_the_reference(target, counted, dtype):
    for number, case in enumerate(sweep(target, 3 + FLOATS.index(dtype))):
        x = case.make(dtype, target.device)
        relu, magnitude = bool(number & 1), bool(number & 2)
        outputs = mask_with_codes(x, case.k, relu=relu, abs=magnitude, return_counts=True)
        expected = topk_mask_reference(x.cpu(), case.k, relu, magnitude, True)
        for actual, right in zip(outputs, expected, strict=True):
            testing.assert_same(case.name, actual, right)
        assert outputs[0].is_contiguous()
        counted()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reference_is_the_definition(dtype):
    """The oracle itself against a Python sort by (value descending, index ascending)."""
    for case in testing.topk_cases((7, 33)):
        for row in case.make(dtype).tolist():
            rank = [(-np.inf if v != v else -v, i) for i, v in enumerate(row)]
            nan = [v != v for v in row]
            order = sorted(range(len(row)), key=lambda i: (not nan[i], *rank[i]))
            x = torch.tensor(row, dtype=dtype)
            _, indices, _ = topk_reference(x, case.k, True, False, False, False)
            assert indices.tolist() == order[: case.k], case


def test_float64(target, counted):
    if not target.float64:
        with pytest.raises(sparsekern.BackendUnavailableError, match="float64"):
            sparsekern.topk(torch.zeros(3, dtype=torch.float64, device=target.device), 1)
        return
    for case in testing.topk_cases((7, 257, 1025)):
        x = case.make(torch.float64)
        for actual, right in zip(
            sparsekern.topk(x, case.k),
            topk_reference(x, case.k, True, False, False, False),
            strict=False,
        ):
            testing.assert_same(case.name, actual, right)
        counted()


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("k", [600, 3000])
def test_large_k_is_sorted(target, counted, dtype, k):
    x = testing.fill_rows("few values", 1, 3000).to(dtype).to(target.device)
    actual = sparsekern.topk(x, k)
    expected = topk_reference(x.cpu(), k, True, False, False, False)
    testing.assert_same("values", actual.values, expected[0])
    testing.assert_same("indices", actual.indices, expected[1])
    counted()


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zeros_between_infinities(target, counted, dtype):
    """Half of the way from -inf to +inf lie the zeros: a search that begins there meets them."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.tensor([torch.inf, 0.0, -0.0, 0.0, -0.0, 0.0, -1.0, -torch.inf]).to(dtype)
    interpreted = target.name == "triton-interpreter"  # which would sort for minutes
    for n in (4097,) if interpreted else (4097, 9000):
        x = numbers[torch.randint(len(numbers), (2, n), generator=generator)].to(target.device)
        for k in (600,) if interpreted else (600, n // 2, n - 1, n):
            for largest in (True, False):
                codes = sparsekern.topk(x, k, largest=largest)
                expected = topk_reference(x.cpu(), k, True, False, False, False, not largest)
                testing.assert_same("values", codes.values, expected[0])
                testing.assert_same("indices", codes.indices, expected[1])
                counted()


def test_leading_dimensions(target):
    x = torch.randn(2, 3, 4, 9, device=target.device)
    values, indices = sparsekern.topk(x, 2)
    assert values.shape == indices.shape == (2, 3, 4, 2)
    testing.assert_same("3-D", values.view(-1, 2), sparsekern.topk(x.view(-1, 9), 2).values)
    assert sparsekern.topk(x[0, 0, 0], 2).values.shape == (2,)
    moved = x.permute(2, 0, 1, 3)
    testing.assert_same("permuted", sparsekern.topk(moved, 2).values, values.permute(2, 0, 1, 3))


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_equal_the_dense_expression(target, counted, dtype, relu):
    """Rows with fewer than k positive values, ties, and an upstream gradient that is not
    contiguous."""
    for fill in ("normal", "negative", "98 % zeros", "few values"):
        x = testing.fill_rows(fill, 4, 33).to(dtype).to(target.device)
        upstream = torch.randn(33, 4, device=target.device).to(dtype).t()
        ours, dense = x.clone().requires_grad_(), x.clone().requires_grad_()
        sparsekern.topk_mask(ours, 5, relu=relu).backward(upstream)
        keep = topk_mask_reference(torch.ones_like(x), 5, False, False, False)[0] * 0
        keep.scatter_(-1, topk_reference(x, 5, True, False, False, False)[1], 1)
        kept = dense * keep
        (kept.relu() if relu else kept).backward(upstream)
        testing.assert_same(fill, ours.grad, dense.grad)
        counted()


def test_codes_gradient_is_a_scatter(target):
    x = torch.randn(3, 17, device=target.device, requires_grad=True)
    values, indices = sparsekern.topk(x, 4)
    assert values.requires_grad and not indices.requires_grad
    values.sum().backward()  # an expanded upstream gradient
    expected = torch.zeros(3, 17, device=target.device).scatter(-1, indices, 1.0)
    testing.assert_same("gradient", x.grad, expected)


def test_second_derivative(target):
    x = torch.randn(2, 9, device=target.device, requires_grad=True)
    (grad,) = torch.autograd.grad(
        sparsekern.topk_mask(x, 3, relu=True).pow(3).sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(grad.sum(), x)
    masked = sparsekern.topk_mask(x, 3, relu=True)
    torch.testing.assert_close(second, 6 * masked)


def test_numerical_gradients(target):
    target.require_float64()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 2, 4], [1, 5, 3]])
    for function, inputs in (
        (lambda x: sparsekern.topk(x, 3).values, (x,)),
        (lambda x: sparsekern.topk(x, 3, relu=True, abs=True, sorted=False).values, (x,)),
        (lambda x: sparsekern.topk_mask(x, 3, relu=True), (x,)),
        (lambda v: codes_to_dense(v, indices, 6), (values,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


# -- torch's own machinery -------------------------------------------------------------------------


def test_operator_registration(target):
    x = torch.randn(3, 9, device=target.device, requires_grad=True)
    values, indices = sparsekern.topk(x.detach(), 2)
    ops = torch.ops.sparsekern
    strided = torch.randn(9, 4, device=target.device).t()
    for op, args in (
        (ops.topk.default, (x, 2, True, True, False, True)),
        (ops.topk.default, (strided, 2, False, False, True, False)),
        (ops.topk_mask.default, (x, 2, True, False, True)),
        (ops.topk_mask.default, (strided, 2, False, False, False)),
        (ops.codes_to_dense.default, (values.requires_grad_(), indices, 9)),
    ):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(target, dynamic):
    torch.compiler.reset()

    def step(x):
        values, indices = sparsekern.topk(x * 2, 3)
        return values, indices, sparsekern.topk_mask(x, 2, relu=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (11, 13):
        x = torch.randn(4, n, device=target.device, requires_grad=True)
        for actual, expected in zip(compiled(x), step(x), strict=True):
            testing.assert_same("compiled", actual, expected)
        (grad,) = torch.autograd.grad(compiled(x)[2].sum(), x)
        testing.assert_same("gradient", grad, (sparsekern.topk_mask(x, 2, relu=True) != 0).float())


def test_vmap(target):
    x = torch.randn(4, 3, 9, device=target.device)
    mapped = torch.vmap(lambda row: sparsekern.topk(row, 2), in_dims=1)(x)
    testing.assert_same("values", mapped.values, sparsekern.topk(x.transpose(0, 1), 2).values)
    counts = torch.vmap(lambda row: sparsekern.topk_counts(row, 2)[1])(x)
    assert counts.shape == (4, 9) and int(counts.sum()) == 4 * 3 * 2
    row = x[0].requires_grad_()
    y = sparsekern.topk_mask(row, 2)
    upstream = torch.eye(9, device=target.device).unsqueeze(1).expand(9, 3, 9)
    (grads,) = torch.autograd.grad(y, row, upstream, is_grads_batched=True)
    testing.assert_same("batched gradient", grads, upstream * (y != 0))


def test_codes_to_dense(target, counted):
    for dtype in FLOATS:
        x = torch.randn(3, 50, device=target.device).to(dtype)
        values, indices = sparsekern.topk(x, 7)
        expected = torch.zeros_like(x).scatter(-1, indices, values)
        testing.assert_same("dense", codes_to_dense(values, indices, 50), expected)
        counted()


@hypothesis.settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_any_row(data):
    """Properties on rows that hypothesis invents: the codes are the head of the ordered row."""
    rows = data.draw(
        hypothesis.extra.numpy.arrays(
            np.float32,
            st.tuples(st.integers(1, 3), st.integers(1, 200)),
            elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
        )
    )
    x = torch.from_numpy(rows)
    k = data.draw(st.integers(1, x.shape[1]))
    values, indices = sparsekern.topk(x, k)
    testing.assert_same("gathered", values, x.gather(-1, indices))
    assert all(len(set(row)) == k for row in indices.tolist())
    testing.assert_same("order", indices, topk_reference(x, k, True, False, False, False)[1])
    once = sparsekern.topk_mask(x.abs(), k)
    testing.assert_same("idempotent", sparsekern.topk_mask(once, k), once)


# -- Triton's own corners --------------------------------------------------------------------------


@pytest.fixture(
    params=[target for target in TARGETS if target.backend == "triton"],
    ids=lambda target: target.name,
)
def grouped(request, monkeypatch):
    """Triton makes every row of 4096 elements and more short by groups, however few rows."""
    module = pytest.importorskip("sparsekern.ops.topk.triton")
    monkeypatch.setattr(module, "MANY_ELEMENTS", 1)
    for chosen in activated(request.param):
        yield chosen, module.group_span


# n, k, the elements of a group, and of a group of groups
@pytest.mark.parametrize(
    ("n", "k", "spans"),
    [
        (4096, 32, [8]),
        pytest.param(4099, 1, [64], marks=pytest.mark.slow),
        pytest.param(5000, 250, [4], marks=pytest.mark.slow),
        pytest.param(16384, 64, [16], marks=pytest.mark.slow),
        pytest.param(32768, 256, [8, 4], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_groups_keep_the_k_largest(grouped, n, k, spans, dtype):
    device, span_of = grouped[0].device, grouped[1]
    length = n
    for span in spans:
        assert span_of(2, length, k) == span
        length = -(-length // span)
    assert span_of(2, length, k) == 0
    # Each dtype takes a third of the fills.
    for number, fill in list(enumerate((*testing.FILLS, *HOT)))[FLOATS.index(dtype) :: 3]:
        x = hot_rows(fill, 2, n) if fill in HOT else testing.fill_rows(fill, 2, n)
        x = testing.lay_out(x.to(dtype), ("contiguous", *testing.LAYOUTS)[number % 5]).to(device)
        sort, relu, magnitude = FLAGS[number % len(FLAGS)]
        codes = sparsekern.topk(x, k, sorted=sort, relu=bool(relu), abs=bool(magnitude))
        expected = topk_reference(x.cpu(), k, sort, bool(relu), bool(magnitude), False)
        testing.assert_same(f"{fill}: values", codes.values, expected[0])
        testing.assert_same(f"{fill}: indices", codes.indices, expected[1])


@pytest.mark.slow
def test_groups_keep_the_k_smallest(grouped):
    """Among them rows whose last group is cut off and holds NaN alone."""
    n, k = 4101, 200
    assert grouped[1](2, n, k) == 4
    for number, fill in enumerate(("normal", "last group", "half -inf", "all nan")):
        x = hot_rows(fill, 2, n) if fill in HOT else testing.fill_rows("half -inf", 2, n)
        if fill == "all nan":
            x[:, k // 2 :] = torch.nan
        x = x.to(FLOATS[number % 3]).to(grouped[0].device)
        sort, relu, magnitude = FLAGS[number]
        codes = sparsekern.topk(x, k, -1, False, sort, relu=bool(relu), abs=bool(magnitude))
        expected = topk_reference(x.cpu(), k, sort, bool(relu), bool(magnitude), False, True)
        testing.assert_same(f"{fill}: values", codes.values, expected[0])
        testing.assert_same(f"{fill}: indices", codes.indices, expected[1])


HOT = ("one group", "every 64th", "last group", "tie to the left", "-inf but few")


def hot_rows(fill, rows, n):
    """Rows [rows, n] whose largest elements lie where groups could lose them."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(n))
    if fill == "one group":
        x[:, 1024:1152] += 100
    elif fill == "every 64th":
        x[:, ::64] += 100
    elif fill == "last group":
        x[:, -3:] = torch.tensor([torch.nan, -torch.inf, torch.nan])
    elif fill == "tie to the left":  # better groups at the right hold the same value
        x[:] = 1
        x[:, n // 2 :: 5] = 2
    else:
        x[:] = -torch.inf
        x[:, n // 3 : n // 3 + 2] = torch.tensor([-0.0, 0.0])
    return x


# -- the CPU kernels' own corners ------------------------------------------------------------------


def native_cpu():
    module, reason = sparsekern.dispatch.modules.native_module("cpu")
    if module is None:
        pytest.skip(reason)
    return module


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_thread_count_gives_the_same_codes(threads, eager_teams):
    native_cpu()
    before = torch.get_num_threads()
    # one long row is split over threads, rows of NaN leave the fast path
    inputs = [testing.fill_rows(fill, 1, 300_000) for fill in ("normal", "few values", "nan")]
    inputs += [testing.fill_rows("normal", 9, 5000), testing.fill_rows("ascending", 2, 200_000)]
    try:
        torch.set_num_threads(threads)
        with sparsekern.backend("native"):
            results = [sparsekern.topk(x, 40) for x in inputs]
    finally:
        torch.set_num_threads(before)
    for x, (values, indices) in zip(inputs, results, strict=True):
        expected = topk_reference(x, 40, True, False, False, False)
        testing.assert_same("values", values, expected[0])
        testing.assert_same("indices", indices, expected[1])


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_codes(instruction_sets):
    assert "baseline" in native_cpu().instruction_sets()
    for name in instruction_sets:
        with sparsekern.backend("native"):
            for dtype in FLOATS:
                for case in testing.topk_cases((33, 1025, 4097)):
                    x = case.make(dtype)
                    codes, counts = sparsekern.topk_counts(x, case.k)
                    expected = topk_reference(x, case.k, True, False, False, True)
                    for left, right in zip((*codes, counts), expected, strict=True):
                        testing.assert_same(f"{name}, {case.name}", left, right)


# -- bad input -------------------------------------------------------------------------------------

X = torch.randn(2, 8)
NESTED = torch.nested.nested_tensor([torch.zeros(3, 5), torch.zeros(2, 5)], layout=torch.jagged)


BAD_INPUT = [
    (X, -1, ValueError, r"k must lie in {0}..8 .*got -1"),
    (X, 9, ValueError, r"k must lie in {0}..8 .*got 9"),
    (X, 2.0, TypeError, r"k must be an integer, got 2.0 of type float"),
    (X, True, TypeError, r"k must be an integer, got True of type bool"),
    (X, torch.tensor(2.0), TypeError, r"k must be an integer"),
    (X, torch.tensor(True), TypeError, r"k must be an integer"),
    (X, torch.tensor([2]), TypeError, r"k must be an integer"),
    (X, None, TypeError, r"k must be an integer, got None"),
    (X.to(torch.complex64), 1, TypeError, r"x must be float32.*got torch.complex64"),
    ([1.0, 2.0], 1, TypeError, r"x must be a tensor, got list"),
    (X.to_sparse(), 1, TypeError, r"x must be a dense tensor, got one of torch.sparse_coo"),
    (NESTED, 1, TypeError, r"x must be a dense tensor, got one of nested tensors"),
]
# What torch.topk takes, and topk with it.
BAD_INPUT_OF_A_MASK = [
    (X, 0, ValueError, r"k must lie in 1..8 .*got 0"),
    (torch.tensor(1.0), 1, ValueError, r"x must have at least one dimension"),
    (X.long(), 1, TypeError, r"x must be float32.*got torch.int64"),
    (torch.empty(3, 0), 1, ValueError, r"no k is possible, since the size of the last"),
]


@pytest.mark.parametrize(
    ("function", "x", "k", "error", "message"),
    [
        *((sparsekern.topk, *case) for case in BAD_INPUT),
        *((sparsekern.topk_mask, *case) for case in BAD_INPUT + BAD_INPUT_OF_A_MASK),
        *((sparsekern.topk_counts, *case) for case in BAD_INPUT + BAD_INPUT_OF_A_MASK),
    ],
)
def test_bad_input(function, x, k, error, message):
    message = message.format(0 if function is sparsekern.topk else 1)
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        function(x, k)


def test_k_takes_numpy_integers():
    assert sparsekern.topk(X, np.int64(3)).values.shape == (2, 3)


@pytest.mark.parametrize("function", [sparsekern.topk, sparsekern.topk_mask])
def test_forward_mode_is_refused(function):
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: function(x, 2), (X,), (torch.ones_like(X),))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([[0, -1]], IndexError, r"indices must lie in 0..4 .*got -1 at flat position 1"),
        ([[0, 5]], IndexError, ".* got 5"),
        ([[0.0, 1.0]], TypeError, "indices must be int64 or int32"),
        ([[0, 1, 2]], ValueError, ".*same shape"),
    ],
)
def test_codes_to_dense_bad_input(target, indices, error, message):
    indices = torch.tensor(indices, device=target.device)
    if error is IndexError and target.device != "cpu":  # such a code is left out
        target.require_any_index()
        values = torch.ones(1, 2, device=target.device, requires_grad=True)
        dense = codes_to_dense(values, indices, 5)
        assert dense.tolist() == [[1, 0, 0, 0, 0]]
        dense.sum().backward()
        assert values.grad.tolist() == [[1, 0]]
        return
    with pytest.raises(error, match=f"^codes_to_dense: {message}"):
        codes_to_dense(torch.ones(1, 2, device=target.device), indices, 5)


def test_codes_to_dense_takes_int32(target):
    indices = torch.tensor([[0, 3]], dtype=torch.int32, device=target.device)
    values = torch.ones(1, 2, device=target.device, requires_grad=True)
    dense = codes_to_dense(values, indices, 5)
    assert dense.tolist() == [[1, 0, 0, 1, 0]]
    dense.sum().backward()
    assert values.grad.tolist() == [[1, 1]]


def test_the_operation_itself_refuses_k_above_n():
    with pytest.raises(ValueError, match=r"k must lie in 1..8"):
        torch.ops.sparsekern.topk(X, 9, True, False, False, False)
