"""Cases for each operation and the error rule, shared by the tests and the benchmarks.

The error rule: with a float64 truth, |kernel - truth| <= 2 |reference - truth| + 4 eps scale, where
`reference` is the plain PyTorch expression in the kernel's dtype and `scale` the magnitude of the
terms that are summed. Indices and masks have no tolerance: the order of elements is total, so there
is one right answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# -- the error rule --------------------------------------------------------------------------------


def error_ratio(
    actual: torch.Tensor, truth: torch.Tensor, reference: torch.Tensor, scale: torch.Tensor | float
) -> float:
    """Compute the largest |actual - truth| / (2 |reference - truth| + 4 eps scale).

    It is at most 1 when the error rule holds.

    Elements that are NaN or infinite must agree exactly and count as 0 when they do.

    Args:
        actual: results of a kernel, in its dtype.
        truth: float64.
        reference: results of the plain expression, in the kernel's dtype.
        scale: magnitude of what was summed, broadcastable to truth.
    """
    eps = torch.finfo(actual.dtype).eps
    actual, reference = actual.double().cpu(), reference.double().cpu()
    truth = truth.double().cpu()
    special = ~truth.isfinite() | ~reference.isfinite()
    same = (actual == reference) | (actual.isnan() & reference.isnan())
    allowed = 2 * (reference - truth).abs() + 4 * eps * torch.as_tensor(scale).double().cpu()
    error = (actual - truth).abs()
    ratio = torch.where(error == 0, 0.0, error / allowed)
    ratio = torch.where(special, torch.where(same, 0.0, torch.inf), ratio)
    ratio = torch.where(ratio.isnan(), torch.inf, ratio)
    return float(ratio.max()) if ratio.numel() else 0.0


def assert_error_rule(
    what: str,
    actual: torch.Tensor,
    truth: torch.Tensor,
    reference: torch.Tensor,
    scale: torch.Tensor | float,
) -> None:
    """Raise AssertionError, with the worst ratio, where the error rule does not hold."""
    if actual.shape != truth.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, not {list(truth.shape)}")
    ratio = error_ratio(actual, truth, reference, scale)
    if ratio > 1:
        raise AssertionError(f"{what}: error is {ratio:.3g} times what the error rule allows")


def assert_same(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise AssertionError unless both tensors hold the same bits.

    All NaNs count as one, -0.0 as +0.0.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: {actual.dtype} {list(actual.shape)}, "
            f"not {expected.dtype} {list(expected.shape)}"
        )
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    same = actual == expected
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if not bool(same.all()):
        wrong = (~same).nonzero()[0].tolist()
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} elements differ, first at {wrong}: "
            f"{actual[tuple(wrong)].item()} instead of {expected[tuple(wrong)].item()}"
        )


# -- top-k cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopkCase:
    """One input of top-k.

    A name, rows, width, how many to keep, and how the rows are filled and laid out.
    """

    name: str
    rows: int
    n: int
    k: int
    fill: str = "normal"
    layout: str = "contiguous"

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """Make x [rows, n] of the dtype, in the case's layout; the same numbers every time."""
        x = fill_rows(self.fill, self.rows, self.n).to(dtype).to(device)
        return lay_out(x, self.layout)


def fill_rows(fill: str, rows: int, n: int, seed: int = 0) -> torch.Tensor:
    """Make float32 [rows, n] of a named kind: what selection algorithms stumble over."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, n, generator=generator)
    chance = torch.rand(rows, n, generator=generator)
    inf, zero = torch.tensor(torch.inf), torch.zeros(())
    kinds = {
        "normal": lambda: normal,
        "ties": lambda: torch.ones(rows, n),
        "all -inf": lambda: torch.full((rows, n), -torch.inf),
        "half -inf": lambda: torch.where(chance < 0.5, -inf, normal),
        "some inf": lambda: torch.where(chance < 0.1, inf, normal),
        "nan": lambda: torch.where(chance < 0.1, torch.nan, normal),
        "negative nan": lambda: torch.where(chance < 0.1, torch.nan, normal).neg(),
        "signed zeros": lambda: torch.where(chance < 0.5, zero, -zero),
        "98 % zeros": lambda: torch.where(chance < 0.02, normal, zero),
        "ascending": lambda: torch.arange(n).float().expand(rows, n).clone(),
        "descending": lambda: -torch.arange(n).float().expand(rows, n).clone(),
        "two values": lambda: (chance < 0.3).float(),
        "few values": lambda: (normal * 2).round(),
        "periodic": lambda: (torch.arange(n) % 128).float().expand(rows, n).clone(),
        "negative": lambda: -normal.abs() - 1,
        "narrow": lambda: 1 + chance * 3e-5,
        "subnormal": lambda: normal * 1e-39,
        "huge": lambda: normal * 1e38,
    }
    return kinds[fill]()


FILLS = (
    "normal",
    "ties",
    "all -inf",
    "half -inf",
    "some inf",
    "nan",
    "negative nan",
    "signed zeros",
    "98 % zeros",
    "ascending",
    "descending",
    "two values",
    "few values",
    "periodic",
    "negative",
    "narrow",
    "subnormal",
    "huge",
)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Give the same numbers [rows, n] other strides.

    Args:
        x: [rows, n].
        layout: "contiguous" or one of LAYOUTS.

    Raises:
        ValueError: the layout is another.
    """
    rows, n = x.shape
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "expanded":
        return x[:1].expand(rows, n)
    if layout == "offset":  # breaks 16-byte alignment of every row
        wide = x.new_zeros(rows, n + 3)
        wide[:, 1 : n + 1] = x
        return wide[:, 1 : n + 1]
    if layout == "every second":
        wide = x.new_zeros(rows, 2 * n)
        wide[:, ::2] = x
        return wide[:, ::2]
    raise ValueError(f"lay_out: layout is not known: {layout!r}")


LAYOUTS = ("transposed", "expanded", "offset", "every second")

# Widths around the kernels' block and vector boundaries, and the ks worth asking for.
SMALL_WIDTHS = (1, 2, 7, 33, 257)
WIDTHS = (*SMALL_WIDTHS, 500, 1025, 4097, 10000)


def topk_cases(widths: tuple[int, ...] = WIDTHS) -> Iterator[TopkCase]:
    """List the standard sweep of top-k; fewer widths make it shorter."""
    for n in widths:
        ks = sorted({1, min(2, n), min(32, n), max(1, n // 2), n})
        for k in ks:
            for fill in FILLS:
                yield TopkCase(f"{fill}, n={n}, k={k}", 3, n, k, fill)
        for layout in LAYOUTS:
            yield TopkCase(f"{layout}, n={n}", 3, n, min(5, n), "normal", layout)
        yield TopkCase(f"one row, n={n}", 1, n, min(3, n))
        yield TopkCase(f"no rows, n={n}", 0, n, min(3, n))


# -- sparse product cases --------------------------------------------------------------------------


@dataclass(frozen=True)
class ProductCase:
    """One input of the sparse product.

    Sizes, layout of the weight, and how the indices are drawn.
    """

    name: str
    rows: int
    k: int
    n: int
    d: int
    layout: str = "row-major"
    draw: str = "random"
    bias: bool = False

    def make(
        self,
        dtype: torch.dtype,
        weight_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Make values [rows, k], indices int64 [rows, k], weight [n, d], bias [d] or None."""
        generator = torch.Generator().manual_seed(1)
        values = torch.randn(self.rows, self.k, generator=generator)
        indices = torch.randint(0, self.n, (self.rows, self.k), generator=generator)
        if self.draw == "one latent":
            indices.zero_()
        elif self.draw == "skewed":
            indices = indices * (torch.rand(indices.shape, generator=generator) < 0.3)
        weight = torch.randn(self.n, self.d, generator=generator)
        weight = weight.to(weight_dtype or dtype)
        if self.layout == "column-major":
            weight = weight.t().contiguous().t()
        elif self.layout == "padded":
            wide = weight.new_zeros(self.n, self.d + 3)
            wide[:, : self.d] = weight
            weight = wide[:, : self.d]
        elif self.layout == "strided":
            weight = weight.repeat_interleave(2, 1)[:, ::2]
        bias = torch.randn(self.d, generator=generator).to(weight.dtype) if self.bias else None
        values, indices = values.to(dtype).to(device), indices.to(device)
        return values, indices, weight.to(device), None if bias is None else bias.to(device)


PRODUCT_CASES = (
    ProductCase("usual", 5, 4, 40, 24, bias=True),
    ProductCase("one row", 1, 3, 17, 33),
    ProductCase("empty batch", 0, 3, 17, 8, bias=True),
    ProductCase("k = 1", 6, 1, 9, 16),
    ProductCase("k = n", 3, 7, 7, 5),
    ProductCase("one feature", 4, 3, 11, 1),
    ProductCase("odd sizes", 7, 5, 13, 37, bias=True),
    ProductCase("above a block", 3, 6, 50, 257),
    ProductCase("wide", 2, 9, 70, 1030),
    ProductCase("duplicates", 8, 6, 3, 19),
    ProductCase("one latent everywhere", 40, 2, 30, 21, draw="one latent"),
    ProductCase("skewed", 60, 8, 50, 30, draw="skewed"),
    ProductCase("many silent latents", 2, 2, 400, 12),
    ProductCase("nn.Linear weight", 9, 5, 45, 50, layout="column-major", bias=True),
    ProductCase("nn.Linear weight, tiny", 2, 2, 3, 2, layout="column-major"),
    ProductCase("padded rows", 4, 3, 21, 30, layout="padded"),
    ProductCase("no unit stride", 4, 3, 21, 30, layout="strided"),
)
