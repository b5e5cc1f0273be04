"""Float32 layers encoded through a bfloat16 product: the codes of all float32 scores, bit for bit.

The definition is here the selection from the scores of every latent, computed one by one in the
backend's one order of additions: `gather_dot`'s, or that of the GPU kernels'."""

from __future__ import annotations

import copy
import threading

import hypothesis
import pytest
import torch
from conftest import TARGETS, activated
from hypothesis import strategies

import sparsekern
from sparsekern.dispatch.modules import native_module
from sparsekern.ops.linear_topk import candidates, native, rounded, screen, slices
from sparsekern.ops.linear_topk import kept as kept_copies

pytestmark = pytest.mark.skipif(
    native_module("cpu")[0] is None,
    reason="the compiled CPU module is not there: install a C++ compiler and install again",
)

SCREENING = [t for t in TARGETS if t.backend != "reference"]
ON_CPU = next(t for t in TARGETS if t.name == "native-cpu")


@pytest.fixture(params=SCREENING, ids=lambda target: target.name)
def target(request):
    """Backends that screen; the target is active, and screens, during the test."""
    with sparsekern.screening(True):
        yield from activated(request.param)


def kernels_of(target):
    if target.backend == "native":
        return native
    return pytest.importorskip("sparsekern.ops.linear_topk.triton")


@pytest.fixture(autouse=True)
def screened(monkeypatch):
    """Every call is screened, however small and on whatever CPU; returns its products' dtypes."""
    monkeypatch.setattr(slices, "SMALL_TERMS", 0)
    monkeypatch.setattr(screen, "pays", lambda *sizes: True)
    monkeypatch.setattr(screen, "is_quick_here", lambda: True)
    monkeypatch.delenv("SPARSEKERN_SCREENING", raising=False)
    monkeypatch.setattr(screen, "LEAST_WIDTH", 256)
    monkeypatch.setattr(screen, "SLICE_ELEMENTS", 1 << 14)
    products = []
    original = screen.find_candidates

    def find_candidates(product, k, latents):
        products.append(product.dtype)
        return original(product, k, latents)

    monkeypatch.setattr(screen, "find_candidates", find_candidates)
    return products


def all_scores(target, x, weight, bias=None, scale=None, pre_bias=None):
    rows = x if pre_bias is None else x - pre_bias
    every = torch.arange(len(weight), device=x.device).repeat(len(rows), 1)
    if target is not ON_CPU:
        layer = slices.Layer(weight, bias, scale, None, x.dtype)
        counts = torch.full((len(rows),), len(weight), dtype=torch.int32, device=x.device)
        return kernels_of(target).score_candidates(layer, rows, every.int(), counts)
    scores = sparsekern.gather_dot(rows, weight, every)
    scores = scores if bias is None else scores + bias
    return scores if scale is None else scores * scale


def check_equal(x, weight, k, *, groups=1, relu=False, sorted=True, target=ON_CPU, **vectors):
    x, weight = x.to(target.device), weight.to(target.device)
    vectors = {name: vector.to(target.device) for name, vector in vectors.items()}
    scores = all_scores(target, x, weight, **vectors).view(len(x), groups, -1)
    values, indices = sparsekern.topk(scores, k // groups)
    if not sorted:
        indices, order = indices.sort(-1)
        values = values.gather(-1, order)
    starts = torch.arange(groups, device=x.device).unsqueeze(1) * scores.shape[-1]
    indices = (indices + starts).view(len(x), k)
    values = (values.relu() if relu else values).view(len(x), k)
    bias = vectors.pop("bias", None)
    codes = sparsekern.linear_topk(
        x, weight, bias, k, groups=groups, relu=relu, sorted=sorted, **vectors
    )
    torch.testing.assert_close(codes.values, values, rtol=0, atol=0, equal_nan=True)
    # a NaN's payload does not order it, its place does
    assert torch.equal(codes.indices, indices)


def sized(target, rows, d, n, k):
    """Sizes of a case: a part of them where every program of a kernel takes milliseconds."""
    return (rows, d, n, k) if target.thorough else (max(1, rows // 8), d, n // 2, max(1, k // 4))


def layer(rows, d, n, columns=False):
    x, weight = torch.randn(rows, d), torch.randn(n, d)
    return x, weight.t().contiguous().t() if columns else weight


SIZES = [(1, 48, 900, 5), (9, 100, 2100, 32), (40, 17, 1024, 64)]


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_codes_are_those_of_all_scores(target, screened, size, columns):
    rows, d, n, k = sized(target, *size)
    x, weight = layer(rows, d, n, columns)
    all_vectors = {"bias": torch.randn(n), "scale": torch.rand(n) + 0.5, "pre_bias": torch.randn(d)}
    choices = [(), ("bias",), ("scale",)] if target.thorough else []
    for names in [*choices, all_vectors]:
        vectors = {name: all_vectors[name] for name in names}
        check_equal(x, weight, k, target=target, **vectors)
        check_equal(x, weight, k, relu=True, sorted=False, target=target, **vectors)
    assert torch.bfloat16 in screened


@pytest.mark.slow_on("triton-interpreter")
def test_groups_are_screened_one_by_one(target, screened):
    rows, d, n, k = sized(target, 16, 40, 4 * 700, 4 * 9)
    x, weight = layer(rows, d, n)
    check_equal(x, weight, k // 4 * 4, groups=4, bias=torch.randn(n), target=target)
    assert screened.count(torch.bfloat16) == 4


def test_a_batch_of_more_dimensions_and_gradients():
    x, weight = layer(12, 30, 1200)
    bias = torch.randn(1200)
    given = [x.view(3, 4, 30), weight, bias]
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    codes = sparsekern.linear_topk(*leaves, 8)
    gradient = torch.randn(3, 4, 8)
    codes.values.backward(gradient)
    dense = [tensor.clone().requires_grad_() for tensor in given]
    scores = torch.nn.functional.linear(*dense).relu()
    scores.gather(-1, codes.indices).backward(gradient)
    for mine, expected in zip(leaves, dense, strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-5, atol=1e-5)


def odd_layers():
    """What might deceive a bound, by name: rows and weights, and the dtypes of the products that
    are needed ("all": every score one by one)."""
    x, weight = layer(5, 64, 1500)
    one, tiny = torch.ones(5, 64), 1e-41 * torch.randn(1500, 64)

    def changed(tensor, where, value):
        tensor = tensor.clone()
        tensor[where] = value
        return tensor

    duplicates = weight[:100].repeat(15, 1)
    near = weight[:1].repeat(1500, 1) + 1e-7 * torch.randn(1500, 64)
    return {
        "near ties": (x, near),
        "one large latent": (x, changed(weight, 7, 1e4 * weight[7])),
        "an outlier column of x": (changed(x, (slice(None), 3), 1e4), weight),
        "equal weights": (x, torch.ones_like(weight)),
        "zero rows": (changed(x, slice(0, 3), 0), weight),
        "zero weights": (x, torch.zeros_like(weight)),
        "subnormal weights": (x, tiny),
        "subnormal products": (1e-30 * x, 1e-10 * weight),
        "more than bfloat16": (changed(x, (0, 0), 3.402e38), weight),
        "overflowing weights": (x, changed(weight, (9, 2), 3.402e38)),
        "overflowing scores": (1e30 * x, 1e20 * weight),
        "NaN in x": (changed(x, (2, 5), torch.nan), weight),
        "NaN in a latent": (x, changed(weight, (11, 5), torch.nan)),
        "infinity in x": (changed(x, (2, 5), torch.inf), weight),
        "infinities in latents": (
            x,
            changed(changed(weight, (3, 1), torch.inf), (4, 1), -torch.inf),
        ),
        "duplicates": (x, duplicates),
        "cancellation": (one, changed(weight, slice(None), torch.randn(1500, 64).sign() * 1e6)),
        "large range": (x * torch.logspace(-18, 18, 64), weight * torch.logspace(18, -18, 64)),
    }


@pytest.mark.slow_on("triton-interpreter")
@pytest.mark.parametrize("name", list(odd_layers()))
def test_odd_numbers_lose_nothing(target, name):
    x, weight = odd_layers()[name]
    if not target.thorough:
        x, weight = x[:3], weight[:160]
    for k in (1, 20) if target.thorough else (5,):
        check_equal(x, weight, k, target=target)
        check_equal(x, weight, k, bias=torch.randn(len(weight)), sorted=False, target=target)


def test_a_bias_of_minus_infinity_rules_a_latent_out(target, screened):
    rows, d, n, k = sized(target, 4, 32, 2000, 16)
    x, weight = layer(rows, d, n)
    bias = torch.where(torch.rand(n) < 0.9, -torch.inf, 0.0)
    check_equal(x, weight, k, bias=bias, target=target)
    assert screened == [torch.bfloat16]  # no row had too many candidates


@pytest.mark.slow_on("triton-interpreter")
def test_crowded_rows_are_done_in_full_precision(target, screened):
    x, weight = layer(*(4, 64, 3000) if target.thorough else (2, 64, 600))
    weight = weight[:1] + 1e-4 * weight  # closer than bfloat16 can tell, not float32
    x[1] = 0  # with this row all scores are equal, which is certain
    check_equal(x, weight, 3, target=target)
    assert screened == [torch.bfloat16, torch.float32]
    screened.clear()
    check_equal(x, torch.full_like(weight, 0.1), 3, target=target)  # and none can tell these
    assert screened == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_products_that_their_user_lets_round_are_not_trusted(screened, precision):
    """torch may round what a float32 product multiplies, which no bound knows of."""
    x, weight = layer(40, 256, 3000)
    weight = weight[:1] + 1e-4 * weight  # closer than bfloat16 can tell
    asked = torch.backends.mkldnn.matmul
    before, asked.fp32_precision = asked.fp32_precision, precision
    try:
        check_equal(x, weight, 3)
    finally:
        asked.fp32_precision = before
    assert screened == [torch.bfloat16]


def test_threads_do_not_change_a_bit(one_or_more_threads=(1, 2, 3)):
    x, weight = layer(33, 70, 2500)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in one_or_more_threads:
            torch.set_num_threads(threads)
            found.append(sparsekern.linear_topk(x, weight, None, 20))
    finally:
        torch.set_num_threads(before)
    for codes in found[1:]:
        assert torch.equal(codes.values, found[0].values)
        assert torch.equal(codes.indices, found[0].indices)


@pytest.mark.slow_on("triton-interpreter")
def test_slices_do_not_change_a_bit(target, monkeypatch):
    rows, d, n, k = sized(target, 20, 70, 2500, 20)
    x, weight = (tensor.to(target.device) for tensor in layer(rows, d, n))
    found = []
    for width in (256, 640, 4096):
        monkeypatch.setattr(screen, "LEAST_WIDTH", width)
        monkeypatch.setattr(screen, "SLICE_ELEMENTS", 1)
        found.append(sparsekern.linear_topk(x, weight, None, k))
    for codes in found[1:]:
        assert torch.equal(codes.values, found[0].values)
        assert torch.equal(codes.indices, found[0].indices)


def test_other_layers_are_not_screened(screened):
    x, weight = layer(4, 32, 2000)
    sparsekern.linear_topk(x.double(), weight.double(), None, 4)
    sparsekern.linear_topk(x.bfloat16(), weight, None, 4)
    sparsekern.linear_topk(x, weight, None, 4, latents=torch.arange(0, 2000, 2))
    sparsekern.linear_topk(x, weight, None, 500)  # candidates would be most latents
    sparsekern.linear_topk(x, torch.randn(2000, 64)[:, ::2], None, 4)
    with sparsekern.backend("reference"):
        sparsekern.linear_topk(x, weight, None, 4)
    assert screened == []


def test_one_switch_turns_it_off(screened):
    x, weight = layer(4, 32, 2000)
    with sparsekern.screening(False):
        sparsekern.linear_topk(x, weight, None, 4)
        with sparsekern.screening(True):
            sparsekern.linear_topk(x, weight, None, 4)
        assert len(screened) == 1
        sparsekern.linear_topk(x, weight, None, 4)
    assert len(screened) == 1
    with pytest.raises(TypeError, match="screening: enabled must be a bool, got 1"):
        sparsekern.screening(1)


@pytest.mark.parametrize(
    "chosen", [t for t in TARGETS if t.backend == "triton"], ids=lambda target: target.name
)
def test_triton_screens_only_if_asked(chosen, screened):
    x, weight = (tensor.to(chosen.device) for tensor in layer(2, 16, 64))
    with chosen.active():
        sparsekern.linear_topk(x, weight, None, 2)
        assert screened == []
        with sparsekern.screening(True):
            sparsekern.linear_topk(x, weight, None, 2)
    assert screened == [torch.bfloat16]


# ---- the kernels one by one ----


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_rounding_is_torchs_and_its_errors_are_bounded(target, columns):
    """Ties, infinities, NaN and what is rounded to infinity too; results below 2^-126 are zero."""
    rows = torch.randn(70, 37) * 2.0 ** torch.randint(-140, 120, (70, 1))
    rows[1] = 1 + torch.arange(37) * 2.0**-9
    rows[2] = -(2.0**-126) * (1 - 2.0 ** -torch.arange(1.0, 38))
    rows[3:6, 5] = torch.tensor([torch.nan, -torch.inf, 3.402e38])
    rows = rows.to(target.device)
    rows = rows.t().contiguous().t() if columns else rows
    found = kernels_of(target).round_rows(rows, rounded.room_for(rows))
    nearest = rows.bfloat16()
    nearest[nearest.abs() < 2.0**-126] = 0
    torch.testing.assert_close(found.rows, nearest, rtol=0, atol=0, equal_nan=True)
    exact = rows.double()
    for bound, numbers in [
        (found.lengths, exact),
        (found.errors, exact - nearest.double()),
    ]:
        norms = numbers.norm(dim=1).nan_to_num(torch.inf)
        assert bool((bound >= norms).all())
        close = bound <= norms * (1 + 1e-4) + 37 * 2.0**-62
        assert bool((close | (norms > 2.0**63)).all())  # squares beyond that are infinite


def bounds_in_double(scores, bias, scale, bound):
    """Lower and upper bounds of the exact scores, of a few rows at least."""
    a, r = scores.double(), scores.double().abs() * bound.of_score + bound.least
    r += bound.x_errors.unsqueeze(1) * bound.lengths.double()
    r += bound.x_lengths.unsqueeze(1) * bound.errors.double()
    if bias is not None:
        a, r = a + bias, r + bias.abs().double() * bound.of_bias
    if scale is not None:
        a, r = a * scale, r * scale.abs().double() + bound.least
    return a - r, a + r


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_are_what_the_bounds_leave(target, dtype, affine):
    """By slices of several widths, the first narrower than k; with numbers that are none. A row
    with too many for its room is given up."""
    rows, k, widths = 3, 40, (17, 300, 1, 700)
    n = sum(widths)
    given = {
        "scores": torch.randn(rows, n).to(dtype),
        "bias": torch.randn(n) if affine else None,
        "scale": torch.rand(n) + 0.5 if affine else None,
    }
    given["scores"][1, ::7] = torch.nan
    given["scores"][2] = torch.nan
    given["lengths"], given["errors"] = torch.rand(2, n)
    given = {name: v if v is None else v.to(target.device) for name, v in given.items()}
    factors = (1e-2 * torch.rand(2, rows)).to(target.device)
    found = candidates.Candidates(rows, k, factors.device)
    lower, upper = [], []
    for first, width in zip([0, 17, 317, 318], widths, strict=True):
        part = {
            name: v if v is None else v[..., first : first + width].contiguous()
            for name, v in given.items()
        }
        bound = candidates.ErrorBound(
            *factors, part.pop("lengths"), part.pop("errors"), 2.0**-8, 2.0**-20, 1e-36
        )
        kernels_of(target).screen_scores(
            found, part["scores"], first, part["bias"], part["scale"], bound, first == 318
        )
        for bounds, kind in zip((lower, upper), bounds_in_double(**part, bound=bound), strict=True):
            bounds.append(kind)
    lower, upper = torch.cat(lower, 1), torch.cat(upper, 1)
    threshold = lower.nan_to_num(-torch.inf).topk(k).values[:, -1:]
    assert int(found.counts[2]) == -1
    for row in range(2):
        count = int(found.counts[row])
        listed = found.latents[row, :count].long()
        assert listed.tolist() == sorted(set(listed.tolist()))
        # one that is too near to the threshold may or may not be listed
        certain = (~(upper[row] < threshold[row] + 1e-5)).nonzero().squeeze(1)
        assert set(certain.tolist()) <= set(listed.tolist())
        assert count < 4 * k + int(upper[row].isnan().sum())


# ---- against truth ----


def lost(x, weight, k, **vectors):
    """How many codes are not among the k largest true scores, though a float32 sum tells them
    apart: its error is at most 2 (d + 2) roundings of the sum of magnitudes."""
    codes = sparsekern.linear_topk(x, weight, None, k, relu=False)
    exact = x.double() @ weight.double().t()
    kth = exact.topk(k).values[:, -1:]
    magnitudes = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    error = (2 * (x.shape[1] + 2) * 2.0**-24 * magnitudes).gather(1, codes.indices)
    least = error + (2 * (x.shape[1] + 2) * 2.0**-24 * magnitudes).amax(1, keepdim=True)
    return int((exact.gather(1, codes.indices) < kth - least).sum())


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    strategies.integers(1, 40),
    strategies.sampled_from([300, 1000]),
    strategies.integers(1, 12),
    strategies.integers(0, 2**32 - 1),
    strategies.floats(-40, 40),
    strategies.floats(0, 30),
)
def test_no_input_found_that_loses_a_winner(d, n, k, seed, exponent, spread):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(3, d, generator=random) * 2.0**exponent
    weight = torch.randn(n, d, generator=random)
    weight *= 2.0 ** (spread * torch.rand(n, 1, generator=random))
    check_equal(x, weight, k)


def test_inputs_made_to_deceive_the_bound_lose_nothing():
    """Gradient ascent on what rounding takes: rows and latents whose errors all point one way."""
    d, n, k = 48, 600, 4
    for seed in range(40):
        torch.manual_seed(seed)
        x, weight = torch.randn(8, d), torch.randn(n, d)
        for _ in range(10):
            lost_of_x = x - x.bfloat16().float()
            lost_of_weight = weight - weight.bfloat16().float()
            # winners look smaller than they are, the others larger
            scores = x @ weight.t()
            sign = torch.where(scores >= scores.topk(k).values[:, -1:], 1.0, -1.0)
            x = x + 1e-3 * ((sign / n) @ lost_of_weight + lost_of_x.sign() * x.abs())
            weight = weight + 1e-3 * (sign.t() @ lost_of_x + lost_of_weight.sign() * weight.abs())
        check_equal(x, weight, k)
        assert lost(x, weight, k) == 0


def test_sets_are_those_of_double_precision():
    cases = 0
    for seed in range(40):
        torch.manual_seed(seed)
        d, n, k = [(64, 1000, 8), (256, 2000, 32), (100, 4000, 16), (768, 1500, 4)][seed % 4]
        x, weight = torch.randn(500, d), torch.randn(n, d)
        assert lost(x, weight, k) == 0
        cases += len(x)
    assert cases == 20_000


# ---- copies that are kept ----


def edits(weight):
    """Every way to change a weight that torch has, by name."""
    other = torch.randn_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    fused = sparsekern.optim.Adam([weight], lr=0.5)

    def step(how):
        weight.grad = torch.randn_like(weight)
        how.step()

    def in_a_thread():
        thread = threading.Thread(target=lambda: weight.detach().mul_(-1))
        thread.start()
        thread.join()

    def load():
        module = torch.nn.Module()
        module.weight = weight
        module.load_state_dict({"weight": other})

    def under_no_grad():
        with torch.no_grad():
            weight.copy_(other)

    def set_storage():
        with torch.no_grad():
            weight.set_(other)

    def swap():
        weight.data = other

    return {
        "in place": lambda: weight.detach().mul_(-1),
        "one element": lambda: weight.detach().__setitem__((3, 4), 100.0),
        "copy_": under_no_grad,
        "data": lambda: weight.data.mul_(-1),
        "data assigned": swap,
        "set_": set_storage,
        "numpy": lambda: weight.detach().numpy().__imul__(-1),
        "load_state_dict": load,
        "torch's optimizer": lambda: step(optimizer),
        "our Adam": lambda: step(fused),
        "another thread": in_a_thread,
    }


@pytest.mark.parametrize("name", list(edits(torch.nn.Parameter(torch.randn(4, 5)))))
def test_a_kept_copy_is_never_stale(name):
    x = torch.randn(2, 40)
    weight = torch.nn.Parameter(torch.randn(1500, 40))
    with sparsekern.keep_rounded(weight) as kept:
        check_equal(x, weight.detach(), 8)
        assert kept.nbytes == 1500 * 40 * 2 + 1500 * 8
        edits(weight)[name]()
        check_equal(x, weight.detach(), 8)


def test_a_kept_copy_is_used_and_released(monkeypatch):
    x, weight = layer(2, 40, 1500)
    made = []
    original = native.round_rows

    def counting(rows, into):
        if rows.shape == weight.shape:
            made.append(rows)
        return original(rows, into)

    monkeypatch.setattr(native, "round_rows", counting)
    kept = sparsekern.keep_rounded(weight)
    assert kept.nbytes == 0  # nothing is kept for a weight that is not used
    for _ in range(3):
        check_equal(x, weight, 8)
    assert len(made) == 1
    kept.refresh()
    check_equal(x, weight, 8)
    assert len(made) == 2
    kept.release()
    assert kept.nbytes == 0 and kept_copies.kept_copy(weight) is None
    kept = sparsekern.keep_rounded(weight)
    del kept
    assert kept_copies.kept_copy(weight) is None


def test_a_changed_element_is_found_within_the_calls_that_compare_it():
    x, weight = layer(1, 32, 3000)
    with sparsekern.keep_rounded(weight) as kept:
        check_equal(x, weight, 8)
        weight.data[1234, 5] = 50.0
        for _ in range(2 * 3):  # columns by sixteen, rows by every third or so
            sparsekern.linear_topk(x, weight, None, 8)
        check_equal(x, weight, 8)
        assert kept.nbytes > 0


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ("weight", TypeError, "weight must be a tensor, got str"),
        (torch.zeros(4, 4, dtype=torch.bfloat16), TypeError, "must be float32, got torch.bfloat16"),
        (torch.zeros(4), ValueError, r"must be \[latents, features\] and one stride 1"),
        (torch.zeros(4, 8)[:, ::2], ValueError, "with strides"),
        (torch.zeros(4, 4, device="meta"), ValueError, "must be on a CPU, got meta"),
    ],
    ids=["type", "dtype", "shape", "strides", "device"],
)
def test_what_cannot_be_kept_is_refused(weight, error, message):
    with pytest.raises(error, match=f"keep_rounded: weight .*{message.removeprefix('weight ')}"):
        sparsekern.keep_rounded(weight)


def test_a_model_copies_and_compiles_with_a_kept_copy():
    weight = torch.nn.Parameter(torch.randn(1500, 40))
    x = torch.randn(3, 40)
    kept = sparsekern.keep_rounded(weight)
    copied = copy.deepcopy(weight)
    expected = sparsekern.linear_topk(x, weight, None, 8)
    again = sparsekern.linear_topk(x, copied, None, 8)
    assert torch.equal(expected.indices, again.indices) and kept.nbytes > 0
