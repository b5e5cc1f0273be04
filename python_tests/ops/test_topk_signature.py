"""topk takes what torch.topk takes: any dimension, the smallest too, integers, tensors without
dimensions, and the inputs with which PyTorch tests its own."""

from __future__ import annotations

import functools
import inspect
import io
import itertools

import pytest
import torch
from conftest import FLOATS

import sparsekern
from sparsekern import testing
from sparsekern.ops.topk.reference import topk_reference

pytest.importorskip("expecttest", reason="PyTorch's sample inputs: pip install expecttest")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
THINNING = {"cuda-emulation": 7, "triton-interpreter": 9}


def of_definition(x, k, dim, largest, sorted=True):
    """The stable sort that the docstring gives; NaN is the largest, -0 equals +0 there, too."""
    order = x.sort(dim=dim, descending=largest, stable=True).indices.narrow(dim, 0, k)
    if not sorted:
        order = order.sort(dim=dim).values
    return x.gather(dim, order), order


def assert_codes(what, codes, wanted):
    for name, actual, right in zip(("values", "indices"), codes, wanted, strict=True):
        testing.assert_same(f"{what}: {name}", actual, right)
        assert actual.is_contiguous()


@functools.cache
def torchs_own():
    """What PyTorch tests its topk with; the import takes seconds, which other tests do without."""
    from torch.testing._internal.common_methods_invocations import op_db

    return next(operator for operator in op_db if operator.name == "topk")


def samples(device, dtype, **options):
    return torchs_own().reference_inputs(device, dtype, **options)


# -- PyTorch's own sample inputs -------------------------------------------------------------------


@pytest.mark.slow_on("triton-interpreter", *FLOATS[1:], *INTEGERS)
@pytest.mark.parametrize("dtype", (*FLOATS, torch.float64, *INTEGERS), ids=str)
def test_sample_inputs_of_torch(target, counted, dtype):
    if dtype in (torch.float64, torch.int32):
        target.require_float64()
    assert dtype in torchs_own().dtypes
    for sample in samples(target.device, dtype):
        codes = sparsekern.topk(sample.input, *sample.args, **sample.kwargs)
        wanted = torch.topk(sample.input, *sample.args, **sample.kwargs)
        testing.assert_same("values", codes.values, wanted.values)
        assert codes.indices.shape == wanted.indices.shape
        assert codes.indices.dtype == wanted.indices.dtype == torch.int64
        if sample.input.dim():
            dim = sample.args[1] if len(sample.args) > 1 else -1
            assert_codes("sample", codes, of_definition(sample.input, sample.args[0], dim, True))
            picked = sample.input.gather(dim, codes.indices)
            testing.assert_same("picked", picked, codes.values)
        counted()


@pytest.mark.slow
def test_derivatives_of_sample_inputs(target):
    target.require_float64()
    for sample in samples(target.device, torch.float64, requires_grad=True):
        for largest in (True, False):
            options = {"k": sample.args[0], "dim": (*sample.args, -1)[1], "largest": largest}

            def values(x, options=options):
                return sparsekern.topk(x, **options).values

            assert torch.autograd.gradcheck(values, (sample.input,))
            assert torch.autograd.gradgradcheck(values, (sample.input,))


def test_the_arguments_are_those_of_torch():
    names = list(inspect.signature(sparsekern.topk).parameters)
    assert names[1:5] == ["k", "dim", "largest", "sorted"]
    x = torch.randn(4, 6)
    for args in itertools.product((1, 3), (0, -1), (True, False), (True,)):
        wanted = torch.topk(x, *args)
        assert_codes(str(args), sparsekern.topk(x, *args), wanted)
        named = dict(zip(names[1:5], args, strict=True))
        assert_codes(str(named), sparsekern.topk(x, **named), wanted)
        k, *rest = args
        assert_codes("k a tensor", sparsekern.topk(x, torch.tensor(k), *rest), wanted)


# -- the smallest ----------------------------------------------------------------------------------


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_smallest_equal_the_reference(target, counted, dtype):
    thorough = target.thorough or target.device == "cuda"
    widths = testing.WIDTHS if thorough else (1, 7, 33, 257, 1025)
    step = THINNING.get(target.name, 1)
    for number, case in enumerate(list(testing.topk_cases(widths))[FLOATS.index(dtype) :: step]):
        x = case.make(dtype, target.device)
        before = x.clone()
        sort, relu, magnitude = number % 2 == 0, number % 3 == 0, number % 5 == 0
        codes = sparsekern.topk(x, case.k, -1, False, sort, relu=relu, abs=magnitude)
        expected = topk_reference(x.cpu(), case.k, sort, relu, magnitude, False, True)
        assert_codes(case.name, [t.cpu() for t in codes], expected[:2])
        testing.assert_same("the input", x, before)
        counted()


def test_the_smallest_of_float64(target, counted):
    target.require_float64()
    for case in testing.topk_cases((7, 257, 1025)):
        x = case.make(torch.float64)
        wanted = of_definition(x, case.k, -1, False)
        assert_codes(case.name, sparsekern.topk(x, case.k, largest=False), wanted)
        counted()


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("dtype", (*FLOATS, torch.float64), ids=str)
@pytest.mark.parametrize("magnitude", [False, True])
def test_every_class_of_numbers_in_its_place(target, dtype, magnitude):
    """Neighbours at both ends of the numbers, where one takes another's place."""
    if dtype == torch.float64:
        target.require_float64()
    limits = torch.finfo(dtype)
    least = limits.smallest_normal * limits.eps  # the smallest number above zero
    numbers = [torch.inf, limits.max, 1.0, limits.tiny, least, 0.0]
    ends = torch.tensor([*numbers, *(-x for x in numbers), torch.nan, -torch.nan]).to(dtype)
    ends = torch.cat((ends, torch.nextafter(torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype))
                      if dtype in (torch.float32, torch.float64) else ends[:2]))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for n in (ends.numel(), 700, 5000) if target.thorough else (ends.numel(), 200):
        row = ends[torch.randint(ends.numel(), (n,), generator=generator)].to(target.device)
        for x in (row, row[~row.isnan()], row.nan_to_num(1.0, 2.0, 3.0)):
            for k in {1, 5, x.numel() // 2, x.numel()}:
                codes = sparsekern.topk(x, k, largest=False, abs=magnitude)
                order = of_definition(x.abs() if magnitude else x, k, -1, False)[1]
                assert_codes(f"n={n}, k={k}", codes, (x[order], order))


def test_the_smallest_with_any_threads_and_instruction_set(instruction_sets):
    x = testing.fill_rows("nan", 5, 70_000)
    inputs = [x, x[:1], x[:, :700].contiguous(), testing.fill_rows("few values", 300, 40)]
    for _ in instruction_sets:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for x in inputs:
                with sparsekern.backend("native"):
                    codes = sparsekern.topk(x, 30, largest=False)
                assert_codes("threads", codes, of_definition(x, 30, -1, False))


def test_counts_and_relu_of_the_smallest(target):
    """The operation counts what fired, as it does for the largest."""
    x = testing.fill_rows("few values", 6, 50).to(target.device)
    arguments = (x, 30, True, True, False, True, True)
    found = torch.ops.sparsekern.topk(*arguments)
    for actual, right in zip(found, topk_reference(*arguments), strict=True):
        testing.assert_same("counted", actual, right)
    assert 0 < int(found[2].sum()) < 6 * 30


# -- dimensions ------------------------------------------------------------------------------------


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("largest", [True, False])
def test_any_dimension(target, largest):
    x = torch.randn(3, 4, 5, 6, device=target.device)
    for layout in (x, x.transpose(0, 2), x[:, ::2], x[:1].expand(3, 4, 5, 6)):
        for dim in range(-4, 4) if target.thorough else (-4, -2, 1, 3):
            k = min(3, layout.shape[dim])
            for sort in (True, False):
                wanted = of_definition(layout, k, dim, largest, sort)
                codes = sparsekern.topk(layout, k, dim, largest, sort)
                assert_codes(f"dim={dim}", codes, wanted)


def test_gradients_along_any_dimension(target):
    for dim, largest in itertools.product((0, 1, -1), (True, False)):
        x = torch.randn(4, 5, 6, device=target.device, requires_grad=True)
        values, indices = sparsekern.topk(x, 2, dim, largest)
        upstream = torch.randn(values.shape, device=target.device)
        (grad,) = torch.autograd.grad(values, x, upstream)
        testing.assert_same("grad", grad, torch.zeros_like(x).scatter(dim, indices, upstream))
        assert not indices.requires_grad


def test_no_dimensions_and_none_kept(target):
    number = torch.tensor(-2.5, device=target.device, requires_grad=True)
    for k, dim, largest in itertools.product((0, 1), (0, -1), (True, False)):
        codes, wanted = (f(number, k, dim, largest) for f in (sparsekern.topk, torch.topk))
        assert_codes("0-d", codes, wanted)
        assert torch.autograd.grad(codes.values, number)[0] == 1
    assert sparsekern.topk(number.detach(), 1, relu=True).values == 0
    whole = torch.tensor(7, device=target.device)
    assert_codes("0-d", sparsekern.topk(whole, 1), torch.topk(whole, 1))
    for shape, dim in (((3, 4), 0), ((3, 4), 1), ((3, 0), 1), ((0, 3), 1), ((0,), 0)):
        x = torch.randn(shape, device=target.device, requires_grad=True)
        codes = sparsekern.topk(x, 0, dim)
        assert_codes(str(shape), codes, torch.topk(x, 0, dim))
        (grad,) = torch.autograd.grad(codes.values.sum(), x)
        testing.assert_same("grad", grad, torch.zeros_like(x))
    empty = torch.empty(0, 3, device=target.device)
    assert_codes("no rows", sparsekern.topk(empty, 2, largest=False), torch.topk(empty, 2))


# -- integers --------------------------------------------------------------------------------------


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers(target, dtype):
    if dtype == torch.int32:
        target.require_float64()
    limits = torch.iinfo(dtype)
    ends = [limits.min, limits.min + 1, limits.max - 1, limits.max, 0, 1, 2, limits.max // 3]
    drawn = torch.tensor(ends, dtype=dtype)[torch.randint(8, (4, 90))].to(target.device)
    sorts = (True, False) if target.thorough else (True,)
    for x, k, largest, sort in itertools.product((drawn, drawn.t()), (1, 3), (True, False), sorts):
        for dim in (0, 1):
            codes = sparsekern.topk(x, k, dim, largest, sort)
            assert_codes("integers", codes, of_definition(x, k, dim, largest, sort))
    codes = sparsekern.topk(drawn, 5, relu=True, largest=False)
    wanted = of_definition(drawn, 5, -1, False)
    assert_codes("relu", codes, (wanted[0].clamp(min=0), wanted[1]))


@pytest.mark.parametrize("dtype", INTEGERS[1:], ids=str)
def test_integers_by_magnitude(target, dtype):
    """That of the smallest number is greater than any number of its type."""
    if dtype == torch.int32:
        target.require_float64()
    limits = torch.iinfo(dtype)
    x = torch.tensor([1, limits.max, limits.min, -3, 2, limits.min], dtype=dtype).to(target.device)
    assert sparsekern.topk(x, 4, abs=True).indices.tolist() == [2, 5, 1, 3]
    assert sparsekern.topk(x, 3, largest=False, abs=True).values.tolist() == [1, 2, -3]


# -- torch's own machinery -------------------------------------------------------------------------


def test_registration_with_smallest(target):
    x = torch.randn(3, 9, device=target.device, requires_grad=True)
    for arguments in ((x, 2, True, True, False, True, True), (x, 2, False, False, True, False)):
        torch.library.opcheck(torch.ops.sparsekern.topk.default, arguments)


def test_programs_from_before_there_was_smallest():
    """An exported program of those days names six arguments."""

    class Old(torch.nn.Module):
        def forward(self, x):
            return torch.ops.sparsekern.topk(x, 2, True, False, False, False)[0]

    x, file = torch.randn(3, 9), io.BytesIO()
    program = torch.export.export(Old(), (x,))
    (call,) = (node for node in program.graph.nodes if "sparsekern.topk" in str(node.target))
    assert len(call.args) == 6
    torch.export.save(program, file)
    file.seek(0)
    testing.assert_same("values", torch.export.load(file).module()(x), x.topk(2).values)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(target, dynamic):
    torch.compiler.reset()

    def step(x):
        smallest = sparsekern.topk(x * 2, 3, 0, False)
        whole = sparsekern.topk((x * 4).to(torch.int16), 2, largest=False)
        return (*smallest, *sparsekern.topk(x, 2, dim=1), *whole)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (11, 13):
        x = torch.randn(4, n, device=target.device, requires_grad=True)
        found, wanted = compiled(x), step(x)
        for actual, right in zip(found, wanted, strict=True):
            testing.assert_same("compiled", actual, right)
        grads = [torch.autograd.grad(out[0].sum(), x)[0] for out in (found, wanted)]
        testing.assert_same("gradient", *grads)


def test_exported():
    class Smallest(torch.nn.Module):
        def forward(self, x):
            return sparsekern.topk(x, 2, 0, False)

    x = torch.randn(5, 7)
    sizes = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Smallest(), (x,), dynamic_shapes=sizes).module()
    for other in (x, torch.randn(9, 4)):
        assert_codes("exported", program(other), torch.topk(other, 2, 0, False))


def test_transforms(target):
    x = torch.randn(4, 5, 6, device=target.device)
    for in_dim, dim in itertools.product((0, 2), (0, 1)):
        mapped = torch.vmap(lambda t, d=dim: sparsekern.topk(t, 2, d, False), in_dim)(x)
        wanted = [of_definition(t, 2, dim, False) for t in x.unbind(in_dim)]
        for actual, right in zip(mapped, map(torch.stack, zip(*wanted, strict=True)), strict=True):
            testing.assert_same("vmap", actual, right)

        def total(t, d=dim):
            return (sparsekern.topk(t, 2, d, False).values ** 2).sum()

        grads = torch.vmap(torch.func.grad(total), in_dim)(x)
        picked = torch.stack([2 * t * (t <= of_definition(t, 2, dim, False)[0].amax(dim, True))
                              for t in x.unbind(in_dim)])  # fmt: skip
        testing.assert_same("per entry", grads, picked)
    whole = (x * 10).long()
    counts = torch.vmap(lambda t: sparsekern.topk(t, 1, 0).values)(whole)
    testing.assert_same("integers", counts, whole.amax(1, keepdim=True))
    jacobian = torch.func.jacrev(lambda t: sparsekern.topk(t, 2, 0, False).values)(x[0, :, 0])
    assert jacobian.sum().item() == 2


def test_autocast_and_meta(target):
    x = torch.randn(4, 5, device=target.device)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        codes = sparsekern.topk(x, 2, 0, False)
    assert_codes("autocast", codes, of_definition(x, 2, 0, False))
    for dtype in (torch.float32, torch.int8, torch.int64):
        shapes = sparsekern.topk(torch.empty(4, 5, dtype=dtype, device="meta"), 2, 0, False)
        assert shapes.values.is_meta and shapes.values.dtype == dtype
        assert shapes.values.shape == shapes.indices.shape == (2, 5)


# -- bad input -------------------------------------------------------------------------------------

X = torch.randn(2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sparsekern.topk(X, 1, 2), IndexError, r"dim must lie in -2..1 \(x is 2-d"),
        (lambda: sparsekern.topk(X, 1, -3), IndexError, r"dim must lie in -2..1 .*got -3"),
        (lambda: sparsekern.topk(X[0, 0], 1, 1), IndexError, r"dim must lie in -1..0 \(x is 0"),
        (lambda: sparsekern.topk(X, 1, True), TypeError, "dim must be an integer, got True"),
        (lambda: sparsekern.topk(X, 1, None), TypeError, "dim must be an integer, got None"),
        (lambda: sparsekern.topk(X, 3, 0), ValueError, r"k must lie in 0..2 \(the size of dimen"),
        (lambda: sparsekern.topk(X[0, 0], 2), ValueError, r"k must lie in 0..1 \(the el"),
        (lambda: sparsekern.topk(X[:, :0], 1), ValueError, r"k must lie in 0..0 .*got 1"),
        (lambda: sparsekern.topk(X > 0, 1), TypeError, "x must be float32, .*got torch.bool"),
        (
            lambda: sparsekern.topk(X.to(torch.uint16), 1),
            TypeError, "x must be float32, .*got torch.uint16",
        ),
        (
            lambda: sparsekern.topk(X, 1, out=(X, X.long())),
            TypeError, "out must be None, since the results are new tensors, got tuple",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=f"^topk: {message}") as raised:
        call()
    assert "\n" not in str(raised.value)


def test_out_may_be_none():
    assert_codes("out", sparsekern.topk(X, 2, out=None), X.topk(2))
