"""The comparison figure: one column a run, rows for power, active sequences and throughput; readable without a caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pals.core.errors import INSTALL, ConfigError

#: Okabe and Ito's colours, told apart by colour-blind readers; the dashed lines differ in shape as well.
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
BLACK, GREY = "#000000", "#777777"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSeries:
    """A run over time; all sequences have the length of `time_s`."""

    name: str
    time_s: Sequence[float]
    power_w: Sequence[float]
    limit_w: Sequence[float]  # sum of the enforced limits
    budget_w: Sequence[float | None]
    active_limit: Sequence[int]
    running: Sequence[int]
    waiting: Sequence[int]
    tokens_per_s: Sequence[float]
    target_tokens_per_s: float | None

    def __post_init__(self) -> None:
        lengths = {
            f.name: len(getattr(self, f.name)) for f in fields(self) if f.name not in ("name", "target_tokens_per_s")
        }
        if len(set(lengths.values())) != 1 or not self.time_s:
            raise ValueError(f"the series of {self.name!r} must be of one length and not empty: {lengths}")


def draw_runs(runs: Sequence[RunSeries], path: Path, *, title: str, subtitle: str) -> None:
    """Write the figure as PNG.

    Raises:
        ConfigError: matplotlib is not installed.
        ValueError: there is no run to draw.
    """
    if not runs:
        raise ValueError("there is no run to draw")
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as e:
        raise ConfigError(f"matplotlib is not installed; {INSTALL}") from e
    below_titles = ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 0.92), h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(max(9.0, 1.8 + 4.6 * len(runs)), 8.6), layout=below_titles, dpi=130)
    figure.text(0.01, 0.985, title, va="top", fontsize=15, fontweight="bold")
    figure.text(0.01, 0.947, subtitle, va="top", fontsize=11, color="#444444")
    unit, unit_s = _time_unit(max(max(run.time_s) for run in runs))
    runs = [replace(run, time_s=[t / unit_s for t in run.time_s]) for run in runs]
    grid = figure.subplots(3, len(runs), sharex=True, sharey="row", squeeze=False)
    for column, run in enumerate(runs):
        grid[0][column].set_title(run.name, fontsize=12.5, loc="left")
        _power(grid[0][column], run)
        _sequences(grid[1][column], run)
        _throughput(grid[2][column], run)
        grid[2][column].set_xlabel(f"time since the first request, {unit}")
    for row, label in enumerate(["power of all boards, W", "sequences", "throughput, output tokens/s"]):
        grid[row][0].set_ylabel(label)
        for axes in grid[row]:
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.grid(color="#e6e6e6", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = _legend_of(grid[row])
        grid[row][-1].legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=10)
    figure.align_ylabels(grid[:, 0])
    figure.savefig(path)


def _time_unit(span_s: float) -> tuple[str, float]:
    """The unit of the time axis, and its seconds."""
    return ("s", 1.0) if span_s <= 1200.0 else ("min", 60.0) if span_s <= 4 * 3600.0 else ("h", 3600.0)


def _legend_of(row: Sequence[Any]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axes in row:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _power(axes: Any, run: RunSeries) -> None:
    budget = [float("nan") if b is None else b for b in run.budget_w]
    axes.fill_between(run.time_s, run.power_w, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(run.time_s, run.power_w, color=BLUE, linewidth=1.5, label="power drawn")
    axes.step(run.time_s, run.limit_w, where="post", color=ORANGE, linewidth=1.8, label="power limits in force")
    if any(b is not None for b in run.budget_w):
        axes.step(run.time_s, budget, where="post", color=BLACK, linewidth=1.3, linestyle=(0, (4, 3)), label="budget")


def _sequences(axes: Any, run: RunSeries) -> None:
    axes.step(run.time_s, run.active_limit, where="post", color=ORANGE, linewidth=1.8, label="active-sequence limit")
    axes.plot(run.time_s, run.running, color=GREEN, linewidth=1.5, label="running")
    axes.plot(run.time_s, run.waiting, color=PURPLE, linewidth=1.3, label="waiting")


def _throughput(axes: Any, run: RunSeries) -> None:
    axes.plot(run.time_s, run.tokens_per_s, color=GREEN, linewidth=1.5, label="throughput")
    if run.target_tokens_per_s is not None:
        axes.axhline(run.target_tokens_per_s, color=GREY, linestyle="--", linewidth=1.5, label="target")
