"""A document as Markdown; figures lie as PNG in a folder beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pals.experiments.lab.pages import grid
from pals.experiments.lab.report.document import Block, Figure, Grid, Heading, Points
from pals.views.chart_drawing import drawn


def write_markdown(blocks: Sequence[Block], path: Path) -> None:
    """Write the page, and its figures into `NAME-figures` beside it."""
    folder = path.with_name(f"{path.stem}-figures")
    path.parent.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        if isinstance(block, Figure):
            folder.mkdir(exist_ok=True)
            (folder / f"{block.chart.name}.png").write_bytes(drawn(block.chart, "png"))
    path.write_text("\n\n".join(markdown_of(b, folder.name) for b in blocks) + "\n", encoding="utf-8")


def markdown_of(block: Block, folder: str) -> str:
    """One block; figures are looked for in `folder`."""
    if isinstance(block, Heading):
        anchor = f'<a id="{block.anchor}"></a>\n\n' if block.anchor else ""
        return f"{anchor}{'#' * block.level} {block.text}"
    if isinstance(block, Points):
        return "\n".join(f"- {' '.join(item.split())}" for item in block.items)
    if isinstance(block, Grid):
        return table_of(block)
    if isinstance(block, Figure):
        return f"![Figure {block.number}]({folder}/{block.chart.name}.png)\n\n{block.caption}"
    return block.text


def table_of(block: Grid) -> str:
    """With its caption above it."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in block.lines]
    if block.links:
        lines = [[f"[{line[0]}](#{link})", *line[1:]] for line, link in zip(lines, block.links, strict=True)]
    table = grid(block.header, lines)
    return f"{block.caption}\n\n{table}" if block.caption else table
