"""What exceeds the threshold of its channel, dense and as codes, on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import FLOATS
from test_channel_threshold import FILLS, LAYOUTS, SHAPES, lay_out, numbers

import sparsekern
from sparsekern import testing
from sparsekern.dispatch import operations
from sparsekern.ops.threshold_relu import native
from sparsekern.ops.threshold_relu.reference import (
    threshold_codes_reference,
    threshold_relu_reference,
)

# Slow targets (a host thread per CUDA thread, an interpreter) take part of the sweep, dealt evenly.
THINNING = {"cuda-emulation": 3, "triton-interpreter": 11}
# Numbers for which z = x * scale + shift is exact, with one rounding or two.
STEPS = torch.tensor([-2.0, -1.0, 0.5, 1.0, 2.0])


def constants(channels, normalized, device="cpu"):
    """threshold, scale, shift [C]: some infinite, some NaN, some equal to elements."""
    generator = torch.Generator().manual_seed(channels)
    threshold = torch.randint(-3, 4, (channels,), generator=generator) / 2
    odd = torch.rand(channels, generator=generator)
    threshold[odd < 0.1], threshold[odd > 0.9] = torch.inf, -torch.inf
    threshold[(odd - 0.5).abs() < 0.05] = torch.nan
    if not normalized:
        return threshold.to(device), None, None
    scale = STEPS[torch.randint(0, 5, (channels,), generator=generator)]
    shift = torch.randint(-4, 5, (channels,), generator=generator) / 4
    return threshold.to(device), scale.to(device), shift.to(device)


def coarse(x):
    """Multiples of 1/8, so that ties with a threshold occur."""
    return (x * 8).round() / 8


def spread(tensor, x, dim):
    return tensor.view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))


def expected(x, threshold, scale, shift, dim, cut=False):
    """The definition, element by element; `cut`: to bfloat16 by leaving out the lower bits."""
    z = x.cpu().float()
    if scale is not None:
        z = z * spread(scale.cpu().float(), x, dim) + spread(shift.cpu().float(), x, dim)
    t = spread(threshold.cpu().float(), x, dim)
    active = ~(z <= t)
    counts = active.movedim(dim, 0).reshape(x.shape[dim], -1).sum(1)
    excess = torch.where(active, z - t, 0.0)
    if cut:
        excess = (excess.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return excess.to(x.dtype), active, counts


def has_codes(target):
    return not operations.operations["threshold_codes"].missing(target.backend, target.device)


def check(name, target, x, normalized, dim):
    before = x.clone()
    threshold, scale, shift = constants(x.shape[dim], normalized, x.device)
    options = {"scale": scale, "shift": shift, "channel_dim": dim}
    # Triton's interpreter cuts where its compiler rounds.
    cut = target.name == "triton-interpreter" and x.dtype == torch.bfloat16
    dense, active, counts = expected(x, threshold, scale, shift, dim, cut)
    y, found = sparsekern.threshold_relu(x, threshold, **options)
    testing.assert_same(f"{name}: y", y, dense)
    testing.assert_same(f"{name}: counts", found, counts)
    assert y.stride() == x.stride() or not (x.is_contiguous() or x.movedim(dim, -1).is_contiguous())
    if has_codes(target):
        codes = sparsekern.threshold_codes(x, threshold, **options)
        testing.assert_same(f"{name}: indices", codes.indices, active.flatten().nonzero().flatten())
        testing.assert_same(f"{name}: values", codes.values, dense[active])
        testing.assert_same(f"{name}: counts of codes", codes.counts, counts)
    testing.assert_same("the input", x, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_the_definition(target, counted, dtype):
    cases = list(itertools.product(FILLS, SHAPES, (False, True)))
    for fill, (shape, dim), normalized in cases[
        FLOATS.index(dtype) :: THINNING.get(target.name, 1)
    ]:
        x = coarse(numbers(fill, shape)).to(dtype).to(target.device)
        check(f"{fill}, {shape}", target, x, normalized, dim)
        counted()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(target, counted, layout):
    for shape, dim in (((3, 5, 7, 6), 1), ((4, 6, 50), 1), ((2, 3, 2, 3, 4), 1), ((40, 9), 1)):
        for dtype in FLOATS if target.thorough else FLOATS[1:]:
            x = lay_out(coarse(numbers("normal", shape)).to(dtype).to(target.device), layout)
            check(f"{layout}, {shape}", target, x, dtype != FLOATS[1], dim)
            counted()


@pytest.mark.parametrize("shape", [(3, 5, 4100), (1500, 40), (2, 4500), (3, 700, 9)], ids=str)
def test_several_blocks(target, counted, shape):
    for dtype in FLOATS[:2]:
        x = coarse(numbers("normal", shape)).to(dtype).to(target.device)
        check(f"{shape}", target, x, dtype == FLOATS[0], 1)
        counted()


def test_numbers_that_are_rounded(target):
    """Away from the threshold any way to compute z is within its rounding."""
    x = torch.randn(6, 5, 40, device=target.device)
    threshold, scale, shift = (torch.randn(5, device=target.device) for _ in range(3))
    exact = expected(x.double(), *(t.double() for t in (threshold, scale, shift)), 1)
    z = x.cpu().double() * spread(scale.cpu().double(), x, 1)
    margin = z + spread((shift - threshold).cpu().double(), x, 1)
    x[(margin.abs() < 1e-5).to(x.device)] = 0.37
    y, counts = sparsekern.threshold_relu(x, threshold, scale=scale, shift=shift)
    dense, _, found = expected(x, threshold, scale, shift, 1)
    testing.assert_same("counts", counts, found)
    torch.testing.assert_close(y.cpu(), dense, atol=4e-6, rtol=0)  # 4 roundings of numbers below 8
    assert exact[0].dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 3)])
def test_nothing(target, shape):
    x, threshold = (torch.empty(s, device=target.device) for s in (shape, shape[1:2]))
    y, counts = sparsekern.threshold_relu(x, threshold)
    assert y.shape == shape and counts.tolist() == [0] * shape[1]
    if has_codes(target):
        codes = sparsekern.threshold_codes(x, threshold)
        assert codes.values.shape == codes.indices.shape == (0,)
        assert codes.counts.tolist() == [0] * shape[1]


def test_more_codes_than_there_is_room_for(target):
    """The first call has room for one of 64 elements; the second one for all."""
    if not has_codes(target):
        with pytest.raises(sparsekern.BackendUnavailableError, match="no triton implementation"):
            sparsekern.threshold_codes(torch.ones(1, 1), torch.zeros(1))
        return
    for shape in ((2, 3, 900), (1800, 3), (1, 5400)):
        x = torch.rand(shape, device=target.device)
        threshold = torch.full(shape[1:2], 0.1, device=target.device)
        codes = sparsekern.threshold_codes(x, threshold)
        dense, active, counts = expected(x, threshold, None, None, 1)
        assert len(codes.values) > native.LEAST_CAPACITY
        testing.assert_same("indices", codes.indices, active.flatten().nonzero().flatten())
        testing.assert_same("values", codes.values, dense[active])
        testing.assert_same("counts", codes.counts, counts)


# -- gradients -------------------------------------------------------------------------------------


def dense_expression(x, threshold, scale, shift, dim):
    z = x if scale is None else x * spread(scale, x, dim) + spread(shift, x, dim)
    return (z - spread(threshold, x, dim)).relu()


@pytest.mark.parametrize("codes", [False, True], ids=["dense", "codes"])
@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalized"])
def test_gradients_equal_the_dense_expression(target, counted, normalized, codes):
    if codes and not has_codes(target):
        pytest.skip(f"{target.name} has no threshold_codes: run the test on a target with it")
    for shape, dim in (((4, 5, 6), 1), ((4, 6, 5), 2), ((7, 5), 1)):
        for dtype in FLOATS:
            x = torch.randn(shape).to(dtype).to(target.device)
            threshold = torch.rand(5, device=target.device)
            pair = [torch.randn(5, device=target.device) for _ in range(2 * normalized)]
            upstream = torch.randn(shape[::-1]).to(dtype).to(target.device)
            upstream = upstream.permute(*range(x.dim())[::-1])  # not contiguous
            ours = [t.clone().requires_grad_() for t in (x, *pair)]
            scale, shift = ours[1:] if normalized else (None, None)
            options = {"scale": scale, "shift": shift, "channel_dim": dim}
            if codes:
                values, indices, _ = sparsekern.threshold_codes(ours[0], threshold, **options)
                values.backward(upstream.flatten()[indices])
            else:
                sparsekern.threshold_relu(ours[0], threshold, **options)[0].backward(upstream)
            wide = [t.double().cpu().requires_grad_() for t in (x, *pair)]
            scale, shift = wide[1:] if normalized else (None, None)
            y = dense_expression(wide[0], threshold.double().cpu(), scale, shift, dim)
            y.backward(upstream.double().cpu())
            # One rounding of a product for x, sums of 42 terms in float32 for the others.
            for one, right in zip(ours, wide, strict=True):
                eps = torch.finfo(one.dtype).eps
                torch.testing.assert_close(
                    one.grad.cpu().double(), right.grad, rtol=2 * eps, atol=64 * 1.2e-7
                )
            counted()


def test_thresholds_are_constants(target):
    threshold = torch.zeros(3, device=target.device, requires_grad=True)
    x = torch.randn(4, 3, device=target.device, requires_grad=True)
    y, counts = sparsekern.threshold_relu(x, threshold)
    assert y.requires_grad and not counts.requires_grad
    y.sum().backward()
    assert threshold.grad is None
    testing.assert_same("gradient", x.grad, (x > 0).float())
    assert not sparsekern.threshold_relu(x.detach(), threshold)[0].requires_grad


def test_numerical_gradients(target):
    target.require_float64()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    threshold = torch.rand(4, dtype=torch.float64)
    scale, shift = (torch.randn(4, dtype=torch.float64) for _ in range(2))
    z = x * spread(scale, x, 1) + spread(shift, x, 1)
    for value, other in ((x, z), (z, x)):
        value[(other - spread(threshold, x, 1)).abs() < 1e-3] += 0.1  # away from the kink
    inputs = [t.requires_grad_() for t in (x, scale, shift)]

    def relu(x, scale, shift):
        return sparsekern.threshold_relu(x, threshold, scale=scale, shift=shift)[0]

    def codes(x, scale, shift):
        return sparsekern.threshold_codes(x, threshold, scale=scale, shift=shift).values

    for function in (relu, codes):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    plain = lambda x: sparsekern.threshold_relu(x, threshold)[0]  # noqa: E731
    assert torch.autograd.gradcheck(plain, inputs[:1])


# -- torch's own machinery -------------------------------------------------------------------------


@pytest.mark.slow
def test_operator_registration(target):
    ops = torch.ops.sparsekern
    x = torch.randn(3, 4, 5, 2, device=target.device)
    threshold, scale, shift = (torch.randn(4, device=target.device) for _ in range(3))
    last = x.contiguous(memory_format=torch.channels_last)
    for tensor in (x, last, x.movedim(0, 1).contiguous().movedim(0, 1), x.mT.contiguous().mT):
        for pair in ((None, None), (scale.requires_grad_(), shift.requires_grad_())):
            args = (tensor.requires_grad_(), threshold, *pair, 1)
            torch.library.opcheck(ops.threshold_relu.default, args)
            if has_codes(target):
                torch.library.opcheck(ops.threshold_codes.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(target, dynamic):
    torch.compiler.reset()
    threshold = torch.rand(3, device=target.device)

    def step(x):
        y, counts = sparsekern.threshold_relu(x * 2, threshold)
        return y * 3, counts

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (11, 13):
        x = torch.randn(n, 3, 4, device=target.device, requires_grad=True)
        for actual, right in zip(compiled(x), step(x), strict=True):
            testing.assert_same("compiled", actual, right)
        (grad,) = torch.autograd.grad(compiled(x)[0].sum(), x)
        testing.assert_same("gradient", grad, 6.0 * (step(x)[0] > 0))


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_codes_compiled_equal_eager(target):
    if not has_codes(target):
        pytest.skip(f"{target.name} has no threshold_codes: run the test on a target with it")
    torch.compiler.reset()
    threshold = torch.rand(3, device=target.device)

    def step(x):
        codes = sparsekern.threshold_codes(x * 2, threshold)
        return codes.values * 3, codes.indices, codes.counts

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(11, 3, 4, device=target.device)
    for actual, right in zip(compiled(x), step(x), strict=True):
        testing.assert_same("compiled", actual, right)


def test_vmap(target):
    x = torch.randn(4, 6, 3, 5, device=target.device)
    thresholds = torch.rand(4, 3, device=target.device)
    y, counts = torch.vmap(sparsekern.threshold_relu)(x, thresholds)
    shared, _ = torch.vmap(sparsekern.threshold_relu, in_dims=(0, None))(x, thresholds[2])
    for at, (row, threshold) in enumerate(zip(x, thresholds, strict=True)):
        one, found = sparsekern.threshold_relu(row, threshold)
        testing.assert_same("y", y[at], one)
        testing.assert_same("counts", counts[at], found)
        testing.assert_same("shared", shared[at], sparsekern.threshold_relu(row, thresholds[2])[0])


def test_float64(target):
    x = torch.randn(4, 3, 5, dtype=torch.float64, device=target.device)
    threshold = torch.rand(3, dtype=torch.float64, device=target.device)
    if not target.float64:
        with pytest.raises(sparsekern.BackendUnavailableError, match="float64"):
            sparsekern.threshold_relu(x, threshold)
        return
    y, _ = sparsekern.threshold_relu(x, threshold)
    testing.assert_same("y", y, (x - threshold.view(3, 1)).relu())


# -- the CPU kernels' own corners ------------------------------------------------------------------


@pytest.mark.slow
def test_thread_counts_and_instruction_sets(instruction_sets):
    shapes = [((7, 5, 900), 1), ((3000, 6), 1), ((1, 2, 40_001), 1), ((400, 33, 3), 1)]
    for name in instruction_sets:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with sparsekern.backend("native"):
                for (shape, dim), dtype in itertools.product(shapes, FLOATS):
                    x = coarse(numbers("nan", shape)).to(dtype)
                    threshold, scale, shift = constants(x.shape[dim], threads > 1)
                    args = (x, threshold, scale, shift, dim)
                    for op, reference in (
                        (torch.ops.sparsekern.threshold_relu, threshold_relu_reference),
                        (torch.ops.sparsekern.threshold_codes, threshold_codes_reference),
                    ):
                        for one, right in zip(op(*args), reference(*args), strict=True):
                            testing.assert_same(f"{name}, {threads} threads", one, right)


# -- bad input -------------------------------------------------------------------------------------

X, T = torch.randn(2, 3, 4), torch.zeros(3)


@pytest.mark.parametrize("function", [sparsekern.threshold_relu, sparsekern.threshold_codes])
@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X, T[:2]), {}, ValueError, r"threshold must have shape \[3\] .*channels of x.*got \[2\]"),
        ((X, torch.zeros(3, 1)), {}, ValueError, r"threshold must have shape \[3\]"),
        ((X, T.long()), {}, TypeError, "threshold must be float32.*got torch.int64"),
        ((X, 0.5), {}, TypeError, "threshold must be a tensor, got float"),
        ((X.long(), T), {}, TypeError, "x must be float32.*got torch.int64"),
        ((X, T), {"scale": T}, ValueError, "scale needs shift, got scale alone"),
        ((X, T), {"shift": T}, ValueError, "shift needs scale, got shift alone"),
        ((X, T), {"scale": T[:1], "shift": T}, ValueError, r"scale must have shape \[3\]"),
        ((X, T), {"channel_dim": 3}, ValueError, r"channel_dim must lie in -3..2 .*got 3"),
        ((X, T.to("meta")), {}, ValueError, "all tensors must be on one device, got x on cpu"),
    ],
)
def test_bad_input(function, args, options, error, message):
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        function(*args, **options)
