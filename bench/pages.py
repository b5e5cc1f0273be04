"""Rewrite what the README and the documentation show of the committed rows.

    python bench/pages.py           after new rows; bench/run.py does it, too
    python bench/pages.py --check   change nothing; exit code 1 where something is out of date

The tables stand between marks in README.md and docs/benchmarks.md, the figures in docs/figures.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rows import load
from table import Line, newest, origins, provenance
from targets import CPU_TARGETS, GPU_TARGETS, ITSELF

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
# The lines of the README's table: operation, mode, and peer, each with the reader's words for both.
HEADLINES = (
    ("topk", "forward", "torch.topk", "k largest of a row"),
    ("TopK", "forward+backward", "torch.topk, relu, scatter", "top-k layer, with gradient"),
    (
        "sparse_matmul",
        "forward+backward",
        "embedding_bag",
        "codes times dictionary, and gradients",
    ),
    ("SparseAutoencoder", "forward+backward", "eai-sparsify", "SAE training step"),
    ("SparseAutoencoder", "forward+backward", "dictionary-learning", "SAE training step"),
    ("SparseAutoencoder", "forward+backward", "sae-lens", "SAE training step"),
    ("adam_step", "forward", "fused Adam, projection, normalization", "Adam, unit-norm dictionary"),
    ("channel_threshold", "forward", "torch.kthvalue", "quantile of each channel"),
    ("pointwise_conv", "forward+backward", "F.conv2d", "1x1 convolution of few activations"),
)
SECTIONS = (
    ("Top-k, masks and counts", ("topk", "topk_mask", "TopK", "count_active")),
    ("Products of codes", ("sparse_matmul",)),
    ("Encoder, autoencoder, optimizer", ("linear_topk", "SparseAutoencoder", "adam_step")),
    ("Sparse bottleneck and VAE-SAE", ("SparseBottleneck", "VAE-SAE step")),
    ("Sparsity in space", ("channel_threshold", "SpatialSparsity", "pointwise_conv")),
    ("Reading activations", ("ActivationStore",)),
)
STEP = ("SparseAutoencoder", 1024, 768, 16384, 32)
STEP_PEERS = ("eai-sparsify", "dictionary-learning", "sae-lens")

# Dark mode: that of the system where the figure is a picture, that of the site where it is a part
# of a page (docs/style/site.css).
STYLE = """\
<style>
.rows{--ink:#1f2328;--faint:#59636e;--ours:#0b7285;--other:#868e96;--line:#d1d9e0}
@media(prefers-color-scheme:dark){
.rows{--ink:#e6edf3;--faint:#9da7b1;--ours:#3bc9db;--other:#868e96;--line:#3d444d}}
.rows{font:14px system-ui,sans-serif}.rows text{fill:var(--ink)}
.rows .faint{fill:var(--faint);font-size:12px}.rows .head{font-weight:600}
.rows .ours{fill:var(--ours)}.rows .other{fill:var(--other)}.rows .axis{stroke:var(--line)}
</style>"""


# -- tables ----------------------------------------------------------------------------------------


def measured(lines: Iterable[Line], op: str, mode: str, peer: str) -> list[Line]:
    """The lines of an operation and a peer that have a time."""
    return [
        line
        for line in lines
        if line.row
        and not line.row["refused"]
        and (line.target.workload.op, line.target.workload.mode, line.target.peer)
        == (op, mode, peer)
    ]


def spread(ratios: Sequence[float]) -> str:
    """The least and the largest ratio, or the only one."""
    least, largest = (f"{ratio:.{1 if ratio < 10 else 0}f}" for ratio in (min(ratios), max(ratios)))
    return f"{least}x" if least == largest else f"{least}x to {largest}x"


def headlines(lines: Sequence[Line]) -> str:
    """The README's table: the range of the ratios over the sizes and dtypes measured."""
    text = ["| | compared with | times as fast |", "| --- | --- | --- |"]
    for op, mode, peer, words in HEADLINES:
        ratios = [line.row["ratio"] for line in measured(lines, op, mode, peer) if line.row]
        text.append(f"| {words} (`{op}`) | {peer} | {spread(ratios)} |")
    (where,) = {provenance(lines)[0].split(", commit")[0]}
    return "\n".join([*text, "", f"Over all sizes and dtypes measured; {where}."])


def section(title: str, lines: Sequence[Line]) -> str:
    """A table of the documentation's page, with a heading."""
    header = (
        "operation", "case", "ours", "compared with", "its time", "ratio", "required", "roofline",
        "peak memory", "its peak",
    )  # fmt: skip
    text = [f"### {title}", "", f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for line in lines:
        cells = list(line.cells())
        verdict = cells.pop(7)
        cells[6] += ": **missed**" * (verdict == "MISSED")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def gpu_section(lines: Sequence[Line]) -> str:
    """What is waiting for a GPU, or what was measured there."""
    if any(line.row for line in lines):
        return section("On a GPU", lines)
    text = [
        "### On a GPU: not measured",
        "",
        "| operation | case | to be compared with | required |",
    ]
    text.append("| --- | --- | --- | --- |")
    for line in lines:
        operation, case, _, peer, _, _, required, *_ = line.cells()
        text.append(f"| {operation} | {case} | {peer} | {required} |")
    return "\n".join(text)


def speed(cpu: Sequence[Line], gpu: Sequence[Line]) -> str:
    """All tables of docs/benchmarks.md."""
    parts = []
    for title, operations in SECTIONS:
        chosen = [line for line in cpu if line.target.workload.op in operations]
        parts.append(section(title, [line for line in chosen if line.target.peer != ITSELF]))
        hard = [line for line in chosen if line.target.peer == ITSELF]
        if hard:
            parts.append(section("Hard inputs", hard))
    barred = [line for line in (*cpu, *gpu) if line.target.required and line.row is not None]
    reached = sum(line.good for line in barred)
    sources = [*provenance([*cpu, *gpu]), *origins([*cpu, *gpu])]
    sources.append(f"{reached} of {len(barred)} requirements are met.")
    return "\n\n".join([*parts, gpu_section(gpu), " ".join(sources)])


# -- figures ---------------------------------------------------------------------------------------


def drawing(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    """An SVG with the style of all figures."""
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="rows" viewBox="0 0 {width} {height}" '
        f'width="{width}" role="img" aria-label="{escape(label)}">'
    )
    return "\n".join([opening, STYLE, *parts, "</svg>\n"])


def written(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text in a drawing."""
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{kind} text-anchor="{anchor}">{escape(text)}</text>'


def training_step(lines: Sequence[Line]) -> str:
    """Bars of the time of a training step, ours and the peers', in each precision."""
    op, rows, features, latents, k = STEP
    parts = [
        written(0, 18, "Training step of a sparse autoencoder", "head"),
        written(0, 38, f"{rows} tokens, {features} features, {latents} latents, k = {k};", "faint"),
        written(0, 54, "forward and backward, milliseconds: shorter is better", "faint"),
    ]
    y, left, right = 84, 140, 400
    for autocast, title in (("", "float32"), ("bfloat16", "bfloat16 autocast")):
        found = {
            line.target.peer: line.row
            for line in lines
            if line.row
            and line.target.peer in STEP_PEERS
            and line.target.workload.autocast == autocast
            and line.target.workload.op == op
        }
        ours = {row["median_ms"] for row in found.values()}
        assert len(ours) == 1, f"{title}: measured in one loop, or the bars are of several runs"
        bars = [("sparsekern", ours.pop())]
        bars += [(peer, found[peer]["peer_median_ms"]) for peer in STEP_PEERS]
        longest = max(time for _, time in bars)
        parts.append(written(0, y, title, "head"))
        for name, time in bars:
            y += 26
            length = max(2.0, (right - left) * time / longest)
            kind = "ours" if name == "sparsekern" else "other"
            parts.append(written(0, y, name))
            parts.append(
                f'<rect class="{kind}" x="{left}" y="{y - 14}" width="{length:.1f}" height="18"/>'
            )
            parts.append(written(left + length + 8, y, f"{time:.0f}"))
        y += 40
    cpu = next(line.row for line in lines if line.row)
    parts.append(written(0, y - 8, f"{cpu['cpu']}, {cpu['threads']} threads", "faint"))
    return drawing(480, y, "Time of a training step: sparsekern and three libraries", parts)


def ratios(lines: Sequence[Line]) -> str:
    """A dot for each line of the table, by operation and peer, on a logarithmic axis."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for line in lines:
        if line.row and not line.row["refused"] and line.target.peer != ITSELF:
            work = line.target.workload
            groups.setdefault((work.op, work.mode, line.target.peer), []).append(line.row["ratio"])
    left, right, step, top = 228, 470, 40, 80
    low, high = math.log10(0.6), math.log10(200)

    def place(ratio: float) -> float:
        return left + (right - left) * (math.log10(ratio) - low) / (high - low)

    bottom = top + step * len(groups)
    parts = [
        written(0, 18, "Peer's time / our time, a dot for each case", "head"),
        written(0, 36, "operation, and below it what it is compared with", "faint"),
    ]
    for tick in (1, 10, 100):
        x = place(tick)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 14}" y2="{bottom - 10}"/>'
        )
        parts.append(written(round(x, 1), top - 20, f"{tick}x", "faint", "middle"))
    for at, ((op, mode, peer), values) in enumerate(groups.items()):
        y = top + step * at
        name = op if mode in ("forward", "forward+backward+optimizer") else f"{op}, {mode}"
        parts.append(written(0, y, name.replace("forward+backward", "with gradient")))
        parts.append(written(0, y + 15, peer, "faint"))
        for value in values:
            parts.append(f'<circle class="ours" cx="{place(value):.1f}" cy="{y}" r="5"/>')
    return drawing(480, bottom, "Ratios of the speed table", parts)


# -- files -----------------------------------------------------------------------------------------


def between_marks(text: str, name: str, content: str) -> str:
    """A page with what stands between `<!-- rows: name -->` and the next end mark replaced."""
    pattern = re.compile(rf"(<!-- rows: {name} -->\n).*?(<!-- end rows -->)", re.DOTALL)
    changed, count = pattern.subn(lambda m: f"{m[1]}\n{content}\n\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"between_marks: the page must have the marks of {name} once, got {count}")
    return changed


def pages(root: Path = ROOT, results: Path = RESULTS) -> dict[Path, str]:
    """Every file that shows rows, with the content that it should have."""
    found = newest(load(results))
    cpu = [Line(target, found.get(target.key)) for target in CPU_TARGETS]
    gpu = [Line(target, found.get(target.key)) for target in GPU_TARGETS]
    readme, benchmarks = root / "README.md", root / "docs" / "benchmarks.md"
    return {
        readme: between_marks(readme.read_text(), "headlines", headlines(cpu)),
        benchmarks: between_marks(benchmarks.read_text(), "speed", speed(cpu, gpu)),
        root / "docs" / "figures" / "training-step.svg": training_step(cpu),
        root / "docs" / "figures" / "ratios.svg": ratios(cpu),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Rewrite the pages that show committed rows.")
    parser.add_argument("--check", action="store_true", help="change nothing, name what is old")
    options = parser.parse_args(arguments)
    old = {
        path: content
        for path, content in pages().items()
        if not path.exists() or path.read_text() != content
    }
    for path, content in old.items():
        sys.stdout.write(f"{path.relative_to(ROOT)} {'is out of date' * options.check}\n")
        if not options.check:
            path.write_text(content)
    return 1 if old and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
