"""Pictures of measurements as SVG, with nothing but Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .measure import Row

# Narrow, so that it can be read on a phone.
WIDTH = 480
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


def drawing(height: float, label: str, parts: Sequence[str]) -> str:
    """Put parts into an SVG with the style of all figures."""
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="rows" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" role="img" aria-label="{escape(label)}">'
    )
    return "\n".join([opening, STYLE, *parts, "</svg>\n"])


def written(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """Write a line of text; kind is a class of the style."""
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{kind} text-anchor="{anchor}">{escape(text)}</text>'


def ratio_bars(title: str, below: str, rows: Sequence[Row]) -> str:
    """Draw how many times as fast ours is in each row, on a logarithmic axis around 1."""
    left, right, step, top = 8, 430, 46, 70
    shown = [row for row in rows if row["ratio"] is not None]
    most = max([abs(math.log2(row["ratio"])) for row in shown] + [1.0])
    least = max([-math.log2(row["ratio"]) for row in shown] + [0.0])
    unit = (right - left) / (most + least)
    one = left + unit * least
    bottom = top + step * len(shown)
    parts = [written(0, 18, title, "head"), written(0, 38, below, "faint")]
    parts.append(
        f'<line class="axis" x1="{one:.1f}" x2="{one:.1f}" y1="{top - 16}" y2="{bottom}"/>'
    )
    for at, row in enumerate(shown):
        y = top + step * at
        length = unit * math.log2(row["ratio"])
        x, width = (one, max(length, 1.0)) if length >= 0 else (one + length, -length)
        kind = "ours" if length >= 0 else "other"
        name = f"{row['op']} {row['mode']} {row['dtype']}, {row['case']}"
        parts.append(written(0, y, f"{name} against {row['peer']}", "faint"))
        parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y + 6}" width="{width:.1f}" height="14"/>'
        )
        parts.append(written(x + width + 4, y + 18, f"{row['ratio']:.3g}x"))
    return drawing(bottom + 8, title, parts)
