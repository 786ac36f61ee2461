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
    strong: bool = False


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Cell:
    """A cell with a style: "faster", "slower", "tie" or "failed"."""

    text: str
    look: str


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    words: int = 1  # number of leading columns with words, aligned to the left; the others hold numbers


@dataclass(frozen=True)
class Figure:
    """A plot, drawn as SVG for the page; left out of the Markdown."""

    caption: str
    draw: Callable[[], str] = field(repr=False)


Block = Heading | Paragraph | Bullets | Code | Table | Figure


def escape_markdown(text: str) -> str:
    """Escape characters that are special in Markdown or HTML; underscores within words are not."""
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
            case Heading(level, text):
                lines += ["#" * level + " " + escape_markdown(text), ""]
            case Paragraph(text, strong):
                lines += [f"**{escape_markdown(text)}**" if strong else escape_markdown(text), ""]
            case Bullets(items):
                lines += [*(f"- {escape_markdown(item)}" for item in items), ""]
            case Code(text):
                lines += ["```", text.replace("```", "'''"), "```", ""]
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
.scroll, pre { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #ddd; padding: .25rem .5rem; text-align: right; white-space: nowrap; vertical-align: top }
th { background: #f3f3f3 }
.words { text-align: left }
.wide { white-space: normal; min-width: 18rem }
.slower, .failed { background: #fbe3d6 }
.tie { background: #fdf6d8 }
figure { margin: 1rem 0 }
svg { display: block; height: auto; max-width: 100%; min-width: 42rem }
""".strip()
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def page(blocks: Sequence[Block]) -> str:
    chapters = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<li><a href="#{anchor(text)}">{html.escape(text)}</a></li>\n' for text in chapters)
    title, *body = (_element(block, f"figure{number}") for number, block in enumerate(blocks))
    parts = [title, f"<nav>\n<ul>\n{links}</ul>\n</nav>", *body]
    return PAGE.format(title=re.sub("<.*?>", "", title), style=STYLE, body="\n".join(parts))


def anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _element(block: Block, name: str) -> str:
    match block:
        case Heading(level, text):
            target = f' id="{anchor(text)}"' * (level == 2)
            return f"<h{level}{target}>{html.escape(text)}</h{level}>"
        case Paragraph(text, strong):
            return f"<p>{'<strong>' * strong}{html.escape(text)}{'</strong>' * strong}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{html.escape(item)}</li>" for item in items) + "\n</ul>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table():
            return _table(block)
        case Figure(caption, draw):
            svg = inline(draw(), name, caption)
            return (
                f'<figure>\n<figcaption>{html.escape(caption)}</figcaption>\n<div class="scroll">{svg}</div>\n</figure>'
            )


def _table(table: Table) -> str:
    def line(tag: str, row: Sequence[str | Cell]) -> str:
        cells = []
        for column, cell in enumerate(row):
            text, look = (cell.text, cell.look) if isinstance(cell, Cell) else (cell, "")
            names = filter(None, ("words" * (column < table.words), "wide" * (len(text) > 60), look))
            cells.append(f'<{tag} class="{" ".join(names)}">{html.escape(text)}</{tag}>'.replace(' class=""', ""))
        return f"<tr>{''.join(cells)}</tr>"

    rows = "\n".join(line("td", row) for row in table.rows)
    head = line("th", table.head)
    return f'<div class="scroll">\n<table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>'


def inline(svg: str, prefix: str, label: str) -> str:
    """Return an SVG file as an element of a page, made smaller and with unique ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'="[^"]*\d\.\d{3,}[^"]*"', lambda value: re.sub(r"(\.\d\d)\d+", r"\1", value[0]), svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()
