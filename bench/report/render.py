"""A report as a list of blocks, and the blocks as Markdown and as HTML."""

import html
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """A cell whose look says more than its text: "faster", "slower", "tie" or "failed"."""

    text: str
    look: str


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    words: int = 1  # so many columns hold words and begin at the left; the others hold numbers


@dataclass(frozen=True)
class Figure:
    """A plot, drawn when it is asked for: the Markdown has none."""

    caption: str
    draw: Callable[[], str] = field(repr=False)


Block = Heading | Paragraph | Bullets | Table | Figure


def escape_markdown(text: str) -> str:
    """Keep what is special to Markdown or HTML as it reads; underscores within words are not special."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split()))


def markdown_table(table: Table) -> Iterator[str]:
    rule = ["---" if column < table.words else "---:" for column in range(len(table.head))]
    texts = [[cell.text if isinstance(cell, Cell) else cell for cell in row] for row in (table.head, *table.rows)]
    lines = [[escape_markdown(text) for text in row] for row in texts]
    for line in (lines[0], rule, *lines[1:]):
        yield "| " + " | ".join(line) + " |"


def markdown(blocks: Iterable[Block]) -> str:
    lines: list[str] = []
    for block in blocks:
        match block:
            case Heading():
                lines += ["#" * block.level + " " + escape_markdown(block.text), ""]
            case Paragraph():
                lines += [escape_markdown(block.text), ""]
            case Bullets():
                lines += [*(f"- {escape_markdown(item)}" for item in block.items), ""]
            case Table():
                lines += [*markdown_table(block), ""]
    return "\n".join(lines)


STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .7rem }
h2 { border-bottom: 1px solid #ccc; padding-bottom: .3rem }
p, ul { max-width: 50rem }
nav ul { columns: 16rem; padding-left: 1.2rem }
.scroll { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #ddd; padding: .25rem .5rem; text-align: right; white-space: nowrap; vertical-align: top }
th { background: #f3f3f3 }
th.words, td.words { text-align: left }
td.wide { white-space: normal; min-width: 18rem }
td.slower, td.failed { background: #fbe3d6 }
td.tie { background: #fdf6d8 }
figure { margin: 1rem 0 }
figcaption { font-size: .9rem; max-width: 50rem }
svg { display: block; height: auto; max-width: 100%; min-width: 42rem }
""".strip()


def page(title: str, blocks: Sequence[Block]) -> str:
    chapters = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<li><a href="#{anchor(c.text)}">{html.escape(c.text)}</a></li>\n' for c in chapters)
    body = list(_body(blocks, f"<nav>\n<ul>\n{links}</ul>\n</nav>" if chapters else ""))
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>\n{STYLE}\n</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            "</body>",
            "</html>",
            "",
        )
    )


def anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _body(blocks: Iterable[Block], contents: str) -> Iterator[str]:
    figures = 0
    for block in blocks:
        match block:
            case Heading(level, text):
                target = f' id="{anchor(text)}"' if level == 2 else ""
                yield f"<h{level}{target}>{html.escape(text)}</h{level}>"
                if level == 1:
                    yield contents
            case Paragraph(text):
                yield f"<p>{html.escape(text)}</p>"
            case Bullets(items):
                yield "<ul>\n" + "\n".join(f"<li>{html.escape(item)}</li>" for item in items) + "\n</ul>"
            case Table():
                yield _table(block)
            case Figure(caption, draw):
                figures += 1
                svg = inline(draw(), f"figure{figures}", caption)
                yield f'<figure>\n<figcaption>{html.escape(caption)}</figcaption>\n<div class="scroll">{svg}</div>\n'
                yield "</figure>"


def _table(table: Table) -> str:
    def cells(tag: str, row: Sequence[str | Cell]) -> Iterator[str]:
        for column, cell in enumerate(row):
            text, look = (cell.text, cell.look) if isinstance(cell, Cell) else (cell, "")
            words = "words" if column < table.words else ""
            wide = "wide" if len(text) > 60 else ""
            names = " ".join(name for name in (words, wide, look) if name)
            style = f' class="{names}"' if names else ""
            yield f"<{tag}{style}>{html.escape(text)}</{tag}>"

    head = "".join(cells("th", table.head))
    rows = "\n".join(f"<tr>{''.join(cells('td', row))}</tr>" for row in table.rows)
    return f'<div class="scroll">\n<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>'


def inline(svg: str, prefix: str, label: str) -> str:
    """Return an SVG file as an element: small, and with names that no other one on the page has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r'="[^"]*\d\.\d{3,}[^"]*"', lambda value: re.sub(r"(\.\d\d)\d+", r"\1", value[0]), svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()
