"""The k*B largest of a batch on every backend: exact masks and positions, gradients, bad input."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import FLOATS

import sparsekern
from sparsekern import testing
from sparsekern.ops import batch_topk as public
from sparsekern.ops.batch_topk import batch_mask
from sparsekern.ops.batch_topk.candidates import largest_of_list
from sparsekern.ops.batch_topk.reference import batch_topk_reference
from sparsekern.ops.order import key_of
from sparsekern.ops.topk import native

# Slow targets (a host thread per CUDA thread, an interpreter) take part of the sweep.
THINNING = {"cuda-emulation": 9, "triton-interpreter": 9}
# rows, columns, k: shares below and above one, everything, one row, rows wider than one block
SIZES = ((7, 33, 2), (40, 65, 0.1), (5, 257, 3.5), (3, 9, 9), (1, 257, 20), (60, 130, 1))


def compare(what, x, k, relu=False):
    actual = batch_mask(x, k, relu=relu)
    total = int(k * math.prod(x.shape[:-1]))
    expected = batch_topk_reference(x.cpu(), total, relu)
    for name, one, right in zip(("masked", "values", "positions"), actual, expected, strict=True):
        testing.assert_same(f"{what}: {name}", one, right)
    assert actual[0].is_contiguous()


def unequal_rows(kind, rows, n):
    """float32 [rows, n] in which few rows own most of the largest values."""
    x = testing.fill_rows("normal", rows, n)
    if kind == "one row takes everything":
        x[rows // 2] += 100
    elif kind == "one row of +inf":
        x[rows - 1] = torch.inf
    elif kind == "one row of NaN":
        x[rows // 3] = torch.nan
    elif kind == "ever wider rows":
        x *= torch.arange(1, rows + 1).unsqueeze(1) ** 2
    elif kind == "ties across rows":  # the threshold is hit in every row
        x = (x.clamp(-1, 1) * 2).round()
    elif kind == "a tied row above tied rows":
        x = torch.zeros(rows, n)
        x[rows // 2] = 1
    elif kind == "signed zeros below one value":
        x = torch.where(x < 0, -torch.zeros(()), torch.zeros(()))
        x[-1, -1] = 1
    return x


UNEQUAL = (
    "one row takes everything",
    "one row of +inf",
    "one row of NaN",
    "ever wider rows",
    "ties across rows",
    "a tied row above tied rows",
    "signed zeros below one value",
)


@pytest.mark.slow_on("triton-interpreter", torch.bfloat16, torch.float16)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_the_reference(target, counted, dtype):
    cases = [(fill, size) for size in SIZES for fill in testing.FILLS]
    for number, (fill, (rows, n, k)) in enumerate(
        cases[FLOATS.index(dtype) :: THINNING.get(target.name, 1)]
    ):
        x = testing.fill_rows(fill, rows, n).to(dtype).to(target.device)
        before = x.clone()
        compare(f"{fill}, {rows} x {n}, k={k}", x, k, relu=bool(number & 1))
        testing.assert_same("the input", x, before)
        counted()


@pytest.mark.parametrize("kind", UNEQUAL)
@pytest.mark.parametrize("k", [0.5, 1, 2, 16, 40])
def test_rows_with_more_than_their_share(target, counted, kind, k):
    """Rows whose first candidates are all taken hand in more: no element is lost, no tie moves."""
    for dtype in FLOATS if target.thorough else FLOATS[:1]:
        rows, n = (20, 300) if target.thorough else (9, 150)
        compare(kind, unequal_rows(kind, rows, n).to(dtype).to(target.device), k)
        counted()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(target, layout):
    x = testing.lay_out(testing.fill_rows("few values", 8, 70), layout).to(target.device)
    compare(layout, x, 3)
    if layout == "expanded":  # strides of 0 in the gradient, too
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(sparsekern.batch_topk(x, 3).sum(), x)
        assert int(grad.sum()) == 24


def test_leading_dimensions(target):
    x = torch.randn(2, 3, 4, 9, device=target.device)
    flat = sparsekern.batch_topk(x.view(-1, 9), 2)
    testing.assert_same("4-D", sparsekern.batch_topk(x, 2).view(-1, 9), flat)
    row = x[0, 0, 0]
    testing.assert_same("1-D", sparsekern.batch_topk(row, 2), sparsekern.topk_mask(row, 2))
    empty = x[:, :0].requires_grad_()
    masked, values, positions = batch_mask(empty, 0.01)
    assert masked.shape == (2, 0, 4, 9) and values.shape == positions.shape == (0,)
    masked.sum().backward()


def test_how_many_are_kept():
    x = torch.randn(10, 7)
    for k in (0.1, 0.25, 0.7, 1, 1.0, 2.99, 6.3, 7, 7.0, np.int64(3), np.float32(2.5)):
        kept = int((sparsekern.batch_topk(x, k) != 0).sum())
        assert kept == int(float(k) * 10), k


def test_reference_is_the_definition():
    """The oracle itself against a Python sort by (value descending, flat index ascending)."""
    for fill in testing.FILLS:
        x = testing.fill_rows(fill, 4, 9)
        flat = x.flatten().tolist()
        order = sorted(
            range(len(flat)),
            key=lambda i: (flat[i] == flat[i], -flat[i] if flat[i] == flat[i] else 0, i),
        )
        for total in (1, 5, 36):
            masked, values, positions = batch_topk_reference(x, total, False)
            assert positions.tolist() == sorted(order[:total]), fill
            testing.assert_same(fill, values, x.flatten()[positions])
            testing.assert_same(fill, masked.flatten()[positions], values)
            assert masked.count_nonzero() == values.count_nonzero()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_keys_have_the_order_of_the_values(dtype):
    bounds = torch.finfo(dtype)
    ascending = [-torch.inf, bounds.min, -1, -bounds.tiny, 0, bounds.tiny, 1, bounds.max, torch.inf]
    key = key_of(torch.tensor([*ascending, torch.nan], dtype=dtype))
    assert (key.diff() > 0).all()
    equal = key_of(torch.tensor([[0.0, -0.0], [torch.nan, -torch.nan]], dtype=dtype))
    assert (equal[:, 0] == equal[:, 1]).all()


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_largest_of_list(dtype):
    """How a GPU selects among the candidates, on any device."""
    for fill in testing.FILLS:
        x = testing.fill_rows(fill, 1, 300).to(dtype)
        for total in (1, 2, 77, 299, 300):
            _, values, places = batch_topk_reference(x, total, False)
            first = largest_of_list(x[0], torch.arange(300) * 10, total)
            testing.assert_same(fill, first[0], values)
            testing.assert_same(fill, first[1], places * 10)


def test_few_rows_are_read_again(monkeypatch):
    """Independent scores take one round of candidates; a row that owns everything one more."""
    if sparsekern.dispatch.modules.native_module("cpu")[0] is None:
        pytest.skip(sparsekern.dispatch.modules.native_module("cpu")[1])
    calls, original = [], native.topk

    def counted(x, m, *flags):
        calls.append((len(x), m))
        return original(x, m, *flags)

    monkeypatch.setattr(native, "topk", counted)
    x = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    with sparsekern.backend("native"):
        sparsekern.batch_topk(x, 16)
        assert calls == [(64, 32), (1, 1024)]  # rows, then the list of candidates
        calls.clear()
        x[7] += 100
        sparsekern.batch_topk(x, 16)
        assert calls == [(64, 32), (1, 1024), (1, 500), (1, 1024)]


def test_float64(target):
    x = testing.fill_rows("few values", 6, 40).double().to(target.device)
    if target.float64:
        compare("float64", x, 2.5)
        fine = 1 + torch.rand(6, 40, dtype=torch.float64) * 1e-12  # float32 would see only ties
        compare("float64", fine.to(target.device), 2.5)
    else:
        with pytest.raises(sparsekern.BackendUnavailableError, match="float64"):
            sparsekern.batch_topk(x, 1)


@hypothesis.settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_any_matrix(data):
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan])
    elements = st.one_of(few, st.floats(width=32)) if data.draw(st.booleans()) else few
    rows = data.draw(
        hypothesis.extra.numpy.arrays(
            np.float32, st.tuples(st.integers(1, 12), st.integers(1, 80)), elements=elements
        )
    )
    x = torch.from_numpy(rows)
    total = data.draw(st.integers(1, x.numel()))
    k = min(total / len(x), x.shape[1])
    if int(k * len(x)) >= 1:
        compare("hypothesis", x, k, relu=data.draw(st.booleans()))


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_equal_the_dense_expression(target, counted, dtype, relu):
    for fill in ("normal", "negative", "98 % zeros", "few values"):
        x = testing.fill_rows(fill, 4, 33).to(dtype).to(target.device)
        upstream = torch.randn(33, 4, device=target.device).to(dtype).t()
        ours, dense = x.clone().requires_grad_(), x.clone().requires_grad_()
        sparsekern.batch_topk(ours, 5, relu=relu).backward(upstream)
        positions = batch_topk_reference(x, 20, False)[2]
        keep = torch.zeros_like(x).flatten().index_fill(0, positions, 1).view_as(x)
        kept = dense * keep
        (kept.relu() if relu else kept).backward(upstream)
        testing.assert_same(fill, ours.grad, dense.grad)
        counted()


def test_second_derivative(target):
    x = torch.randn(3, 9, device=target.device, requires_grad=True)
    masked, values, _ = batch_mask(x, 3, relu=True)
    (grad,) = torch.autograd.grad(masked.pow(3).sum() + values.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, 6 * masked + 2 * (masked > 0))


def test_numerical_gradients(target):
    target.require_float64()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda x: sparsekern.batch_topk(x, 3),
        lambda x: sparsekern.batch_topk(x, 2.5, relu=True),
        lambda x: batch_mask(x, 2, relu=True)[:2],
    ):
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


# -- torch's own machinery -------------------------------------------------------------------------


def test_operator_registration(target):
    x = torch.randn(3, 9, device=target.device, requires_grad=True)
    strided = torch.randn(9, 4, device=target.device).t()
    for args in ((x, 6, True), (strided, 5, False), (x.view(1, 3, 9), 27, False)):
        torch.library.opcheck(torch.ops.sparsekern.batch_topk.default, args)
    if target.backend != "reference":
        with pytest.raises(ValueError, match=r"batch_topk: total must lie in 1\.\.27 .*got 28"):
            torch.ops.sparsekern.batch_topk(x, 28, False)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("k", [2, 2.5])
def test_compiled_equals_eager(target, dynamic, k):
    torch.compiler.reset()

    def step(x):
        return sparsekern.batch_topk(x * 2, k, relu=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, n in ((4, 11), (5, 13)):
        x = torch.randn(rows, n, device=target.device, requires_grad=True)
        testing.assert_same("compiled", compiled(x), step(x))
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        testing.assert_same("gradient", grad, 2 * (step(x) != 0).float())


def test_vmap(target):
    x = torch.randn(4, 3, 9, device=target.device)
    mapped = torch.vmap(lambda batch: sparsekern.batch_topk(batch, 2), in_dims=1)(x)
    for at in range(3):
        testing.assert_same("entry", mapped[at], sparsekern.batch_topk(x[:, at], 2))
    batch = x[0].requires_grad_()
    y = sparsekern.batch_topk(batch, 2)
    upstream = torch.randn(5, 3, 9, device=target.device)
    (grads,) = torch.autograd.grad(y, batch, upstream, is_grads_batched=True)
    testing.assert_same("batched gradient", grads, upstream * (y != 0))


# -- bad input -------------------------------------------------------------------------------------

X = torch.randn(2, 8)


@pytest.mark.parametrize(
    ("x", "k", "error", "message"),
    [
        (X, 0, ValueError, r"k must lie in 1\.\.8 .*got 0"),
        (X, -1, ValueError, r"k must lie in 1\.\.8 .*got -1"),
        (X, 9, ValueError, r"k must lie in 1\.\.8 .*got 9"),
        (X, 0.0, ValueError, r"k must be above 0 and at most 8 .*got 0.0"),
        (X, -0.5, ValueError, r"k must be above 0 and at most 8 .*got -0.5"),
        (X, 8.1, ValueError, r"k must be above 0 and at most 8 .*got 8.1"),
        (X, math.nan, ValueError, r"k must be above 0 and at most 8 .*got nan"),
        (X, math.inf, ValueError, r"k must be above 0 and at most 8 .*got inf"),
        (X, 0.49, ValueError, r"k must keep at least one element of 2 rows, got 0.49"),
        (X, True, TypeError, r"k must be an integer, got True of type bool"),
        (X, "2", TypeError, r"k must be an integer, got '2' of type str"),
        (X, None, TypeError, r"k must be an integer, got None"),
        (X, torch.tensor(2.0), TypeError, r"k must be an integer"),
        (torch.tensor(1.0), 1, ValueError, r"x must have at least one dimension"),
        (X.long(), 1, TypeError, r"x must be float32.*got torch.int64"),
        ([1.0, 2.0], 1, TypeError, r"x must be a tensor, got list"),
        (torch.empty(3, 0), 1, ValueError, r"no k is possible, since the size of the last"),
        (X.to_sparse(), 1, TypeError, r"x must be a dense tensor, got one of torch.sparse_coo"),
    ],
)
def test_bad_input(x, k, error, message):
    with pytest.raises(error, match=f"^batch_topk: {message}"):
        public(x, k)


def test_forward_mode_is_refused():
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: sparsekern.batch_topk(x, 2), (X,), (torch.ones_like(X),))
