"""A document of a few kinds of blocks, as Markdown and as one HTML file.

Text is plain: nothing in it is markup, whatever characters it has.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...training.runs import write_atomically

FIGURES = "figures"

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1c; --back: #ffffff; --line: #d4d4d4;
  --soft: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e4; --back: #161616; --line: #444444; --soft: #242424; } }
body { margin: 0 auto; padding: 1rem; max-width: 46rem; color: var(--text);
  background: var(--back); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
figcaption { font-size: 0.85rem; padding: 0.3rem 0; }
th, td { padding: 0.2rem 0.6rem 0.2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
tbody th { font-weight: normal; }
th:first-child { min-width: 4.5rem; }
figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; }
pre { white-space: pre-wrap; padding: 0.6rem; background: var(--soft); font-size: 0.85rem; }
.notice { padding: 0.6rem; background: var(--soft); border-left: 4px solid #d55e00; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading of level 1, 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text; a notice stands out."""

    text: str
    notice: bool = False


@dataclass(frozen=True)
class Items:
    """A list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A line of code."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head, with a caption above."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure of the document by its name, with what it shows."""

    name: str
    caption: str


Block = Heading | Paragraph | Items | Code | Table | Picture


@dataclass
class Document:
    """Blocks in order, and the PNG files of its pictures by name."""

    blocks: list[Block] = field(default_factory=list)
    figures: dict[str, bytes] = field(default_factory=dict)

    def add(self, *blocks: Block) -> None:
        """Append blocks."""
        self.blocks += blocks

    def picture(self, name: str, png: bytes, caption: str) -> None:
        """Append a figure."""
        self.figures[name] = png
        self.add(Picture(name, caption))


# -- Markdown --------------------------------------------------------------------------------------


def markdown(document: Document, figures: str = FIGURES) -> str:
    """Write the document as Markdown with its figures as files in a folder beside it."""
    return "\n\n".join(_markdown_block(block, figures) for block in document.blocks) + "\n"


def escaped(text: str) -> str:
    """Escape plain text so that Markdown shows it, on one line."""
    text = " ".join(text.split())
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", r"\<", text)
    text = re.sub(r"&(?=#?\w+;)", r"\&", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", text)


def _escaped_line(text: str) -> str:
    """Escape a line of its own, which must not begin like a list, a quotation or a heading."""
    return re.sub(r"^(\d*)(>|(?:[-+.)]|#+)(?=\s|$))", r"\1\\\2", escaped(text))


def _markdown_block(block: Block, figures: str) -> str:
    """Write a block as Markdown."""
    match block:
        case Heading():
            return f"{'#' * block.level} {_escaped_line(block.text)}"
        case Paragraph():
            return f"{'> ' if block.notice else ''}{_escaped_line(block.text)}"
        case Items():
            return "\n".join(f"- {_escaped_line(text)}" for text in block.texts)
        case Code():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
            return f"{fence}\n{block.text}\n{fence}"
        case Picture():
            image = f"![{escaped(block.name)}]({figures}/{block.name}.png)"
            return f"{image}\n\n{_escaped_line(block.caption)}"
        case Table():
            rows = [block.head, ["---"] * len(block.head), *block.rows]
            lines = [
                "| " + " | ".join(cell if row is rows[1] else escaped(cell) for cell in row) + " |"
                for row in rows
            ]
            return "\n".join(
                ([f"{_escaped_line(block.caption)}\n"] if block.caption else []) + lines
            )


# -- HTML ------------------------------------------------------------------------------------------


def page(document: Document, title: str) -> str:
    """Write the document as one HTML file that needs no other."""
    body = "\n".join(_html_block(block, document.figures) for block in document.blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _html_block(block: Block, figures: Mapping[str, bytes]) -> str:
    """Write a block as HTML."""
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Paragraph():
            kind = ' class="notice"' if block.notice else ""
            return f"<p{kind}>{html.escape(block.text)}</p>"
        case Items():
            items = "\n".join(f"<li>{html.escape(text)}</li>" for text in block.texts)
            return f"<ul>\n{items}\n</ul>"
        case Code():
            return f"<pre><code>{html.escape(block.text)}</code></pre>"
        case Picture():
            data = base64.b64encode(figures[block.name]).decode()
            text = html.escape(block.caption)
            return (
                f'<figure>\n<img src="data:image/png;base64,{data}" alt="{text}">\n'
                f"<figcaption>{text}</figcaption>\n</figure>"
            )
        case Table():
            return _html_table(block)


def _html_table(block: Table) -> str:
    """Write a table as HTML."""
    # Not a caption element: that is as narrow as its table.
    caption = f"<figcaption>{html.escape(block.caption)}</figcaption>\n" if block.caption else ""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in block.head)
    rows = "\n".join(
        f'<tr><th scope="row">{_html_cell(first)}</th>'
        + "".join(f"<td>{_html_cell(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in block.rows
    )
    return (
        f'<figure>\n{caption}<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>\n</figure>"
    )


def _html_cell(text: str) -> str:
    """Escape text in which a mean and its deviation stay on one line."""
    return html.escape(text).replace(" ± ", "&nbsp;±&nbsp;")


# -- files -----------------------------------------------------------------------------------------


def write_report(document: Document, folder: Path, title: str) -> None:
    """Write report.md, report.html and figures/*.png, each atomically; remove older figures.

    Args:
        document: what to write.
        folder: where.
        title: of the HTML page.
    """
    figures = folder / FIGURES
    figures.mkdir(exist_ok=True)
    for name, png in document.figures.items():
        write_atomically(figures / f"{name}.png", png)
    for old in figures.glob("*.png"):
        if old.stem not in document.figures:
            old.unlink()
    write_atomically(folder / "report.md", markdown(document, FIGURES).encode())
    write_atomically(folder / "report.html", page(document, title).encode())
