"""A document as one HTML file that needs nothing else: no script, no network, figures as SVG inside it."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape

from pals.experiments.lab.report.document import Block, Figure, Grid, Heading, Points
from pals.views.chart_drawing import drawn

FOLDED = 30  # a table of more lines is folded until somebody wants it
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #111; background: #fff;
       font: 15px/1.5 "Source Serif 4", Charter, Georgia, serif; }
h1, h2, h3, table, summary, figcaption { font-family: "Source Sans 3", "Helvetica Neue", Arial, sans-serif; }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; } h3 { margin-bottom: 0.3rem; }
code { font-size: 0.88em; background: #f3f3f3; padding: 0 0.2em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.82rem; margin: 0.4rem 0 1.2rem; }
caption { text-align: left; padding: 0.3rem 0; font-weight: 600; }
th, td { padding: 0.15rem 0.6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } td.text { text-align: left; }
thead th { border-bottom: 1.5px solid #111; } tbody tr:nth-child(even) { background: #f7f7f7; }
td.missed { font-weight: 700; border-left: 3px solid #d55e00; text-align: left; }
td.reached { border-left: 3px solid #0072b2; text-align: left; } td.open { border-left: 3px solid #999; text-align: left; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; } figcaption { font-size: 0.85rem; color: #333; }
summary { cursor: pointer; font-size: 0.85rem; font-weight: 600; }
@media print { details { display: block; } figure, tr { break-inside: avoid; } }
"""
JUDGED = {"reached": "reached", "MISSED": "missed", "not judged": "open"}


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """The whole file."""
    body = "\n".join(html_of(b) for b in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"{body}\n</body>\n</html>\n"
    )


def html_of(block: Block) -> str:
    """One block."""
    if isinstance(block, Heading):
        anchor = f' id="{escape(block.anchor)}"' if block.anchor else ""
        return f"<h{block.level}{anchor}>{inline(block.text)}</h{block.level}>"
    if isinstance(block, Points):
        return f"<ul>{''.join(f'<li>{inline(item)}</li>' for item in block.items)}</ul>"
    if isinstance(block, Grid):
        return table_of(block)
    if isinstance(block, Figure):
        return figure_of(block)
    return f"<p>{inline(block.text)}</p>"


def inline(text: str) -> str:
    """Escaped, with `code` and **bold**."""
    told = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", told)


def table_of(block: Grid) -> str:
    """Folded where it is long."""
    header = "".join(f'<th scope="col">{inline(cell)}</th>' for cell in block.header)
    links = block.links or [""] * len(block.lines)
    lines = "\n".join(_line(cells, link) for cells, link in zip(block.lines, links, strict=True))
    folded = len(block.lines) > FOLDED
    caption = f"<caption>{inline(block.caption)}</caption>" if block.caption and not folded else ""
    table = f'<div class="wide"><table>{caption}<thead><tr>{header}</tr></thead>\n<tbody>{lines}</tbody></table></div>'
    if not folded:
        return table
    return f"<details><summary>{inline(block.caption)} ({len(block.lines)} lines)</summary>{table}</details>"


def _line(cells: Sequence[str], link: str) -> str:
    first = inline(cells[0])
    told = [f'<td><a href="#{escape(link)}">{first}</a></td>' if link else f"<td>{first}</td>"]
    for cell in cells[1:]:
        word = next((w for w in JUDGED if cell == w or cell.startswith(f"{w} (")), None)
        kind = f' class="{JUDGED[word]}"' if word else ""
        told.append(f"<td{kind}>{inline(cell)}</td>")
    return f"<tr>{''.join(told)}</tr>"


def figure_of(block: Figure) -> str:
    """The drawing as an image: its ids cannot meet those of another."""
    data = b64encode(drawn(block.chart, "svg")).decode()
    about = escape(re.sub(r"[*`]", "", block.caption))
    return (
        f'<figure><img alt="{about}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{inline(block.caption)}</figcaption></figure>"
    )
