"""linear_topk of a few float32 rows on a CPU: its kernel, and the quick path to it.

The definition is here the selection from the scores that `gather_dot` computes one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import TARGETS, activated

import sparsekern
from sparsekern import testing
from sparsekern.ops.linear_topk import native, operation, slices

F = torch.nn.functional
ON_CPU = next(t for t in TARGETS if t.name == "native-cpu")
SIZES = [
    (1, 1, 1, 1), (1, 17, 40, 1), (2, 64, 33, 33), (3, 5, 100, 9), (5, 33, 18, 18),
    (4, 100, 700, 32), (7, 31, 257, 64), (8, 48, 512, 20), (32, 16, 65, 3),
]  # fmt: skip


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The native backend is active during the test; returns the rows of each call of the kernel."""
    rows = []
    original = native.few_rows

    def few_rows(kernel, x, *arguments):
        rows.append(x.numel() // x.shape[-1])
        return original(kernel, x, *arguments)

    monkeypatch.setattr(native, "few_rows", few_rows)
    for _ in activated(ON_CPU):
        yield rows


def expected(x, weight, bias, k, *, scale=None, relu=True, sorted=False):
    scores = sparsekern.gather_dot(x, weight, torch.arange(len(weight)).repeat(len(x), 1))
    scores = scores if bias is None else scores + bias
    scores = scores if scale is None else scores * scale
    return sparsekern.topk(scores, k, relu=relu, sorted=sorted)


def check(x, weight, bias, k, *, scale=None, **options):
    codes = sparsekern.linear_topk(x, weight, bias, k, scale=scale, **options)
    wanted = expected(x, weight, bias, k, scale=scale, **options)
    testing.assert_same("values", codes.values, wanted.values)
    testing.assert_same("indices", codes.indices, wanted.indices)
    return codes


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_codes_are_those_of_all_scores(calls, instruction_sets, size):
    rows, d, n, k = size
    x, weight, bias, scale = torch.randn(rows, d), torch.randn(n, d), torch.randn(n), torch.rand(n)
    vectors = ((None, None), (bias, None), (None, scale), (bias, scale))
    for _ in instruction_sets:
        calls.clear()
        for relu, sorted_ in itertools.product((False, True), repeat=2):
            for given, factors in vectors:
                check(x, weight, given, k, scale=factors, relu=relu, sorted=sorted_)
        assert calls == [rows] * 16


@pytest.mark.parametrize("rows", [1, 6])
def test_values_are_as_near_as_the_dense_layers(rows):
    x, weight, bias = torch.randn(rows, 384), torch.randn(3072, 384), torch.randn(3072)
    values, indices = sparsekern.linear_topk(x, weight, bias, 32, relu=False)
    truth = F.linear(x.double(), weight.double(), bias.double())
    dense = F.linear(x, weight, bias)
    terms = F.linear(x.abs(), weight.abs(), bias.abs())
    testing.assert_error_rule(
        "values", values, *(t.gather(1, indices) for t in (truth, dense, terms))
    )
    assert (truth.gather(1, indices).amin(1) >= truth.topk(33).values[:, 32] - 1e-4).all()


def test_ties_and_what_is_not_a_number():
    x, weight = torch.randint(-2, 3, (9, 21)).float(), torch.randint(-2, 3, (150, 21)).float()
    check(x, weight, None, 40)  # full of ties
    check(x * 0, weight * -1, torch.full((150,), -0.0), 40, relu=False)  # zeros of both signs
    for number in (torch.nan, torch.inf, -torch.inf, 3e38, 1e-42):
        odd_x, odd_weight, bias = x.clone(), weight.clone(), torch.zeros(150)
        odd_x[3, 20] = number
        check(odd_x, weight, None, 40, relu=False, sorted=True)
        odd_weight[::7, 2] = number
        check(odd_x, odd_weight, None, 40, sorted=True)
        bias[::5] = number
        check(x, odd_weight, bias, 150, relu=False)


def test_neither_threads_nor_other_rows_change_a_bit(calls, eager_teams, monkeypatch):
    monkeypatch.setattr(slices, "FEW_ROWS", 40)
    x, weight, bias = torch.randn(33, 50), torch.randn(203, 50), torch.randn(203)
    before = torch.get_num_threads()
    row_by_row = [sparsekern.linear_topk(row, weight, bias, 12) for row in x.unsqueeze(1)]
    values = torch.cat([codes.values for codes in row_by_row])
    indices = torch.cat([codes.indices for codes in row_by_row])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in range(1, 34) if threads == 1 else (1, 2, 33):
                codes = sparsekern.linear_topk(x[:rows], weight, bias, 12)
                assert torch.equal(codes.values, values[:rows])
                assert torch.equal(codes.indices, indices[:rows])
    finally:
        torch.set_num_threads(before)
    assert calls == [1] * 33 + [*range(1, 34), 1, 2, 33, 1, 2, 33]


def test_layouts(calls):
    """Rows with gaps between them, leading dimensions, vectors with a stride, and none at all."""
    x, weight, bias = torch.randn(6, 20), torch.randn(90, 20), torch.randn(180)[::2]
    wanted = check(x, weight, bias.contiguous(), 8)
    wide = torch.randn(90, 30)
    wide[:, 3:23] = weight
    gaps = torch.randn(6, 25)
    gaps[:, :20] = x
    columns = weight.t().contiguous().t()  # not served
    for x_, weight_ in ((x, weight), (gaps[:, :20], wide[:, 3:23]), (x, columns)):
        codes = sparsekern.linear_topk(x_, weight_, bias, 8)
        testing.assert_same("indices", codes.indices, wanted.indices)
    assert calls == [6] * 3
    for shape in ((2, 3), (6, 1), ()):
        rows = x.view(*shape, 20) if shape else x[0]
        codes = sparsekern.linear_topk(rows, weight, bias, 8)
        quick = sparsekern.linear_topk(rows, weight, bias.contiguous(), 8)
        for found in (codes, quick):
            count = 6 if shape else 1
            testing.assert_same("values", found.values.view(-1, 8), wanted.values[:count])
            assert found.indices.shape == (*shape, 8)
            assert found.values._base is None
    empty = sparsekern.linear_topk(x[:0].view(0, 2, 20), weight, bias.contiguous(), 8)
    assert empty.values.shape == empty.indices.shape == (0, 2, 8)
    assert empty.values._base is None


def test_what_the_kernel_serves(calls):
    """Up to a number of rows, also of large products, unless their rounded weight is kept."""
    weight = torch.randn(40_000, 32)
    x = torch.randn(33, 32)
    check(x[:32], weight, None, 16)  # more than SMALL_TERMS
    sparsekern.linear_topk(x, weight, None, 16)
    sparsekern.linear_topk(x[:2].double(), weight.double(), None, 16)
    sparsekern.linear_topk(x[:2], weight, None, 16, latents=torch.arange(50))
    sparsekern.linear_topk(x[:2], weight, None, 16, groups=2)
    assert calls == [32]
    with sparsekern.backend("reference"):
        sparsekern.linear_topk(x[:2], weight, None, 16)
    assert calls == [32]


def test_gradients_are_recorded(calls):
    x, weight, bias = torch.randn(3, 10), torch.randn(50, 10), torch.randn(50)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    values, indices = sparsekern.linear_topk(*tensors, 7)
    grads = torch.autograd.grad(values.square().sum(), tensors)
    dense = F.linear(*tensors).gather(1, indices).relu()
    wanted = torch.autograd.grad(dense.square().sum(), tensors)
    for name, found, right in zip(("x", "weight", "bias"), grads, wanted, strict=True):
        torch.testing.assert_close(found, right, msg=name)
    assert calls == [3]


class Tagged(torch.Tensor):
    pass


X, WEIGHT, BIAS = torch.randn(2, 4), torch.randn(9, 4), torch.randn(9)
NOT_QUICK = {
    "a list": ([[0.0]], WEIGHT, None, 2),
    "a subclass": (X.as_subclass(Tagged), WEIGHT, None, 2),
    "a subclass as bias": (X, WEIGHT, BIAS.as_subclass(Tagged), 2),
    "a bias that is no tensor": (X, WEIGHT, [0.0] * 9, 2),
    "a gradient of x": (X.clone().requires_grad_(), WEIGHT, BIAS, 2),
    "a gradient of the bias": (X, WEIGHT, BIAS.clone().requires_grad_(), 2),
    "other dtypes": (X.double(), WEIGHT.double(), None, 2),
    "mixed dtypes": (X, WEIGHT.double(), None, 2),
    "a bias of another dtype": (X, WEIGHT, BIAS.double(), 2),
    "a bias of another shape": (X, WEIGHT, BIAS[:8], 2),
    "a bias with a stride": (X, WEIGHT, torch.randn(18)[::2], 2),
    "a column-major weight": (X, WEIGHT.t().contiguous().t(), None, 2),
    "an x with a stride": (torch.randn(4, 2).t(), WEIGHT, None, 2),
    "another width": (X[:, :3].contiguous(), WEIGHT, None, 2),
    "a weight of one dimension": (X, WEIGHT[0], None, 1),
    "k = 0": (X, WEIGHT, None, 0),
    "k > n": (X, WEIGHT, None, 10),
    "k of another type": (X, WEIGHT, None, torch.tensor(2)),
    "a k that is no integer": (X, WEIGHT, None, True),
    "no rows": (X[:0], WEIGHT, None, 2),
    "many rows": (torch.randn(33, 4), WEIGHT, None, 2),
    "a scalar": (torch.tensor(1.0), WEIGHT, None, 2),
    "meta": (X.to("meta"), WEIGHT.to("meta"), None, 2),
    "meta weight": (X, WEIGHT.to("meta"), None, 2),
    "sparse": (X.to_sparse(), WEIGHT, None, 2),
    "negated": (torch.complex(X * 0, X).conj().imag, WEIGHT, None, 2),
}


def quick(x, weight, bias, k):
    return operation.quick_linear_topk(x, weight, bias, k, True, False)


@pytest.mark.parametrize("name", NOT_QUICK)
def test_the_quick_path_leaves_everything_else_alone(name):
    sparsekern.linear_topk(X, WEIGHT, None, 2)  # the backend is chosen now
    assert quick(X, WEIGHT, BIAS, 2) is not None
    assert quick(*NOT_QUICK[name]) is None


def test_the_quick_path_is_not_taken_where_torch_has_to_do_something(calls):
    sparsekern.linear_topk(X, WEIGHT, None, 2)
    parameter = torch.nn.Parameter(WEIGHT)
    assert quick(X, parameter, BIAS, 2) is None
    with torch.no_grad():
        assert quick(X, parameter, torch.nn.Parameter(BIAS), 2) is not None
    with torch.inference_mode():
        assert quick(X, parameter, None, 2) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quick(X, WEIGHT, None, 2) is None
        assert sparsekern.linear_topk(X, WEIGHT, None, 2).values.dtype == torch.bfloat16
    with sparsekern.backend("reference"):
        assert quick(X, WEIGHT, None, 2) is None
    with torch.autograd.forward_ad.dual_level():
        assert quick(X, WEIGHT, None, 2) is None
    torch.vmap(lambda weight: quick(X, weight, None, 2) or weight)(WEIGHT.unsqueeze(0))
    assert len(calls) == 3
