"""The speed table as data: what is measured, against what, and the bar it has to reach.

Nothing here needs torch, so that `table.py` can reprint committed rows anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

TOPK_SIZES = ((512, 4096, 32), (256, 32768, 32), (64, 131072, 64), (16, 1048576, 32))
PRODUCT_SIZES = ((1024, 32, 16384, 768), (1024, 64, 32768, 2048))
ENCODER_SIZES = ((512, 768, 16384, 32), (128, 768, 131072, 64), (512, 4096, 32768, 64))
# Inputs that selection algorithms stumble over, and the dtype in which they do.
HARD = (
    ("ascending", "float32"),
    ("98 % zeros", "float32"),
    ("all -inf", "float32"),
    ("few values", "bfloat16"),
    ("ties", "bfloat16"),
)
ITSELF = "itself, normal data"


@dataclass(frozen=True)
class Workload:
    """One thing to time: an operation, its sizes, and what its input looks like."""

    op: str
    rows: int
    n: int
    k: int
    d: int = 0
    dtype: str = "float32"
    mode: str = "forward"
    fill: str = "normal"
    layout: str = "row-major"
    device: str = "cpu"

    @property
    def case(self) -> str:
        """The sizes, in the order in which the operation's arguments name them."""
        if self.op == "sparse_matmul":
            return f"B={self.rows} k={self.k} n={self.n} d={self.d}"
        if self.op in ("linear_topk", "SparseAutoencoder"):
            return f"B={self.rows} d={self.d} n={self.n} k={self.k}"
        if self.op == "adam_step":
            return f"two {self.n} x {self.d} matrices"
        if self.op == "count_active":
            return f"{self.rows * self.k} codes n={self.n}"
        return f"B={self.rows} n={self.n} k={self.k}"

    def __str__(self) -> str:
        plain = {"forward", "normal", "row-major", "cpu"}
        extras = [e for e in (self.mode, self.fill, self.layout, self.device) if e not in plain]
        return " ".join([self.op, self.case, self.dtype, *extras])


@dataclass(frozen=True)
class Target:
    """One line of the table: a workload served by a backend, a peer, and what is required.

    bar: the least ratio of the peer's time to ours; None reports without a requirement.
    at_most: the requirement reads "at most 1 / bar times the peer's time".
    roof_bar: the least fraction of the machine's own measured roofline.
    """

    workload: Workload
    peer: str
    bar: float | None = None
    at_most: bool = False
    roof_bar: float | None = None
    backend: str = "native"

    @property
    def key(self) -> tuple[Any, ...]:
        """What a row must share with this line to be about it."""
        values = {f.name: getattr(self.workload, f.name) for f in fields(self.workload)}
        return key_of({**values, "backend": self.backend, "peer": self.peer})

    def requirement(self) -> str:
        """The bar in words."""
        if self.bar is None:
            return "reported"
        text = f"at most {1 / self.bar:g}x" if self.at_most else f"at least {self.bar:g}x"
        return text if self.roof_bar is None else f"{text}, {self.roof_bar:.0%} of roofline"

    def reached(self, ratio: float, fraction: float | None) -> bool:
        """Whether measured figures satisfy the line."""
        fast = self.bar is None or ratio >= self.bar
        near = self.roof_bar is None or (fraction is not None and fraction >= self.roof_bar)
        return fast and near


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The fields that tell one line of measurements from another."""
    names = [f.name for f in fields(Workload)]
    return tuple(row[name] for name in (*names, "backend", "peer"))


def _topk(sizes: tuple[int, int, int], **more: Any) -> Workload:
    rows, n, k = sizes
    return Workload("topk", rows, n, k, **more)


def _product(sizes: tuple[int, int, int, int], **more: Any) -> Workload:
    rows, k, n, d = sizes
    return Workload("sparse_matmul", rows, n, k, d, **more)


def _cpu() -> Iterable[Target]:
    for dtype in ("float32", "bfloat16"):
        for sizes in TOPK_SIZES:
            yield Target(_topk(sizes, dtype=dtype), "torch.topk", 10)
            if dtype == "float32" and sizes == TOPK_SIZES[1]:
                yield Target(_topk(sizes), "x.amax", 0.5, at_most=True)
    for fill, dtype in HARD:
        for sizes in TOPK_SIZES:
            yield Target(_topk(sizes, dtype=dtype, fill=fill), ITSELF, 1 / 3, at_most=True)
    mask = Workload("topk_mask", 512, 16384, 32)
    yield Target(mask, "torch.topk, scatter", 4)
    yield Target(mask, "x.clone", 1)
    for mode, bar in (("forward", 1), ("forward+backward", 2)):
        for sizes in PRODUCT_SIZES:
            yield Target(_product(sizes, mode=mode), "embedding_bag", bar)
    for mode in ("forward", "forward+backward"):
        for sizes in PRODUCT_SIZES:
            linear = _product(sizes, mode=mode, layout="column-major")
            yield Target(linear, "embedding_bag of a row-major copy")
    layer = Workload("TopK", 512, 16384, 32, mode="forward+backward")
    yield Target(layer, "torch.topk, relu, scatter", 4)
    yield Target(Workload("count_active", 1024, 16384, 32), "torch.bincount", 1)


def _autoencoder() -> Iterable[Target]:
    for rows, d, n, k in ENCODER_SIZES:
        encoder = Workload("linear_topk", rows, n, k, d)
        yield Target(encoder, "F.linear", 1 / 1.1, at_most=True)
        yield Target(encoder, "F.linear, torch.topk", 1)
    step = Workload("SparseAutoencoder", 1024, 16384, 32, 768, mode="forward+backward")
    yield Target(step, "F.linear forward", 1 / 1.35, at_most=True)
    adam = Workload("adam_step", 1, 16384, 1, 768)
    yield Target(adam, "fused Adam, projection, normalization", 1.5)


def _gpu() -> Iterable[Target]:
    for backend in ("native", "triton"):
        for dtype in ("float32", "bfloat16"):
            rows = _topk((4096, 65536, 64), dtype=dtype, device="cuda")
            yield Target(rows, "torch.topk", 8, roof_bar=0.6, backend=backend)
        codes = _product((4096, 64, 65536, 4096), dtype="bfloat16", device="cuda")
        yield Target(codes, "dense product", 4, backend=backend)
        backward = replace(codes, mode="backward")
        yield Target(backward, "two dense products", 4, backend=backend)


def _extras() -> Iterable[Target]:
    """Further cases of the suites, outside the table: other dtypes, other k, the reference."""
    yield Target(_topk((256, 32768, 32), dtype="float16"), "torch.topk")
    for k in (8, 128, 512):
        yield Target(_topk((256, 32768, k)), "torch.topk")
    yield Target(_topk((512, 4096, 32)), "torch.topk", backend="reference")
    yield Target(Workload("topk_mask", 512, 16384, 32, dtype="bfloat16"), "torch.topk, scatter")
    half = _product((1024, 32, 16384, 768), dtype="bfloat16")
    yield Target(half, "embedding_bag")
    yield Target(replace(half, mode="forward+backward"), "embedding_bag")
    layer = Workload("TopK", 512, 16384, 32, dtype="bfloat16", mode="forward+backward")
    yield Target(layer, "torch.topk, relu, scatter")
    yield Target(Workload("count_active", 4096, 65536, 64), "torch.bincount")


CPU_TARGETS = (*_cpu(), *_autoencoder())
GPU_TARGETS = tuple(_gpu())
TARGETS = CPU_TARGETS + GPU_TARGETS
EXTRAS = tuple(_extras())


def by_workload(targets: Iterable[Target]) -> dict[Workload, list[Target]]:
    """Lines that share a workload are measured in one interleaved loop."""
    groups: dict[Workload, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.workload, []).append(target)
    return groups
