"""What a model says beside what was measured: a row of two panels a check, predicted against measured and the error along an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pals.core.errors import INSTALL, ConfigError

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#777777")  # Okabe and Ito
MARKS = ("o", "s", "^", "D", "v", "P", "X")
NAMED_GROUPS = 14  # more would not fit a legend
DRAWN_POINTS = 1500  # of one check, at regular distances; more would only be ink


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """The points of one check: (x, measured, predicted), by group."""

    title: str
    x_axis: str
    points: Mapping[str, Sequence[tuple[float, float, float]]]


def draw_scatters(scatters: Sequence[Scatter], path: Path) -> None:
    """Write the figure as PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError(f"matplotlib is not installed; {INSTALL}") from e
    figure = Figure(figsize=(12.0, 2.9 * len(scatters)), layout="constrained", dpi=80)
    grid = figure.subplots(len(scatters), 2, squeeze=False)
    for (left, right), scatter in zip(grid, scatters, strict=True):
        _pair(left, right, scatter)
    figure.savefig(path)


def _pair(left: Any, right: Any, scatter: Scatter) -> None:
    every = -(-sum(len(points) for points in scatter.points.values()) // DRAWN_POINTS)
    drawn = {group: points[::every] for group, points in scatter.points.items()}
    spread = [m for points in drawn.values() for _, m, _ in points]
    axis = [x for points in drawn.values() for x, _, _ in points]
    few = len(axis) < 300
    style = {"markersize": 4.5 if few else 2.0, "linestyle": "none", "alpha": 0.8 if few else 0.4}
    for i, (group, points) in enumerate(drawn.items()):
        x, measured, predicted = zip(*points, strict=True)
        look = {**style, "color": COLOURS[i % len(COLOURS)], "marker": MARKS[i // len(COLOURS) % len(MARKS)]}
        left.plot(measured, predicted, label=group, **look)
        right.plot(x, [100.0 * (p / m - 1.0) for m, p in zip(measured, predicted, strict=True)], **look)
    ends = [min(spread), max(spread)]
    left.plot(ends, ends, color="#000000", linewidth=1.0)
    right.axhline(0.0, color="#000000", linewidth=1.0)
    if max(spread) > 20 * min(spread):
        left.set(xscale="log", yscale="log")
    if min(axis) > 0 and max(axis) > 20 * min(axis):
        right.set(xscale="log")
    shown = f"{scatter.title}{f' (every {every}th case drawn)' if every > 1 else ''}"
    left.set_title(shown, fontsize=10, loc="left")
    left.set(xlabel="measured", ylabel="predicted")
    right.set(xlabel=scatter.x_axis, ylabel="error, %")
    for axes in (left, right):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if len(scatter.points) <= NAMED_GROUPS:
        handles, labels = left.get_legend_handles_labels()
        right.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8)
