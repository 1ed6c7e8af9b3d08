"""A window of expert counts for a terminal: the summary, then a row a layer whose bars' height and colour both tell an expert's load."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pals.core.experts import ExpertSummary, FloatArray, ranks_of_experts
from pals.views.expert_picture import ExpertPicture, LayerLoad, binned

#: Below which load over the layer's mean each bar is drawn; what is above the last has the highest.
EDGES = (0.25, 0.5, 0.8, 1.25, 2.0, 3.0, 5.0)
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", ".:-=+*#@"
NONE = " "  # known, and no token chose it
#: From blue over grey to vermillion: Okabe and Ito's, told apart by colour-blind readers, and seen on black and on white.
COLOURS = ("#0072b2", "#0072b2", "#56b4e9", "#999999", "#e69f00", "#e69f00", "#d55e00", "#d55e00")
MOST_WIDE = 4  # columns that one expert may fill, where there are few
NARROW = 64  # columns below which only the bars are drawn
LEAST_CELLS = 16
Column = tuple[str, Callable[[LayerLoad], float | None], str]
COLUMNS: tuple[Column, ...] = (
    ("distinct", lambda layer: layer.distinct_per_step, ".1f"),
    ("CV", lambda layer: layer.variation, ".2f"),
    ("top 20%", lambda layer: layer.top_fifth_share, ".0%"),
)
HOTTEST: Column = ("ranks", lambda layer: layer.hottest_rank_over_mean, ".2f")


def print_experts(picture: ExpertPicture, console: Console) -> None:
    """Print the summary and the layers."""
    bars = bars_of(console)
    s = picture.summary
    head = f"{picture.engine}{' (emulated boards)' if picture.emulated else ''}"
    span = "since the engine's start" if s.span_s is None else f"over {s.span_s:.1f} s"
    console.print(Text(head, "bold"), soft_wrap=True)
    console.print(f"{s.layers} layers of {s.experts} experts, {s.top_k} chosen by each token")
    if s.layers_known == 0:
        console.print(f"nothing is known of this window: {s.unknown['layers_known']}")
        return
    console.print(f"{s.tokens} tokens in {s.steps} steps {span}")
    console.print(Padding(_summary(picture), (0, 0, 0, 2), expand=False))
    console.print()
    if s.variation is None:
        console.print("bars of so few tokens are partly chance; a longer window tells more")
    for line in layer_lines(picture, console.width, bars):
        console.print(line, soft_wrap=True)
    for line in _legend(picture, console.width, bars):
        console.print(line)


def print_history(windows: Sequence[ExpertSummary], console: Console) -> None:
    """Print how the summaries went over time, a line of bars a figure."""
    bars = bars_of(console)
    span_s = windows[-1].time_s - windows[0].time_s
    tokens = sum(w.tokens for w in windows)
    console.print(
        Text(f"over time: {len(windows)} windows of {tokens} tokens, the last {span_s:.0f} s after the first", "bold")
    )
    rows: tuple[tuple[str, str, Callable[[ExpertSummary], float | None]], ...] = (
        ("drift", "drift", lambda w: w.drift),
        ("distinct", "distinct_per_step", lambda w: w.distinct_per_step),
        ("CV", "variation", lambda w: w.variation),
        ("top 20%", "top_fifth_share", lambda w: w.top_fifth_share),
        ("hottest rank", "hottest_rank_over_mean", lambda w: w.hottest_rank_over_mean),
    )
    for name, field, value in rows:
        _print_series(name, [value(w) for w in windows], [w.unknown.get(field, "") for w in windows], console, bars)
    console.print(f"bars go from 0 to the highest; {UNKNOWN} is not known", style="dim")


UNKNOWN = "?"


def _print_series(name: str, values: Sequence[float | None], why: Sequence[str], console: Console, bars: str) -> None:
    """A line of bars, with the lowest, highest and last value; why values are missing."""
    known = [v for v in values if v is not None]
    reasons = ", ".join(dict.fromkeys(w for v, w in zip(values, why, strict=True) if v is None and w))
    if not known:
        console.print(f"{name:>12}  not known: {reasons}")
        return
    line = sparkline(values, max(LEAST_CELLS, console.width - 52), bars)
    last = "not known" if values[-1] is None else f"{values[-1]:.3g}"
    missing = f"; not known in {len(values) - len(known)} windows: {reasons}" if len(known) < len(values) else ""
    console.print(f"{name:>12}  {line}  {min(known):.3g} to {max(known):.3g}, last {last}{missing}")


def sparkline(values: Sequence[float | None], width: int, bars: str = BARS) -> str:
    """Bars from 0 to the highest; neighbours are averaged where there are more than `width`."""
    each = -(-len(values) // width)
    cells = [[v for v in values[i : i + each] if v is not None] for i in range(0, len(values), each)]
    means = [sum(c) / len(c) if c else None for c in cells]
    top = max((m for m in means if m is not None), default=0.0) or 1.0
    return "".join(UNKNOWN if m is None else bars[min(len(bars) - 1, int(m / top * len(bars)))] for m in means)


def plain_experts(draw: Callable[[Console], None], *, width: int) -> str:
    """What `draw` prints, for a file: no colours, no blanks at the ends of lines."""
    lines = io.StringIO()
    draw(Console(file=lines, highlight=False, markup=False, emoji=False, color_system=None, width=width))
    return "\n".join(line.rstrip() for line in lines.getvalue().splitlines())


def bars_of(console: Console) -> str:
    """Blocks, or characters of ASCII where the terminal has no others."""
    return BARS if console.encoding.lower().startswith("utf") else ASCII_BARS


def level(load: float) -> int | None:
    """Which bar; None: not chosen at all."""
    return None if load == 0 else sum(load >= edge for edge in EDGES)


class Layout(NamedTuple):
    """How a line is divided: the layer's name, cells of `each` experts that are `wide` columns, and figures."""

    names: int
    each: int
    wide: int
    cells: int
    columns: tuple[Column, ...]


def layout_of(picture: ExpertPicture, width: int) -> Layout:
    """As many experts to a bar as `width` demands; no figures where it is narrow."""
    ranks = picture.summary.hottest_rank_over_mean is not None
    columns = () if width < NARROW else (*COLUMNS, *([HOTTEST] if ranks else []))
    names = max(5, *(len(layer.name) for layer in picture.layers))
    room = max(LEAST_CELLS, width - names - 2 - sum(_width(column) for column in columns))
    each = -(-picture.summary.experts // room)
    cells = -(-picture.summary.experts // each)
    return Layout(names, each, min(MOST_WIDE, room // cells), cells, columns)


def layer_lines(picture: ExpertPicture, width: int, bars: str = BARS) -> list[Text]:
    """The rulers and a line a layer."""
    to = layout_of(picture, width)
    ruler = f"{'layer':>{to.names}}  {_ruler(picture, to.cells * to.wide)}"
    lines = [Text(ruler + "".join(f"{title:>{_width((title, of, form))}}" for title, of, form in to.columns), "dim")]
    if ranks := _rank_ruler(picture, to):
        lines.append(Text(f"{'rank':>{to.names}}  {ranks}", "dim"))
    for layer in picture.layers:
        line = Text(f"{layer.name:>{to.names}}  ")
        if layer.load is None:
            line.append(f"not known: {layer.why}", "italic")
        else:
            line.append_text(_bars(binned(layer.load, to.each), to.wide, bars))
            line.append("".join(f"{_number(c[1](layer), c[2]):>{_width(c)}}" for c in to.columns))
        lines.append(line)
    return lines


def _width(column: Column) -> int:
    """Of a column, with the blanks before it."""
    return max(4, len(column[0])) + 2


def _bars(load: FloatArray, wide: int, bars: str) -> Text:
    line = Text()
    for value in load:
        which = level(float(value))
        line.append((NONE if which is None else bars[which]) * wide, "" if which is None else COLOURS[which])
    return line


def _ruler(picture: ExpertPicture, width: int) -> str:
    """The first and the last expert."""
    last = str(picture.summary.experts - 1)
    return f"{'expert 0':<{max(0, width - len(last))}}{last}" if width >= len(last) + 9 else f"{'0':<{width}}"


def _rank_ruler(picture: ExpertPicture, to: Layout) -> str:
    """Where each rank's experts begin; nothing where one rank holds all, they lie scattered, or there is no room."""
    if picture.ranks == 1 or picture.placement != "linear":
        return ""
    holders = ranks_of_experts(picture.summary.experts, picture.ranks, picture.placement)
    begins = np.searchsorted(holders, np.arange(picture.ranks)) // to.each * to.wide
    ends = [*begins[1:], to.cells * to.wide]
    marks = [f"|{rank}" for rank in range(picture.ranks)]
    if any(end - begin < len(mark) for begin, end, mark in zip(begins, ends, marks, strict=True)):
        return ""
    return "".join(f"{mark:<{end - begin}}" for begin, end, mark in zip(begins, ends, marks, strict=True))


def _legend(picture: ExpertPicture, width: int, bars: str) -> list[Text]:
    """What the bars mean, with their colours, and what the columns are."""
    to = layout_of(picture, width)
    text = Text("\nload over the layer's mean: blank none")
    for i, bar in enumerate(bars):
        text.append("  ")
        text.append(bar, COLOURS[i])
        text.append(f"<{EDGES[i]:g}" if i < len(EDGES) else "more")
    lines = [text]
    if to.each > 1:
        lines.append(Text(f"a bar is the mean of {to.each} experts", "dim"))
    if not to.columns:
        return lines
    told = "distinct: experts touched a step; CV: coefficient of variation of popularity; top 20%: choices of the most popular fifth"
    hottest = "; ranks: the busiest over their mean" if HOTTEST in to.columns else ""
    return [*lines, Text(f"{told}{hottest}", "dim")]


def _summary(picture: ExpertPicture) -> Table:
    """The window's figures, each with why it is not known where it is not."""
    s, table = picture.summary, Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    even = max(1, round(0.2 * s.experts)) / s.experts
    chance = "" if picture.drift_by_chance is None else f"; sampling alone gives about {picture.drift_by_chance:.3f}"
    rows = (
        ("distinct experts", "distinct_per_step", s.distinct_per_step, ".1f", f" of {s.experts}, per layer and step"),
        ("popularity CV", "variation", s.variation, ".2f", "; 0: all alike"),
        ("top 20 %", "top_fifth_share", s.top_fifth_share, ".1%", f" of choices; {even:.0%}: all alike"),
        ("hottest rank", "hottest_rank_over_mean", s.hottest_rank_over_mean, ".2f", f" times the mean of {picture.ranks} ranks"),
        ("drift", "drift", s.drift, ".3f", f" from {picture.reference}{chance}"),
    )  # fmt: skip
    for name, field, value, form, more in rows:
        table.add_row(name, f"not known: {s.unknown[field]}" if value is None else f"{value:{form}}{more}")
    why = s.unknown.get("layers_known", "")
    table.add_row("layers known", f"{s.layers_known} of {s.layers}{f'; {why}' if why else ''}")
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
