"""The speed table as data: what is measured, against what, and the bar it has to reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from sparsekern.benchmarks import peers
from sparsekern.benchmarks.cases.autoencoder import COPY_KEPT, SCREENED
from sparsekern.benchmarks.cases.topk import ITSELF
from sparsekern.benchmarks.workload import BY_CHANNEL, Workload

TOPK_SIZES = ((512, 4096, 32), (256, 32768, 32), (64, 131072, 64), (16, 1048576, 32))
PRODUCT_SIZES = ((1024, 32, 16384, 768), (1024, 64, 32768, 2048))
ENCODER_SIZES = (
    (1024, 768, 16384, 32),
    (128, 768, 131072, 64),
    (512, 2048, 32768, 64),
    (512, 4096, 32768, 64),
)
STEP_PEERS = ("eai-sparsify", "dictionary-learning", "sae-lens")
# Rows that are encoded a few at a time: bound by reading the weight, and by the call itself.
FEW_ROWS = ((1, 768, 65536, 64), (8, 768, 65536, 64), (32, 768, 65536, 64))
SMALL_ENCODERS = ((1, 384, 3072, 32), (8, 384, 3072, 32))
# Inputs that selection algorithms stumble over, and the dtype in which they do.
HARD = (
    ("ascending", "float32"),
    ("98 % zeros", "float32"),
    ("all -inf", "float32"),
    ("few values", "bfloat16"),
    ("ties", "bfloat16"),
)
CONV_DENSITY = 1e-3
RUN = "python bench/run.py"
STORE = "python bench/activations.py"
ACCELERATED = "python bench/accelerated.py"
MIB = 2**20
STORE_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Target:
    """One line of the table: a workload served by a backend, a peer, and what is required.

    bar: the least ratio of the peer's time to ours; None reports without a requirement.
    at_most: the requirement reads "at most 1 / bar times the peer's time".
    roof_bar: the least fraction of the machine's own measured roofline.
    beyond_gradients: the most bytes of extra memory at the peak, gradients not counted.
    command: what measures the line.
    """

    workload: Workload
    peer: str
    bar: float | None = None
    at_most: bool = False
    roof_bar: float | None = None
    backend: str = "native"
    beyond_gradients: int | None = None
    command: str = RUN

    @property
    def key(self) -> tuple[Any, ...]:
        """What a row must share with this line to be about it."""
        values = {f.name: getattr(self.workload, f.name) for f in fields(self.workload)}
        return key_of({**values, "backend": self.backend, "peer": self.peer})

    @property
    def with_gradients(self) -> bool:
        """Whether our peak is shown with memory that native code takes, as that of gradients."""
        return self.beyond_gradients is not None or self.workload.op == "accelerate"

    @property
    def required(self) -> bool:
        """Whether the line has to reach anything."""
        return self.bar is not None or self.beyond_gradients is not None

    def requirement(self) -> str:
        """The bar in words."""
        said = []
        if self.bar is not None:
            said.append(f"at most {1 / self.bar:g}x" if self.at_most else f"at least {self.bar:g}x")
        if self.roof_bar is not None:
            said.append(f"{self.roof_bar:.0%} of roofline")
        if self.beyond_gradients is not None:
            said.append(f"peak at most gradients + {self.beyond_gradients / MIB:g} MiB")
        return ", ".join(said) or "reported"

    def reached(self, ratio: float, fraction: float | None, peak: int | None) -> bool:
        """Whether measured figures satisfy the line."""
        fast = self.bar is None or ratio >= self.bar
        near = self.roof_bar is None or (fraction is not None and fraction >= self.roof_bar)
        small = self.beyond_gradients is None or (
            peak is not None and peak <= self.workload.gradient_bytes + self.beyond_gradients
        )
        return fast and near and small


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """The fields that tell one line of measurements from another."""
    sizes = {**row, **_renamed_sizes(row)}
    # Rows are older than some fields, whose defaults then say what was measured.
    about = (sizes.get(f.name, f.default) for f in fields(Workload))
    return (*about, row["backend"], row["peer"])


def _renamed_sizes(row: dict[str, Any]) -> dict[str, Any]:
    """The sizes of rows that were written when every operation had rows, n, k and d."""
    if "channels" in row:
        return {}
    if row["op"] in BY_CHANNEL:
        sizes = {"channels": row["n"], "positions": row["k"], "n": 0, "k": 0, "d": 0}
        if row["op"] == "pointwise_conv":
            return {**sizes, "outputs": row["d"], "density": CONV_DENSITY}
        return {**sizes, "density": row["d"] / 1e6}
    if row["op"] == "ActivationStore":
        return {"file_rows": row["n"], "n": 0, "k": 0}
    return {"rows": 0, "k": 0} if row["op"] == "adam_step" else {}


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
        yield Target(encoder, "F.linear", 1 / 0.6, at_most=True)
        yield Target(encoder, "F.linear, torch.topk", 1)
    for rows, d, n, k in FEW_ROWS:
        encoder = Workload("linear_topk", rows, n, k, d, fill=COPY_KEPT)
        yield Target(encoder, "F.linear, torch.topk", 2)
    for rows, d, n, k in SMALL_ENCODERS:
        yield Target(Workload("linear_topk", rows, n, k, d), "F.linear, torch.topk", 1)
    step = Workload("SparseAutoencoder", 1024, 16384, 32, 768, mode="forward+backward")
    yield Target(step, "F.linear forward", 1 / 0.7, at_most=True)
    whole = replace(step, mode="forward+backward+optimizer")
    yield Target(whole, "F.linear forward", 1 / 0.8, at_most=True)
    for autocast, bars in (("", (4, 9, 9)), ("bfloat16", (1.5, 5, 5))):
        cast = replace(step, autocast=autocast)
        for peer, bar in zip(STEP_PEERS, bars, strict=True):
            yield Target(cast, peer, bar)
    wide = replace(step, n=131072, k=64)
    yield Target(wide, "F.linear forward", beyond_gradients=128 * MIB)
    adam = Workload("adam_step", n=16384, d=768)
    yield Target(adam, "fused Adam, projection, normalization", 1.5)


def _vae_sae() -> Iterable[Target]:
    for units, bar in ((500, None), (16384, 2)):
        layer = Workload("SparseBottleneck", 256, units, 50, 256, mode="forward+backward")
        yield Target(layer, "the reference", bar)
        yield Target(layer, "linear, topk, scatter, matmul")
    for k in (500, 50):
        step = Workload("VAE-SAE step", 256, 500, k, 256, mode="forward+backward+optimizer")
        yield Target(step, "the reference", 1)


def _sparling() -> Iterable[Target]:
    small = Workload("channel_threshold", 10, channels=10, positions=10_000, density=5e-5)
    large = Workload("channel_threshold", 8, channels=32, positions=43_200, density=1e-5)
    cases = (
        small,
        replace(small, layout="column-major"),
        replace(large, layout="column-major"),
    )
    for case in cases:
        yield Target(case, "torch.kthvalue", 15)
    for case in cases:
        layer = replace(case, op="SpatialSparsity", mode="forward+backward")
        yield Target(layer, "batch_norm, kthvalue, relu", 3)
    conv = Workload(
        "pointwise_conv", 10, channels=10, positions=10_000, outputs=512, density=CONV_DENSITY,
        layout="column-major", mode="forward+backward",
    )  # fmt: skip
    yield Target(conv, "F.conv2d", 5)


def activation_store(rows: int, features: int, batch_size: int, dtype: str, pages: str) -> Target:
    """An epoch of shuffled batches from a float16 file [rows, features], as float16 or float32;
    pages: "dropped" from the system's cache before each pass, or "cached", which has no bar."""
    workload = Workload(
        "ActivationStore", batch_size, file_rows=rows, d=features, dtype="float16",
        mode=f"to {dtype}", fill=f"pages {pages}",
    )  # fmt: skip
    bar = 0.5 if pages == "dropped" else None
    return Target(workload, "h5py in order", bar, backend="none", command=STORE)


def _store() -> Iterable[Target]:
    for dtype in ("float16", "float32"):
        yield activation_store(STORE_BYTES // (2 * 768), 768, 4096, dtype, "dropped")


def _accelerated() -> Iterable[Target]:
    bars = {"sae-lens": 4, "dictionary-learning": 4, "eai-sparsify": 1.8}
    for mode in ("forward+backward", "forward+backward+optimizer"):
        for rows, n in ((1024, 16384), (128, 131072)):
            for peer, bar in bars.items():
                step = Workload("accelerate", rows, n, 32, 768, mode=mode)
                # Optimizers and projections are the library's: they take the same time.
                required = bar if mode == "forward+backward" else None
                yield Target(step, peer, required, command=ACCELERATED)


def _gpu() -> Iterable[Target]:
    for backend in ("native", "triton"):
        for dtype in ("float32", "bfloat16"):
            rows = _topk((4096, 65536, 64), dtype=dtype, device="cuda")
            yield Target(rows, "torch.topk", 8, roof_bar=0.6, backend=backend)
        codes = _product((4096, 64, 65536, 4096), dtype="bfloat16", device="cuda")
        yield Target(codes, "dense product", 4, backend=backend)
        backward = replace(codes, mode="backward")
        yield Target(backward, "two dense products", 4, backend=backend)
        encoder = Workload("linear_topk", 8192, 131072, 64, 4096, dtype="bfloat16", device="cuda")
        yield Target(encoder, "F.linear", 1 / 1.15, at_most=True, backend=backend)
        screened = Workload("linear_topk", 8192, 32768, 64, 2048, fill=SCREENED, device="cuda")
        yield Target(screened, "F.linear", backend=backend)
    step = Workload(
        "training step", 8192, 131072, 64, 4096,
        mode="forward+backward+optimizer", device="cuda", autocast="bfloat16",
    )  # fmt: skip
    yield Target(step, "eai-sparsify", 2)
    yield Target(step, "dense, compiled", 3.5)
    widest = Workload(
        "SparseAutoencoder", 1024, 2**20, 64, 4096,
        dtype="bfloat16", mode="forward+backward", device="cuda",
    )  # fmt: skip
    yield Target(widest, "F.linear forward")


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
    step = Workload("training step", 512, 8192, 32, 512, mode="forward+backward+optimizer")
    yield Target(step, "dense, compiled")
    yield Target(step, "eai-sparsify")
    yield Target(Workload("count_active", 4096, 65536, 64), "torch.bincount")


ACCELERATED_TARGETS = tuple(_accelerated())
CPU_TARGETS = (
    *_cpu(), *_autoencoder(), *_vae_sae(), *_sparling(), *_store(), *ACCELERATED_TARGETS,
)  # fmt: skip
GPU_TARGETS = tuple(_gpu())
TARGETS = CPU_TARGETS + GPU_TARGETS
EXTRAS = tuple(_extras())


def by_workload(targets: Iterable[Target]) -> dict[Workload, list[Target]]:
    """Lines that share a workload are measured in one interleaved loop."""
    groups: dict[Workload, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.workload, []).append(target)
    return groups


def usable(targets: Iterable[Target]) -> tuple[list[Target], list[str]]:
    """The targets whose peers can be used here, and a sentence for each peer that cannot."""
    kept, left_out = [], {}
    for target in targets:
        reason = peers.trouble(target.peer)
        if reason is None:
            kept.append(target)
        else:
            left_out[target.peer] = f"the lines against {target.peer} are left out: {reason}"
    return kept, list(left_out.values())
