"""Draw the figures of how-topk-works.md: run as a script, it writes them beside itself.

The regimes' limits are those of csrc/cpu/topk/regimes.h, csrc/cuda/topk/regimes.h and
sparsekern/ops/topk/triton.py.
"""

from __future__ import annotations

import math
import pathlib
import random

FOLDER = pathlib.Path(__file__).parent
STYLE = """<style>
.rows{--ink:#1f2328;--faint:#59636e;--ours:#0b7285;--other:#868e96;--line:#d1d9e0;\
font:13px system-ui,sans-serif}
@media(prefers-color-scheme:dark){.rows{--ink:#e6edf3;--faint:#9da7b1;--ours:#3bc9db;\
--other:#868e96;--line:#3d444d}}
.rows text{fill:var(--ink)}.rows .head{font-weight:600}
.rows .faint{fill:var(--faint);font-size:11px}
.rows .cell{fill:none;stroke:var(--line)}.rows .dot{fill:var(--other)}
.rows .taken{fill:var(--ours)}.rows .edge{fill:none;stroke:var(--other)}
.rows .bound{fill:none;stroke:var(--ours);stroke-width:2}
.rows .area{fill:var(--ours);fill-opacity:.14;stroke:var(--ours)}
.rows .area.plain{fill:none;stroke:var(--other)}
</style>"""


def figure(name: str, width: int, height: int, label: str, parts: list[str]) -> None:
    """Write one SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="rows" viewBox="0 0 {width} {height}" '
        f'width="{width}" role="img" aria-label="{label}">'
    )
    (FOLDER / name).write_text("\n".join([head, STYLE, *parts, "</svg>"]) + "\n")


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:g}" height="{height:g}"/>'


def dot(x: float, y: float, kind: str, radius: float = 3) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>'


def draw_groups() -> None:
    """Draw a segment of 5 blocks, 4 vectors of 8 lanes each, its maxima and the bound for k = 6."""
    blocks, vectors, lanes, k, side = 5, 4, 8, 6, 14
    draw = random.Random(56)
    x = [[[draw.gauss(0, 1) for _ in range(lanes)] for _ in range(vectors)] for _ in range(blocks)]
    maxima = [[max(vector[lane] for vector in block) for lane in range(lanes)] for block in x]
    bound = sorted((m for block in maxima for m in block), reverse=True)[k - 1]
    parts = [text(8, 20, "elements of a segment: block after block, vector below vector", "faint")]
    for b, block in enumerate(x):
        left = 8 + b * (lanes * side + 16)
        read_again = any(m >= bound for m in maxima[b])
        for v, vector in enumerate(block):
            for lane, value in enumerate(vector):
                place = left + lane * side, 30 + v * side
                parts.append(rectangle(*place, side, side, "cell"))
                if value >= bound:
                    parts.append(dot(place[0] + side / 2, place[1] + side / 2, "taken"))
        parts.append(text(left, 30 + vectors * side + 20, f"block {b}: maxima", "faint"))
        for lane, value in enumerate(maxima[b]):
            place = left + lane * side, 30 + vectors * side + 26
            parts.append(rectangle(*place, side, side, "cell"))
            kind = "taken" if value >= bound else "dot"
            size = 3 if value >= bound else 1.5
            parts.append(dot(place[0] + side / 2, place[1] + side / 2, kind, size))
        if read_again:
            parts.append(rectangle(left - 3, 27, lanes * side + 6, vectors * side + 6, "bound"))
    found = sum(value >= bound for block in x for vector in block for value in vector)
    foot = 30 + vectors * side + 62
    parts += [
        dot(14, foot - 4, "taken"),
        text(24, foot, f"reaches the bound t, the {k}th largest maximum: {found} candidates"),
        rectangle(8, foot + 10, 16, 12, "bound"),
        text(30, foot + 21, "reaches t somewhere, and is read again, from the cache"),
    ]
    width = 8 + blocks * (lanes * side + 16)
    figure("topk-groups.svg", width, foot + 32, "A lower bound from the maxima of groups", parts)


def draw_rising_bound() -> None:
    """Draw a row read in chunks: candidates, and the bound that only rises."""
    n, chunk, k, width, height = 640, 80, 8, 620, 220
    draw = random.Random(5)
    x = [draw.gauss(0, 1) for _ in range(n)]
    left, top, low, high = 30, 24, -3.4, 4.1

    def place(i: float, value: float) -> tuple[float, float]:
        return left + i * (width - left - 10) / n, top + (high - value) / (high - low) * height

    parts, path, bound = [], [], low
    kept: list[float] = []
    for begin in range(0, n, chunk):
        part = x[begin : begin + chunk]
        hits = [i for i in range(begin, begin + chunk) if x[i] > bound]
        for i in range(begin, begin + chunk):
            kind, size = ("taken", 2.6) if i in hits else ("dot", 1.3)
            parts.append(dot(*place(i, x[i]), kind, size))
        if begin:
            path += [place(begin, bound), place(begin + chunk, bound)]
        kept = sorted([*kept, *part], reverse=True)[:k]
        bound = kept[-1]
        edge = place(begin, 0)[0]
        parts.append(
            f'<path class="edge" stroke-dasharray="2 4" d="M{edge:g} {top}V{top + height}"/>'
        )
    line = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in path)
    parts.append(f'<path class="bound" d="{line}"/>')
    parts += [
        text(left, 14, f"a row in chunks, k = {k}: the bound is the last of the best {k} so far"),
        text(
            left, top + height + 18, "everything is a candidate in the first chunk; few are later"
        ),
    ]
    figure("topk-bound.svg", width, top + height + 28, "The bound rises, chunk by chunk", parts)


# Regions by their corners (n, k), k <= n.
MOST = 2**20
PANELS = {
    "CPU": {
        "ranked": [(1, 1), (64, 1), (64, 64)],
        "candidates": [(64, 1), (MOST, 1), (MOST, 512), (3072, 512), (64, 64 / 6)],
        "halving": [(64, 64 / 6), (3072, 512), (MOST, 512), (MOST, MOST), (64, 64)],
    },
    "CUDA": {
        "short": [(1, 1), (512, 1), (512, 16), (2048, 64), (2048, 2048)],
        "candidates": [(512, 1), (MOST, 1), (MOST, 512), (2048, 512), (2048, 64), (512, 16)],
        "shared": [(2048, 512), (32768, 512), (32768, 4096), (4096, 4096), (2048, 2048)],
        "digits": [(32768, 512), (MOST, 512), (MOST, MOST), (4096, 4096), (32768, 4096)],
    },
    "Triton": {
        "one program": [(1, 1), (8192, 1), (8192, 8192)],
        "slices": [(8192, 1), (MOST, 1), (MOST, 4096), (8192, 4096)],
        "passes": [(8192, 4096), (MOST, 4096), (MOST, MOST), (8192, 8192)],
    },
}


def draw_regimes() -> None:
    """Draw which regime takes which n and k, in logarithms, for each language."""
    side, parts = 190, []

    def at(left: float, n: float, k: float) -> tuple[float, float]:
        return left + math.log2(n) * side / 20, 30 + side - math.log2(k) * side / 20

    for panel, (language, regions) in enumerate(PANELS.items()):
        left = 44 + panel * (side + 44)
        parts.append(text(left + side / 2, 18, language, "head", "middle"))
        for name, corners in regions.items():
            points = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(left, *c) for c in corners))
            kind = "area" if name in ("candidates", "slices") else "area plain"
            parts.append(f'<polygon class="{kind}" points="{points}"/>')
        for words, n, k in LABELS[language]:
            parts.append(text(*at(left, n, k), words, "faint", "middle"))
        for power in (0, 5, 10, 15, 20):
            x, y = at(left, 2**power, 2**power)
            parts.append(text(x, 30 + side + 14, f"2^{power}", "faint", "middle"))
            if panel == 0:
                parts.append(text(left - 6, y + 4, f"2^{power}", "faint", "end"))
        parts.append(text(left + side / 2, 30 + side + 30, "n", "faint", "middle"))
    parts.append(text(8, 14, "k", "faint"))
    figure("topk-regimes.svg", 44 + 3 * (side + 44) - 20, 30 + side + 38, "Regimes", parts)


# Where the words stand: words, n, k.
LABELS = {
    "CPU": [("ranked", 2**4, 2**0.5), ("candidates", 2**14, 2**4), ("halving", 2**17, 2**12)],
    "CUDA": [
        ("short", 2**7.5, 2**3),
        ("candidates", 2**15.5, 2**4),
        ("shared", 2**13.2, 2**10.2),
        ("digits", 2**17.6, 2**12.4),
    ],
    "Triton": [
        ("one program", 2**8.8, 2**3),
        ("slices", 2**16.5, 2**5),
        ("passes", 2**17.6, 2**14),
    ],
}


if __name__ == "__main__":
    draw_groups()
    draw_rising_bound()
    draw_regimes()
