"""Thresholds of channels on every backend: exact, whatever the layout, the rank and the numbers."""

from __future__ import annotations

import pytest
import torch
from conftest import FLOATS

import sparsekern
from sparsekern import testing
from sparsekern.ops.channel_threshold.reference import channel_threshold_reference

# Slow targets (a host thread per CUDA thread, an interpreter) take part of the sweep, dealt evenly.
THINNING = {"cuda-emulation": 5, "triton-interpreter": 61}
FILLS = (*testing.FILLS, "most nan", "all nan")
# (shape, dimension of the channels): images, sequences, volumes, matrices, a vector; channels first
# and last; one channel, one element for each; short and long runs; more channels than a block owns.
SHAPES = [
    ((3, 5, 7, 6), 1),
    ((3, 7, 6, 5), -1),
    ((2, 3, 41), 1),
    ((2, 3, 4, 3, 5), 1),
    ((2, 4, 3, 5, 3), -1),
    ((33, 7), 1),
    ((7, 33), 0),
    ((9,), 0),
    ((4, 1, 5, 3), 1),
    ((31, 1), 1),
    ((1, 6, 1, 1), 1),
    ((5, 70), 1),
    ((2, 3, 300), 1),
    *(((5, 4, inner), 1) for inner in range(2, 16)),
]
LAYOUTS = ("contiguous", "channels last", "transposed", "expanded", "offset", "every second")


def numbers(fill, shape):
    """float32 of a named kind, in any shape."""
    count = max(1, torch.Size(shape).numel())
    normal = testing.fill_rows("normal", 1, count)
    if fill == "most nan":
        x = torch.where(torch.arange(count) % 11 < 10, torch.nan, normal)
    elif fill == "all nan":
        x = torch.full((1, count), torch.nan)
    else:
        x = testing.fill_rows(fill, 1, count)
    return x.view(-1)[: torch.Size(shape).numel()].view(shape)


def lay_out(x, layout):
    """The same numbers with other strides; those of the first entry everywhere where expanded."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "offset":
        wide = x.new_zeros(x.numel() + 3)
        wide[1:-2] = x.flatten()
        return wide[1:-2].view(x.shape)
    if layout == "every second":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def ranks_of(x, dim):
    count = x.numel() // x.shape[dim]
    return sorted({1, count, (count + 1) // 2, max(1, count - count // 20)})


def expected(x, rank, dim):
    """The definition itself: a sort of each channel, NaN last."""
    columns = x.movedim(dim, 0).reshape(x.shape[dim], -1).cpu().double()
    return columns.sort(dim=1).values[:, rank - 1].to(x.dtype)


def check(name, x, rank, dim):
    before = x.clone()
    found = torch.ops.sparsekern.channel_threshold(x, rank, dim % x.dim())
    testing.assert_same(f"{name}, rank {rank}", found, expected(x, rank, dim))
    assert not (found == 0).logical_and(found.signbit()).any(), f"{name}: a threshold is -0"
    testing.assert_same("the input", x, before)


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_thresholds_equal_a_sort(target, counted, dtype):
    cases = [
        (fill, shape, dim, rank)
        for fill in FILLS
        for shape, dim in SHAPES
        for rank in ranks_of(torch.empty(shape), dim)
    ]
    for fill, shape, dim, rank in cases[FLOATS.index(dtype) :: THINNING.get(target.name, 1)]:
        x = numbers(fill, shape).to(dtype).to(target.device)
        check(f"{fill}, {shape}", x, rank, dim)
        counted()


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(target, counted, layout):
    for shape, dim in (((3, 5, 7, 6), 1), ((4, 6, 50), 1), ((2, 3, 2, 3, 4), 1), ((40, 9), 1)):
        for dtype in FLOATS if target.thorough else FLOATS[:2]:
            x = lay_out(numbers("few values", shape).to(dtype).to(target.device), layout)
            for rank in ranks_of(x, dim)[1:3]:
                check(f"{layout}, {shape}", x, rank, dim)
                counted()


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("shape", [(9, 5, 4000), (20000, 3, 3), (33000, 6), (1, 140000)], ids=str)
def test_blocks_that_share_a_channel(target, counted, shape):
    """Enough elements for a GPU to use several blocks for a channel; few above it, and ties."""
    for fill, dtype in (("normal", FLOATS[0]), ("98 % zeros", FLOATS[0]), ("normal", FLOATS[1])):
        x = numbers(fill, shape).to(dtype).to(target.device)
        dim = 0 if shape[0] == 1 else 1
        count = x.numel() // x.shape[dim]
        for rank in (count - 3, count // 2) if fill == "normal" else (count // 2,):
            check(f"{fill}, {shape}", x, rank, dim)
            counted()


def test_float64(target, counted):
    x = numbers("normal", (4, 3, 20)).double().to(target.device)
    if not target.float64:
        with pytest.raises(sparsekern.BackendUnavailableError, match="float64"):
            sparsekern.channel_threshold(x, 0.5)
        return
    for fill in FILLS:
        x = numbers(fill, (4, 3, 20)).double() * (1 + 1e-15)
        for rank in ranks_of(x, 1):
            check(fill, x, rank, 1)
            counted()


# -- the rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "density", "rank"),
    [
        (100_000, 5.022621e-5, 99_994),  # where the published training of DigitCircle ends
        (100_000, 5e-5, 99_995),
        (100_000, 0.9, 9999),  # 9999.999999999998
        (1000, 0.1, 900),
        (10, 0.3, 7),
        (7, 0.5, 3),
        (7, 1e-9, 6),
        (7, 1.0, 1),
        (7, 0.95, 1),
        (1, 0.25, 1),
    ],
)
def test_the_rank_is_that_of_the_published_code(target, count, density, rank):
    """int() floors, and the smallest rank is 1."""
    x = torch.arange(float(count), device=target.device).view(1, 1, count)
    assert sparsekern.channel_threshold(x, density).tolist() == [rank - 1]
    assert rank == max(1, int(count * (1 - density)))


def test_how_many_exceed_it(target):
    x = torch.randn(8, 3, 25, device=target.device)
    for density in (0.5, 0.1, 0.01):
        threshold = sparsekern.channel_threshold(x, density)
        above = (x > threshold.view(1, 3, 1)).sum((0, 2))
        assert above.tolist() == [200 - max(1, int(200 * (1 - density)))] * 3


# -- torch's own machinery -------------------------------------------------------------------------


def test_thresholds_are_constants(target):
    x = torch.randn(4, 3, 5, device=target.device, requires_grad=True)
    threshold = sparsekern.channel_threshold(x, 0.2)
    assert not threshold.requires_grad and threshold.shape == (3,)
    (x - threshold.view(1, 3, 1)).relu().sum().backward()
    testing.assert_same("gradient", x.grad, (x > threshold.view(1, 3, 1)).float())


def test_operator_registration(target):
    op = torch.ops.sparsekern.channel_threshold.default
    x = torch.randn(3, 4, 5, 2, device=target.device)
    for tensor, dim in ((x, 1), (x.contiguous(memory_format=torch.channels_last), 1), (x, 3)):
        torch.library.opcheck(op, (tensor, 4, dim))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(target, dynamic):
    torch.compiler.reset()

    def step(x):
        return sparsekern.channel_threshold(x * 2, 0.3) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (11, 13):
        x = torch.randn(n, 3, 4, device=target.device)
        testing.assert_same("compiled", compiled(x), step(x))


def test_vmap(target):
    x = torch.randn(4, 6, 3, 5, device=target.device)
    for dim in (0, 1):
        mapped = torch.vmap(lambda x: sparsekern.channel_threshold(x, 0.2), in_dims=dim)(x)
        rows = torch.stack([sparsekern.channel_threshold(row, 0.2) for row in x.unbind(dim)])
        testing.assert_same("vmap", mapped, rows)


# -- the CPU kernels' own corners ------------------------------------------------------------------


@pytest.mark.slow
def test_thread_counts_and_instruction_sets(instruction_sets):
    shapes = [((7, 5, 900), 1), ((3000, 6), 1), ((1, 2, 40_001), 1), ((400, 33, 3), 1)]
    for name in instruction_sets:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with sparsekern.backend("native"):
                for shape, dim in shapes:
                    for dtype in FLOATS:
                        x = numbers("nan", shape).to(dtype)
                        for rank in ranks_of(x, dim):
                            check(f"{name}, {threads} threads, {shape}", x, rank, dim)


# -- bad input -------------------------------------------------------------------------------------

X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X, {"density": 0}, ValueError, "density must be above 0 and at most 1, got 0"),
        (X, {"density": 1.5}, ValueError, "density must be above 0 and at most 1, got 1.5"),
        (X, {"density": torch.nan}, ValueError, "density must be above 0 and at most 1, got nan"),
        (X, {"density": "1"}, TypeError, "density must be a number, got '1' of type str"),
        (X, {"density": True}, TypeError, "density must be a number, got True of type bool"),
        (X, {"channel_dim": 3}, ValueError, r"channel_dim must lie in -3..2 .*3 dimensions.*got 3"),
        (X, {"channel_dim": -4}, ValueError, r"channel_dim must lie in -3..2 .*got -4"),
        (X.long(), {}, TypeError, "x must be float32.*got torch.int64"),
        (X[:0], {}, ValueError, r"x must have elements in each channel, got shape \[0, 3, 4\]"),
        (torch.tensor(1.0), {}, ValueError, "x must have at least one dimension"),
        ([1.0], {}, TypeError, "x must be a tensor, got list"),
    ],
)
def test_bad_input(x, options, error, message):
    with pytest.raises(error, match=f"^channel_threshold: {message}"):
        sparsekern.channel_threshold(x, **({"density": 0.5} | options))


@pytest.mark.parametrize("rank", [0, 9])
def test_the_operation_itself_refuses_other_ranks(target, rank):
    if target.backend == "reference":
        pytest.skip("torch.kthvalue has its own message: run the test on a target with kernels")
    with pytest.raises(ValueError, match=rf"rank must lie in 1..8 .*got {rank}"):
        torch.ops.sparsekern.channel_threshold(X.to(target.device), rank, 1)


def test_the_reference_is_the_definition():
    for fill in FILLS:
        for dtype in FLOATS:
            x = numbers(fill, (3, 4, 7)).to(dtype)
            for rank in range(1, 22):
                found = channel_threshold_reference(x, rank, 1)
                testing.assert_same(f"{fill}, rank {rank}", found, expected(x, rank, 1))
