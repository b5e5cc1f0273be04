"""Which workloads ``sparsekern bench`` measures, and against what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import peers
from .workload import Workload

TORCH = "torch"
"""The group of everything that is compared with torch alone."""

# Features, latents and active ones of dictionaries that people train.
DICTIONARIES = (
    (768, 16384, 32), (768, 32768, 16), (2304, 65536, 64), (4096, 65536, 128), (4096, 131072, 160),
)  # fmt: skip
BATCHES = (1024, 8, 1, 64, 8192)
STEP_BATCHES = (1024, 128, 8192)


@dataclass(frozen=True)
class Job:
    """A workload beside its peers; the jobs of a group share a process."""

    workload: Workload
    others: tuple[str, ...]
    group: str = TORCH


def quick(device: str) -> list[Job]:
    """Return the headlines: each kernel once at an ordinary size, and a training step."""
    if device == "cuda":
        encoder = Workload("linear_topk", 4096, 65536, 64, 2048, dtype="bfloat16")
        product = Workload("sparse_matmul", 4096, 65536, 64, 2048, dtype="bfloat16")
        rows = Workload("topk", 4096, 65536, 64)
        layer = Workload("TopK", 4096, 16384, 64, mode="forward+backward")
        step = Workload("SparseAutoencoder", 4096, 65536, 64, 2048, autocast="bfloat16")
        adam = Workload("adam_step", n=65536, d=2048)
        dense = ("dense product",)
    else:
        encoder = Workload("linear_topk", 512, 16384, 32, 768)
        product = Workload("sparse_matmul", 1024, 16384, 32, 768)
        rows = Workload("topk", 512, 16384, 32)
        layer = Workload("TopK", 512, 16384, 32, mode="forward+backward")
        step = Workload("SparseAutoencoder", 512, 16384, 32, 768)
        adam = Workload("adam_step", n=16384, d=768)
        dense = ("embedding_bag",)
    step = replace(step, mode="forward+backward")
    jobs = [
        Job(rows, ("torch.topk",)),
        Job(replace(rows, dtype="bfloat16"), ("torch.topk",)),
        Job(layer, ("torch.topk, relu, scatter",)),
        Job(product, dense),
        Job(encoder, ("F.linear", "F.linear, torch.topk")),
        Job(adam, ("fused Adam, projection, normalization",)),
        *(Job(step, (name,), name) for name in peers.NAMES),
    ]
    return [replace(job, workload=replace(job.workload, device=device)) for job in jobs]


def sweep(device: str) -> list[Job]:
    """Return the sizes people train; a sweep that is cut short has seen each kind."""
    return [
        replace(job, workload=replace(job.workload, device=device))
        for number in range(len(DICTIONARIES))
        for job in _of_dictionary(number, device)
    ]


def _of_dictionary(number: int, device: str) -> Iterator[Job]:
    """Yield the jobs of one size of dictionary."""
    d, n, k = DICTIONARIES[number]
    for batch in BATCHES:
        for dtype in ("float32", "bfloat16"):
            yield Job(Workload("topk", batch, n, k, dtype=dtype), ("torch.topk",))
        product = "dense product" if device == "cuda" else "embedding_bag"
        both = "two dense products" if device == "cuda" else "embedding_bag"
        codes = Workload("sparse_matmul", batch, n, k, d)
        yield Job(codes, (product,))
        yield Job(replace(codes, mode="backward"), (both,))
        encoder = Workload("linear_topk", batch, n, k, d)
        yield Job(encoder, ("F.linear", "F.linear, torch.topk"))
    yield Job(Workload("adam_step", n=n, d=d), ("fused Adam, projection, normalization",))
    autocast = "bfloat16" if device == "cuda" else ""
    for batch in STEP_BATCHES:
        step = Workload(
            "SparseAutoencoder", batch, n, k, d, mode="forward+backward", autocast=autocast
        )
        yield from (Job(step, (name,), name) for name in peers.NAMES)


def needed_bytes(workload: Workload) -> int:
    """Return about how much memory a workload takes, ours and a peer's together."""
    rows, n, d, k = workload.rows, workload.n, workload.d, workload.k
    scores, matrix = 4 * rows * n, 4 * n * d
    if workload.op == "SparseAutoencoder":
        return 10 * matrix + 5 * scores
    if workload.op == "sparse_matmul":
        return 6 * matrix + 2 * scores + 8 * rows * k * d
    if workload.op == "adam_step":
        return 14 * matrix
    return 3 * matrix + 4 * scores


def seconds_of_a_round(workload: Workload, flops: float) -> float:
    """Return about how long ours and a peer take once, with a product at `flops` a second."""
    passes = {"linear_topk": 3, "SparseAutoencoder": 8}.get(workload.op, 0)
    return passes * 2 * workload.rows * workload.n * workload.d / flops
