"""The figure of expert counts: layers by experts, distinct experts beside them, and drift and distinct experts over time below."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pals.core.errors import INSTALL, ConfigError
from pals.core.experts import ExpertSummary, ranks_of_experts
from pals.views.expert_picture import ExpertPicture
from pals.views.figure import BLACK, BLUE, GREEN

FARTHEST = 3  # doublings from the mean at which colours end
LABELLED_LAYERS = 40
WIDTH_IN, ROW_IN, TIME_IN = 11.0, 0.15, 1.7
TOLD_WIDTH = 150  # characters of a line of the subtitle


def draw_experts(picture: ExpertPicture | None, windows: Sequence[ExpertSummary], path: Path) -> None:
    """Write the figure: of a window, of windows over time, or of both.

    Raises:
        ConfigError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    if picture is None and not windows:
        raise ValueError("there is neither a window nor a history to draw")
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as e:
        raise ConfigError(f"matplotlib is not installed; {INSTALL}") from e
    heights = [] if picture is None else [min(9.0, max(2.2, ROW_IN * len(picture.layers))) + 1.0]
    heights += [TIME_IN, TIME_IN] if windows else []
    lines = _told(picture, windows)
    head_in = 0.45 + 0.19 * len(lines)
    height_in = sum(heights) + head_in + 0.3
    figure = Figure(
        figsize=(WIDTH_IN, height_in),
        layout=ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 1.0 - head_in / height_in), h_pad=0.06, w_pad=0.06),
        dpi=120,
    )
    figure.text(0.01, 1.0 - 0.1 / height_in, _title(picture), va="top", fontsize=14, fontweight="bold")
    figure.text(0.01, 1.0 - 0.42 / height_in, "\n".join(lines), va="top", fontsize=9.5, color="#444444")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=(6, 1))
    if picture is not None:
        _heat_map(figure, grid, picture)
    if windows:
        _over_time(figure, grid, len(heights) - 2, windows)
    figure.savefig(path)


def _title(picture: ExpertPicture | None) -> str:
    if picture is None:
        return "Experts over time"
    return f"Experts of {picture.engine}{' (emulated boards)' if picture.emulated else ''}"


def _told(picture: ExpertPicture | None, windows: Sequence[ExpertSummary]) -> list[str]:
    """The subtitle: what the window holds, and what is not known of it."""
    if picture is None:
        return [f"{len(windows)} windows of {sum(w.tokens for w in windows)} tokens"]
    s = picture.summary
    span = "" if s.span_s is None else f" over {s.span_s:.1f} s"
    parts = [
        f"{s.experts} experts in {s.layers} layers, {s.top_k} chosen by each token; {s.tokens} tokens in {s.steps} steps{span}"
    ]
    for value, form in (
        (s.distinct_per_step, "distinct experts per layer and step {:.1f}"), (s.variation, "coefficient of variation {:.2f}"),
        (s.top_fifth_share, "top 20 % get {:.1%} of choices"), (s.hottest_rank_over_mean, "hottest rank over mean {:.2f}"),
        (s.drift, f"drift {{:.3f}} from {picture.reference}"),
    ):  # fmt: skip
        if value is not None:
            parts.append(form.format(value))
    if s.layers_known < s.layers:
        parts.append(f"{s.layers - s.layers_known} layers hatched are not known: {s.unknown['layers_known']}")
    return textwrap.wrap("; ".join(parts), TOLD_WIDTH)


def _heat_map(figure: Any, grid: Any, picture: ExpertPicture) -> None:
    heat = figure.add_subplot(grid[0, 0])
    beside = figure.add_subplot(grid[0, 1], sharey=heat)
    rows = np.full((len(picture.layers), picture.summary.experts), np.nan)
    for i, layer in enumerate(picture.layers):
        if layer.load is not None:
            rows[i] = np.log2(np.maximum(layer.load, 2.0 ** -(FARTHEST + 1)))
    heat.set_facecolor("#f4f4f4")
    heat.patch.set(hatch="////", edgecolor="#bbbbbb", linewidth=0)  # seen where a layer is not known
    drawn = heat.imshow(
        rows, aspect="auto", interpolation="nearest", cmap="RdYlBu_r", vmin=-FARTHEST, vmax=FARTHEST
    )  # fmt: skip
    bar = figure.colorbar(drawn, ax=heat, location="bottom", pad=0.01, fraction=0.05, aspect=50, extend="both")
    ticks = range(-FARTHEST, FARTHEST + 1)
    bar.set_ticks(list(ticks), labels=[f"{2**t}×" if t >= 0 else f"1/{2**-t}×" for t in ticks])
    bar.set_label("expert's load over the layer's mean")
    every = -(-len(picture.layers) // LABELLED_LAYERS)
    labelled = range(0, len(picture.layers), every)
    heat.set_yticks(list(labelled), labels=[picture.layers[i].name for i in labelled], fontsize=7.5)
    heat.set(xlabel="expert", ylabel="layer")
    if picture.ranks > 1 and picture.placement == "linear":
        ranks = ranks_of_experts(picture.summary.experts, picture.ranks, picture.placement)
        for begins in np.flatnonzero(np.diff(ranks)):
            heat.axvline(begins + 0.5, color=BLACK, linewidth=0.8, linestyle=(0, (4, 3)))
        heat.set_xlabel(f"expert; dashed: {picture.ranks} ranks")
    _distinct(beside, picture)


def _distinct(axes: Any, picture: ExpertPicture) -> None:
    """Experts touched a step, a bar a layer; no bar where that is not known."""
    known = [(i, d) for i, layer in enumerate(picture.layers) if (d := layer.distinct_per_step) is not None]
    axes.tick_params(labelleft=False)
    axes.set_title("distinct a step", fontsize=9)
    axes.set_xlim(0, picture.summary.experts)
    axes.spines[["top", "right"]].set_visible(False)
    if known:
        axes.barh([i for i, _ in known], [d for _, d in known], height=0.8, color=GREEN)
        return
    why = picture.summary.unknown.get("distinct_per_step", "")
    axes.text(
        0.5, 0.5, textwrap.fill(f"not known: {why}", 18), transform=axes.transAxes, ha="center", va="center", fontsize=8
    )


def _over_time(figure: Any, grid: Any, row: int, windows: Sequence[ExpertSummary]) -> None:
    unit, unit_s = ("s", 1.0) if windows[-1].time_s - windows[0].time_s <= 1200.0 else ("min", 60.0)
    first = figure.add_subplot(grid[row, :])
    second = figure.add_subplot(grid[row + 1, :], sharex=first)
    _line(first, windows, unit_s, lambda w: w.drift, BLUE, "drift, 0 to 1")
    _line(second, windows, unit_s, lambda w: w.distinct_per_step, GREEN, "distinct experts\nper layer and step")
    first.tick_params(labelbottom=False)
    second.set_xlabel(f"time since the first window's end, {unit}")


def _line(
    axes: Any,
    windows: Sequence[ExpertSummary],
    unit_s: float,
    value: Callable[[ExpertSummary], float | None],
    colour: str,
    label: str,
) -> None:
    """A line with a dot a window; broken where the value is not known."""
    start_s = windows[0].time_s
    values = [float("nan") if (v := value(w)) is None else v for w in windows]
    axes.plot(
        [(w.time_s - start_s) / unit_s for w in windows], values, color=colour, marker="o", markersize=3, linewidth=1.4
    )
    axes.set_ylabel(label)
    known = [v for v in values if np.isfinite(v)]
    axes.set_ylim(0, 1.15 * max(known, default=0.0) or 1.0)
    if not known:
        axes.text(0.5, 0.5, "not known in any window", transform=axes.transAxes, ha="center", va="center", fontsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
