"""Draws charts with matplotlib for the width of a paper's columns; the same chart gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from typing import Any, NamedTuple

from pals.core.errors import INSTALL, ConfigError
from pals.views.charts import Chart, Cloud, Groups, Mark, Panel, Stat, Style, Traced, styles_of
from pals.views.figure import BLACK, BLUE, GREY, ORANGE

COLUMN_IN, ROW_IN = 3.5, 2.5  # a column of a page, a row of panels
GROUP_IN = 0.1  # of one value in a lying group
DPI = 200
LINE_IN = 0.17  # of the legend, and of the foot
LETTER_IN = 0.058  # of a tick label
DODGE_PT = 2.2
#: A fixed salt and no date: the same chart gives the same bytes.
LOOKS: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5, "hatch.linewidth": 0.5, "svg.hashsalt": "pals", "svg.fonttype": "path",
}  # fmt: skip
METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
DASHES = ((0, (4, 2)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)))
FULL = 0.8  # of a group's room, between its outermost values


class Looks(NamedTuple):
    """What a figure's panels share."""

    styles: Mapping[str, Style]
    dashes: Mapping[str, Any]  # by label of a straight line
    width_in: float  # of a panel


def drawn(chart: Chart, kind: str) -> bytes:
    """The figure as "png" or "svg".

    Raises:
        ConfigError: matplotlib is not installed.
        ValueError: it has no panel.
    """
    if not chart.panels:
        raise ValueError(f"the chart {chart.name!r} has no panel")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError(f"matplotlib is not installed; {INSTALL}") from e
    with rc_context(LOOKS):
        figure = Figure(layout="constrained", dpi=DPI)
        _fill(figure, chart)
        written = BytesIO()
        figure.savefig(written, format=kind, metadata=METADATA[kind])
    return written.getvalue()


def _fill(figure: Any, chart: Chart) -> None:
    columns = min(chart.columns, len(chart.panels))
    heights = [_height_in(chart.panels[i : i + columns]) for i in range(0, len(chart.panels), columns)]
    figure.set_size_inches(_width_in(chart, columns), sum(heights))
    grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    looks = Looks(styles_of(names_in(chart.panels)), dashes_of(chart.panels), figure.get_figwidth() / columns)
    for axes, panel in zip(grid.flat, chart.panels, strict=False):
        _panel(axes, panel, looks)
    if columns == 1 and all(isinstance(p, Traced) for p in chart.panels):
        for axes in grid[:-1, 0]:
            axes.set_xlabel("")
    for axes in list(grid.flat)[len(chart.panels) :]:
        axes.set_axis_off()
    lines = _legend(figure, grid)
    height_in = sum(heights) + LINE_IN * (lines + 1)
    figure.set_size_inches(figure.get_figwidth(), height_in)
    foot = LINE_IN / height_in  # of the figure, for the word below
    figure.get_layout_engine().set(rect=(0.0, foot, 1.0, 1.0 - foot))
    figure.text(0.995, 0.02 / height_in, chart.made, ha="right", va="bottom", fontsize=7, color=GREY)


def names_in(panels: Sequence[Panel]) -> list[str]:
    """Names that take a style, each once."""
    found = list[str]()
    for panel in panels:
        if isinstance(panel, Cloud):
            found += [s.name for s in panel.series]
        elif isinstance(panel, Groups):
            found += [name for name, _ in panel.values]
    return list(dict.fromkeys(found))


def dashes_of(panels: Sequence[Panel]) -> dict[str, Any]:
    """One for each label of a straight line; labels that come late may share one."""
    marks = [m for p in panels if not isinstance(p, Traced) for m in (*p.marks, *getattr(p, "x_marks", ()))]
    return dict(zip(dict.fromkeys(m.label for m in marks), cycle(DASHES), strict=False))


def _width_in(chart: Chart, columns: int) -> float:
    wide = any(
        isinstance(p, Traced) or (isinstance(p, Groups) and not p.lying and len(p.groups) * len(p.values) > 16)
        for p in chart.panels
    )
    return COLUMN_IN * (2 if wide or columns > 1 else 1)


def _height_in(row: Sequence[Panel]) -> float:
    lying = [p for p in row if isinstance(p, Groups) and p.lying]
    if not lying:
        return 1.6 if all(isinstance(p, Traced) for p in row) else ROW_IN
    return max(ROW_IN, *(0.7 + len(p.groups) * max(0.2, GROUP_IN * len(p.values)) for p in lying))


def _panel(axes: Any, panel: Panel, looks: Looks) -> None:
    axes.set_title(panel.title, loc="left")
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if isinstance(panel, Cloud):
        _cloud(axes, panel, looks)
    elif isinstance(panel, Groups):
        _groups(axes, panel, looks)
    else:
        _traced(axes, panel)


def _cloud(axes: Any, panel: Cloud, looks: Looks) -> None:
    exact = panel.joined and all(
        p.low == p.high for s in panel.series for p in s.x
    )  # such error bars would lie on each other
    for i, s in enumerate(s for s in panel.series if s.x):
        style = looks.styles[s.name]
        moved = {"transform": _shifted(axes, DODGE_PT * (i - (len(panel.series) - 1) / 2))} if exact else {}
        drawn = axes.errorbar(
            [p.value for p in s.x], [p.value for p in s.y], xerr=_errors(s.x), yerr=_errors(s.y), label=s.name,
            linestyle="-" if panel.joined else "none", linewidth=0.9, elinewidth=0.7 if panel.joined else 0.5,
            capsize=1.5 if panel.joined else 0, color=style.colour, marker=style.marker, markersize=4 if panel.joined else 3.5,
            **moved,
        )  # fmt: skip
        if exact and s.x:  # matplotlib does not see through the shift
            axes.update_datalim([(x.value, y) for x, at in zip(s.x, s.y, strict=True) for y in (at.low, at.high)])
        if not panel.joined:
            for bar in drawn[2]:
                bar.set_alpha(0.4)
    axes.autoscale_view()
    _marks(axes.axhline, panel.marks, looks)
    _marks(axes.axvline, panel.x_marks, looks)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)


def _shifted(axes: Any, points: float) -> Any:
    from matplotlib.transforms import ScaledTranslation

    return axes.transData + ScaledTranslation(points / 72.0, 0.0, axes.get_figure().dpi_scale_trans)


def _groups(axes: Any, panel: Groups, looks: Looks) -> None:
    step = FULL / max(1, len(panel.values))
    for i, (name, values) in enumerate(panel.values):
        known = [(g + (i - (len(panel.values) - 1) / 2) * step, v) for g, v in enumerate(values) if v is not None]
        if not known:
            continue
        places, stats = [at for at, _ in known], [v for _, v in known]
        draw = _bars if panel.bars else _dots
        draw(axes, places, stats, name, looks.styles[name], step, panel.lying)
    _marks(axes.axvline if panel.lying else axes.axhline, panel.marks, looks)
    along, across = (axes.yaxis, axes.xaxis) if panel.lying else (axes.xaxis, axes.yaxis)
    along.set_ticks(range(len(panel.groups)), panel.groups)
    along.grid(False)
    across.set_label_text(panel.label)
    along.set_label_text(panel.group_label)
    limits = (-0.55, len(panel.groups) - 0.45)
    if panel.lying:
        axes.set_ylim(limits[::-1])  # the first on top
    else:
        axes.set_xlim(limits)
        longest = max((len(line) for g in panel.groups for line in g.splitlines()), default=0)
        if longest * LETTER_IN * len(panel.groups) > 0.85 * looks.width_in:
            axes.tick_params(axis="x", labelrotation=35)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
                label.set_rotation_mode("anchor")


def _bars(
    axes: Any, at: Sequence[float], stats: Sequence[Stat], name: str, style: Style, step: float, lying: bool
) -> None:
    values, errors = [s.value for s in stats], _errors(stats)
    looks = {"color": style.colour, "edgecolor": "white", "linewidth": 0.4, "hatch": style.hatch, "label": name}
    looks |= {"error_kw": {"elinewidth": 0.7, "capsize": 1.5, "ecolor": BLACK}}
    if lying:
        axes.barh(at, values, height=0.95 * step, xerr=errors, **looks)
    else:
        axes.bar(at, values, width=0.95 * step, yerr=errors, **looks)
    for place, stat in zip(at, stats, strict=True):
        if stat.low == stat.high == 0.0:  # a bar that nobody sees is not one that is not known
            xy, off = ((0.0, place), (2, 0)) if lying else ((place, 0.0), (0, 2))
            align = {"ha": "left", "va": "center"} if lying else {"ha": "center", "va": "bottom"}
            axes.annotate("0", xy, off, textcoords="offset points", fontsize=6, color=style.colour, **align)


def _dots(
    axes: Any, at: Sequence[float], stats: Sequence[Stat], name: str, style: Style, step: float, lying: bool
) -> None:
    values, errors = [s.value for s in stats], _errors(stats)
    looks = {
        "linestyle": "none", "color": style.colour, "marker": style.marker, "markersize": 4, "elinewidth": 0.7,
        "capsize": 1.5, "label": name,
    }  # fmt: skip
    if lying:
        axes.errorbar(values, at, xerr=errors, **looks)
    else:
        axes.errorbar(at, values, yerr=errors, **looks)


def _traced(axes: Any, panel: Traced) -> None:
    for (name, values), colour in zip(panel.drawn, cycle((BLUE, GREY)), strict=False):
        axes.plot(panel.time_s, values, color=colour, linewidth=0.9, label=name)
    for (name, values), (colour, dash) in zip(
        panel.stepped, cycle(((BLACK, (0, (6, 2))), (ORANGE, "-"))), strict=False
    ):
        axes.step(panel.time_s, values, where="post", color=colour, linestyle=dash, linewidth=0.9, label=name)
    axes.set(xlabel="time, s", ylabel=panel.label)
    axes.set_xlim(min(panel.time_s), max(panel.time_s))


def _marks(line: Any, marks: Sequence[Mark], looks: Looks) -> None:
    for mark in marks:
        line(mark.at, color=BLACK, linestyle=looks.dashes[mark.label], linewidth=0.8, label=mark.label, zorder=1)


def _errors(stats: Sequence[Stat]) -> list[list[float]] | None:
    """Below and above; None where nothing spreads, so that no cap is drawn through a marker."""
    below, above = [s.value - s.low for s in stats], [s.high - s.value for s in stats]
    return [below, above] if any(below) or any(above) else None


def _legend(figure: Any, grid: Any) -> int:
    """One for all panels, above them, each name once, straight lines last; returns its lines."""
    from matplotlib.lines import Line2D

    found = dict[str, Any]()
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not found:
        return 0
    names = sorted(found, key=lambda n: isinstance(found[n], Line2D))
    columns = max(1, min(len(names), int(figure.get_figwidth() / (0.5 + LETTER_IN * max(map(len, names))))))
    figure.legend(
        [found[n] for n in names], names, loc="outside upper center", ncols=columns, frameon=False, handletextpad=0.4,
        columnspacing=1.0, borderaxespad=0.1,
    )  # fmt: skip
    return -(-len(names) // columns)
