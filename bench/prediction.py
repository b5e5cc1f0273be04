"""What a step of training would take on many GPUs: a model, with the committed rows of one H200.

Nothing here was measured on more than one GPU. A process's work is taken from the rows; messages
take alpha + bytes / beta on links of stated speeds. docs/distributed.md says what is left out.

Links, per GPU and direction:

* in a node of 8: NVLink 4, 900 GB/s in both directions together (NVIDIA, page of the H200, 2023);
* between nodes: one ConnectX-7 port, InfiniBand NDR of 400 Gb/s (NVIDIA, DGX BasePOD reference
  architecture, core components, DGX H200, read on 2026-11-28).

Latencies are those that NCCL itself plans with for rings of large messages (src/graph/tuning.cc
at commit 01afd20, read on 2026-11-28): 8.4 us, and 3.4 us a step in a node, 9.6 us between nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rows import Row

from sparsekern.benchmarks.figures import drawing, written

NODE, NVLINK, NETWORK = 8, 450e9, 50e9
BASE, NVLINK_STEP, NETWORK_STEP = 8.4e-6, 3.4e-6, 9.6e-6
GPUS = tuple(8 * 2**i for i in range(7))
ROWS, FEATURES, K = 8192, 4096, 64
WEIGHT = 4  # bytes
# Adam reads weight, gradient and two moments, and writes all but the gradient.
ADAM_BYTES = 7 * WEIGHT
KINDS = {
    "latents": "latents shared out",
    "both": "latents and rows",
    "replicas": "replicas",
    "dense": "replicas, dense",
}


class Work(NamedTuple):
    """Seconds of a step on one GPU: of all, and of Adam in it, for N latents."""

    latents: int
    step: float
    adam: float
    dense_step: float | None


class Group(NamedTuple):
    """GPUs that exchange something: how many in each node, and how many nodes."""

    in_node: int
    nodes: int

    @property
    def size(self) -> int:
        """Number of GPUs."""
        return self.in_node * self.nodes

    def all_reduce(self, size: float) -> float:
        """Return the seconds in which all GPUs sum up so many bytes, in the node, then between."""
        if self.size == 1:
            return 0.0
        steps = (self.in_node - 1) * NVLINK_STEP + (self.nodes - 1) * NETWORK_STEP
        inside = (self.in_node - 1) / self.in_node * size / NVLINK
        between = (self.nodes - 1) / self.nodes * size / self.in_node / NETWORK
        return BASE + 2 * (steps + inside + between)

    def all_gather(self, size: float) -> float:
        """Return the seconds in which all GPUs get so many bytes from each, between nodes first."""
        if self.size == 1:
            return 0.0
        steps = (self.in_node - 1) * NVLINK_STEP + (self.nodes - 1) * NETWORK_STEP
        between = (self.nodes - 1) * size / NETWORK
        inside = (self.in_node - 1) * self.nodes * size / NVLINK
        return BASE + steps + between + inside


def works(rows: Sequence[Row]) -> list[Work]:
    """Return the work of a step on one H200 for each number of latents that has rows."""

    def row_of(op: str, latents: int, peer: str) -> Row:
        keys = {"op": op, "n": latents, "d": FEATURES, "k": K, "backend": "native", "peer": peer}
        found = [r for r in rows if all(r[key] == value for key, value in keys.items())]
        return max(found, key=lambda r: r["date"])

    def adam(latents: int, row: Row) -> float:
        return float(2 * latents * FEATURES * ADAM_BYTES / (row["roofline"]["copy"] * 1e9))

    step = row_of("training step", 131072, "dense, compiled")
    wide = row_of("SparseAutoencoder", 1 << 20, "F.linear forward")
    own_adam = adam(1 << 20, wide)
    gradients = wide["median_ms"] / 1e3 * ROWS / wide["rows"]
    return [
        Work(131072, step["median_ms"] / 1e3, adam(131072, step), step["peer_median_ms"] / 1e3),
        Work(1 << 20, gradients + own_adam, own_adam, None),
    ]


def seconds(work: Work, gpus: int, sharing: int, *, dense: bool = False) -> float | None:
    """Return the seconds of a step of ROWS rows on so many GPUs.

    sharing: the number of GPUs that share out the latents; each group of so many has other rows.
    1: replicas.
    """
    whole = work.dense_step if dense else work.step
    if whole is None:
        return None
    replicas = gpus // sharing
    shared = Group(min(sharing, NODE), -(-sharing // NODE))
    in_node = min(replicas, max(1, NODE // sharing))
    others = Group(in_node, replicas // in_node)
    rows = ROWS / replicas
    own = (whole - work.adam) / gpus + work.adam / sharing
    messages = (
        shared.all_gather(2 * WEIGHT * rows * K),
        shared.all_reduce(WEIGHT * rows * FEATURES),
        shared.all_reduce(WEIGHT * FEATURES),
        others.all_reduce(2 * WEIGHT * work.latents * FEATURES / sharing),
    )
    return own + sum(messages)


def predicted(work: Work) -> dict[str, list[tuple[int, float, int]]]:
    """Return for each kind of step: GPUs, seconds, and how many GPUs share out the latents."""
    found: dict[str, list[tuple[int, float, int]]] = {kind: [] for kind in KINDS}
    for gpus in GPUS:
        splits = [2**i for i in range(1, int(math.log2(gpus)))]
        sharings = {"latents": [gpus], "both": splits, "replicas": [1], "dense": [1]}
        for kind, some in sharings.items():
            times = [(seconds(work, gpus, s, dense=kind == "dense"), s) for s in some]
            known = [(time, s) for time, s in times if time is not None]
            if known:
                found[kind].append((gpus, *min(known)))
    return found


def prediction_table(rows: Sequence[Row]) -> str:
    """Write the steps of all kinds as a table."""
    header = ["latents", "GPUs", *(f"{words}, ms" for words in KINDS.values())]
    text = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    remarks = []
    for work in works(rows):
        found = predicted(work)
        for at, gpus in enumerate(GPUS):
            cells = [f"{work.latents:,}", str(gpus)]
            for kind, steps in found.items():
                split = f" ({gpus // steps[at][2]} x {steps[at][2]})" if kind == "both" else ""
                cells.append(f"{1e3 * steps[at][1]:.1f}{split}" if steps else "")
            text.append(f"| {' | '.join(cells)} |")
        shared, both = found["latents"], found["both"]
        crossed = [one[0] for one, other in zip(shared, both, strict=True) if other[1] < one[1]]
        ratios = [other[1] / one[1] for one, other in zip(shared, found["replicas"], strict=True)]
        until = f"from {crossed[0]} GPUs on" if crossed else "nowhere"
        remarks.append(
            f"{work.latents:,} latents: on one GPU {1e3 * work.step:.1f} ms, of which Adam "
            f"{1e3 * work.adam:.1f}; replicas take {min(ratios):.0f} to {max(ratios):.0f} times as "
            f"long as shared latents; splitting the rows, too, is faster {until}."
        )
    return "\n".join([*text, "", " ".join(remarks)])


def predicted_steps(rows: Sequence[Row]) -> str:
    """Draw the predicted steps of the smaller problem over the number of GPUs, as lines."""
    work = works(rows)[0]
    left, right, top, bottom = 44, 330, 84, 330
    low, high = math.log10(0.5), math.log10(100)
    title = "Predicted step on 8 to 512 GPUs, milliseconds"

    def x_of(gpus: int) -> float:
        return left + (right - left) * math.log2(gpus / GPUS[0]) / math.log2(GPUS[-1] / GPUS[0])

    def y_of(time: float) -> float:
        return bottom - (bottom - top) * (math.log10(1e3 * time) - low) / (high - low)

    size = f"{ROWS} tokens, {FEATURES} features, {work.latents} latents, k = {K};"
    parts = [
        written(0, 18, title, "head"), written(0, 38, size, "faint"),
        written(0, 54, "a model: only one GPU's work was measured", "faint"),
    ]  # fmt: skip
    for time in (1, 10, 100):
        y = y_of(time / 1e3)
        parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(written(left - 8, round(y + 4, 1), str(time), "faint", "end"))
    for gpus in GPUS:
        parts.append(written(round(x_of(gpus), 1), bottom + 18, str(gpus), "faint", "middle"))
    lines = sorted(predicted(work).items(), key=lambda line: -line[1][-1][1])
    above = -math.inf  # the label before, so that none covers another
    for kind, steps in lines:
        points = " ".join(f"{x_of(gpus):.1f},{y_of(time):.1f}" for gpus, time, _ in steps)
        color = "ours" if kind in ("latents", "both") else "other"
        dashes = ";stroke-dasharray:5 4" if kind in ("both", "dense") else ""
        style = f"fill:none;stroke:var(--{color});stroke-width:2{dashes}"
        parts.append(f'<polyline points="{points}" style="{style}"/>')
        above = max(y_of(steps[-1][1]) + 4, above + 16)
        parts.append(written(right + 8, round(above, 1), KINDS[kind], "faint"))
    return drawing(bottom + 28, title, parts)
