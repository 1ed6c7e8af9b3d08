"""A profile drawn: frontier, iso-latency lines, best point per load, residuals. Lines are predictions, crosses are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.core.errors import INSTALL, ConfigError
from pals.core.load import Load, Mix
from pals.core.quantities import OperatingPoint
from pals.models.fitted import Fitted
from pals.models.observed import OBSERVED, conditions_of, observations_of, told
from pals.models.parameters import values_of
from pals.models.profile import Profile
from pals.views.figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE
from pals.views.profile_points import BestPoint, best_points, known_of, number, tokens_per_j
from pals.views.profile_text import QUANTITY_WORDS, SOURCES, printable

FloatArray = NDArray[np.float64]

LEVELS = 24  # of each lever between what was measured, on the lines
CONTOURS = 8
LOADS = tuple(0.05 * i for i in range(1, 21))
RESIDUALS = ("power_w", "tokens_per_s", "step_s", "tpot_p95_s", "ttft_p95_s", "sm_clock_mhz")
MARKS = ("o", "s", "^", "D")
COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
SMALL = 9
CROSSES: dict[str, Any] = {
    "color": BLACK, "marker": "x", "linestyle": "none", "markersize": 7, "label": "measured rows",
}  # fmt: skip


class Pictured(NamedTuple):
    """What is drawn."""

    model: Fitted
    mix: Mix
    node: bool

    @property
    def rows(self) -> list[Any]:
        """Those measured with the mix drawn."""
        return [r for r in self.model.rows if self.model.mixes[r.mix] == self.mix]


def draw_profile(profile: Profile, mix: Mix, path: Path, *, node: bool) -> None:
    """Write the figure; its kind is that of the suffix.

    Raises:
        ConfigError: matplotlib is not installed.
        OutsideProfileError: `mix` lies too far from what was measured.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as e:
        raise ConfigError(f"matplotlib is not installed; {INSTALL}") from e
    it = Pictured(profile.model(), mix, node)
    below_titles = ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 0.92), h_pad=0.1, w_pad=0.1)
    figure = Figure(figsize=(14.6, 11.4), layout=below_titles, dpi=110)
    f = profile.fingerprint
    figure.text(
        0.01, 0.985, printable(f"{f.model} on {f.boards} × {f.board}"), va="top", fontsize=15, fontweight="bold"
    )
    figure.text(0.01, 0.955, printable(_subtitle(profile, mix)), va="top", fontsize=11, color="#444444")
    grid = figure.add_gridspec(2, 2)
    _frontier(figure, figure.add_subplot(grid[0, 0]), it)
    _iso_latency(figure.add_subplot(grid[0, 1]), it)
    _best(figure, grid[1, 0].subgridspec(4, 1, hspace=0.0), it)
    _residuals(figure.add_subfigure(grid[1, 1]), it.model)
    figure.savefig(path)


def _subtitle(profile: Profile, mix: Mix) -> str:
    return (
        f"{SOURCES.get(profile.source, profile.source.upper())}; {len(profile.rows)} rows, {profile.made_at}.  "
        f"Mix {mix.name}: {mix.prompt_tokens:.0f} prompt and {mix.output_tokens:.0f} output tokens, enough work, nothing queued"
    )


def _house(axes: Any, title: str = "") -> None:
    if title:
        axes.set_title(title, fontsize=12.5, loc="left")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


class _Span(NamedTuple):
    """Levels between what was measured of each lever."""

    limits_w: FloatArray
    locks_mhz: FloatArray
    sequences: list[int]  # those measured that differ: more than the KV cache holds are the same


def _span(it: Pictured) -> _Span:
    rows, model = it.model.rows, it.model
    limits = [r.power_limit_w for r in rows if r.sm_clock_lock_mhz is None] or [r.power_limit_w for r in rows]
    locks = [r.sm_clock_lock_mhz for r in rows if r.sm_clock_lock_mhz is not None]
    most = model.kv_tokens / it.mix.context_tokens
    levels = sorted({r.active_sequences for r in rows})
    held = [n for n in levels if n <= most] + [n for n in levels if n > most][:1]
    return _Span(
        np.linspace(min(limits), max(limits), LEVELS),
        np.linspace(min(locks), max(locks), LEVELS) if locks else np.array([]),
        held,
    )


def _frontier(figure: Any, axes: Any, it: Pictured) -> None:
    span, front = _span(it), list[tuple[float, float]]()
    colours: Any = None
    for n in span.sequences:
        drawn, colours = _batch(axes, it, span, n)
        front += drawn
    axes.plot(*zip(*pareto(front), strict=True), color=BLACK, linewidth=1.8, zorder=4, label="Pareto front")
    if it.rows and not it.node:
        seen = [(r.tokens_per_s, r.tokens_per_s / r.power_w) for r in it.rows]
        axes.plot(*zip(*seen, strict=True), **CROSSES, zorder=5)
    bar = figure.colorbar(colours, ax=axes, pad=0.01, aspect=40)
    bar.set_label("power limit, W per board (no lock)", fontsize=SMALL)
    bar.outline.set_visible(False)
    axes.set(xlabel="throughput, output tokens/s", ylabel=f"output tokens/J of the {'node' if it.node else 'boards'}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _house(axes, "Frontier; numbers: active sequences")
    axes.legend(frameon=False, fontsize=SMALL, loc="upper left")


def _batch(axes: Any, it: Pictured, span: _Span, n: int) -> tuple[list[tuple[float, float]], Any]:
    """One batch under all limits and locks: what was drawn, and the coloured dots."""
    x, y = _line(it, [OperatingPoint(power_limit_w=w, active_sequences=n) for w in span.limits_w.tolist()])
    axes.plot(x, y, color="#bbbbbb", linewidth=1.0, zorder=1)
    dots = axes.scatter(x, y, c=span.limits_w, cmap=_shades("viridis_r", 0.1, 1.0), s=16, zorder=3, linewidths=0)
    drawn = list(zip(x, y, strict=True))
    if len(span.locks_mhz):
        top = OperatingPoint(power_limit_w=float(span.limits_w[-1]), active_sequences=n)
        x, y = _line(it, [replace(top, sm_clock_mhz=round(mhz)) for mhz in span.locks_mhz.tolist()])
        label = f"clock locks at {top.power_limit_w:.0f} W" if n == span.sequences[0] else None
        axes.plot(x, y, color=ORANGE, linewidth=0.9, marker="d", markersize=3.0, zorder=2, label=label)
        drawn += zip(x, y, strict=True)
    beside = {"xytext": (-7, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
    axes.annotate(f"{n}", min(drawn), fontsize=SMALL, color=GREY, **beside)
    return drawn, dots


def _line(it: Pictured, points: Sequence[OperatingPoint]) -> tuple[list[float], list[float]]:
    """Throughput and tokens per joule of points."""
    f = it.model.forecast(points, Load(mix=it.mix))
    return f.tokens_per_s.value.tolist(), tokens_per_j(f, node=it.node).value.tolist()


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other one beats in both, by falling first figure."""
    front = list[tuple[float, float]]()
    for x, y in sorted(points, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _iso_latency(axes: Any, it: Pictured) -> None:
    span = _span(it)
    low, high = span.sequences[0], span.sequences[-1]
    levels = np.unique(np.rint(np.geomspace(low, high, LEVELS)).astype(int))
    if len(levels) > 1 and len(np.unique(span.limits_w)) > 1:
        points = [
            OperatingPoint(power_limit_w=w, active_sequences=int(n)) for w in span.limits_w.tolist() for n in levels
        ]
        f = it.model.forecast(points, Load(mix=it.mix))
        tpot_ms = 1e3 * f.tpot_p95_s.value.reshape(len(span.limits_w), len(levels))
        at = round_levels(float(tpot_ms.min()), float(tpot_ms.max()))
        lines = axes.contour(
            levels, span.limits_w, tpot_ms, levels=at, cmap=_shades("plasma", 0.0, 0.75), linewidths=1.6
        )
        axes.clabel(lines, fmt=lambda ms: f"{number(ms)} ms", fontsize=SMALL, inline=True)
        natural_w = f.natural_draw_w.value.reshape(tpot_ms.shape)[0] / it.model.facts.boards
        axes.plot(levels, natural_w, color=GREY, linestyle="--", linewidth=1.5, label="natural draw")
    rows = [r for r in it.rows if r.sm_clock_lock_mhz is None]
    if rows:
        axes.plot([r.active_sequences for r in rows], [r.power_limit_w for r in rows], **CROSSES, clip_on=False)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 1.08, 1.08 * high)
    axes.xaxis.set_major_formatter(lambda n, _: f"{n:.0f}")
    axes.set(xlabel="active sequences", ylabel="power limit, W per board (no lock)")
    span_w = float(span.limits_w[-1] - span.limits_w[0])
    axes.set_ylim(float(span.limits_w[0]) - 0.03 * span_w - 1, float(span.limits_w[-1]) + 0.03 * span_w + 1)
    _house(axes, "Iso-latency lines: TPOT p95")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, fontsize=SMALL, loc="upper left", bbox_to_anchor=(0.0, -0.1), ncols=2, borderaxespad=0.0
        )


def round_levels(low: float, high: float) -> list[float]:
    """At most `CONTOURS` levels between two positive figures, evenly by ratio, of two significant digits; at least one."""
    inner = np.geomspace(low, high, CONTOURS + 2)[1:-1]
    return sorted({float(f"{v:.2g}") for v in inner.tolist()})


def _best(figure: Any, cells: Any, it: Pictured) -> None:
    known = known_of(it.model, it.mix)
    found = best_points(known, node=it.node, shares=LOADS)
    was = float(tokens_per_j(known.reference, node=it.node).value[0])
    load, nan = [100 * b.load_ratio for b in found], float("nan")
    axes = [figure.add_subplot(cells[i]) for i in range(4)]
    _gain(axes[0], load, found, was)
    levers = [(nan, nan, nan, nan) if b.best is None else (
        b.best.power_limit_w, b.best.predicted["sm_clock_mhz"].value, b.best.sm_clock_lock_mhz or nan, b.best.active_sequences,
    ) for b in found]  # fmt: skip
    limits, clocks, locks, sequences = zip(*levers, strict=True)
    axes[1].step(load, limits, where="mid", color=ORANGE, linewidth=1.8)
    axes[2].step(load, clocks, where="mid", color=BLUE, linewidth=1.8, label="predicted")
    axes[2].plot(load, locks, color=BLUE, marker="o", markersize=4, linestyle="none", label="locked")
    axes[2].legend(frameon=False, fontsize=SMALL, loc="lower right", ncols=2)
    axes[3].step(load, sequences, where="mid", color=PURPLE, linewidth=1.8)
    facts, missing = it.model.facts, [x for x, b in zip(load, found, strict=True) if b.best is None]
    tops = (None, facts.max_limit_w, facts.max_sm_clock_mhz, facts.launch_sequences)
    words = (f"tokens/J\n{'node' if it.node else 'boards'}", "limit\nW", "SM clock\nMHz", "active\nsequences")
    for a, label, top in zip(axes, words, tops, strict=True):
        a.set_ylabel(label, fontsize=SMALL)
        a.set_ylim(0, None if top is None else 1.12 * top)
        a.set_xlim(2.5, 102.5)
        a.tick_params(labelbottom=a is axes[3], labelsize=SMALL)
        if missing:
            a.axvspan(min(missing) - 2.5, 102.5, color="#eeeeee", linewidth=0, zorder=0)
        _house(a)
    title = f"Best point per load{'; grey: no point surely keeps it' if missing else ''}"
    axes[0].set_title(title, fontsize=12.5, loc="left")
    axes[3].set_xlabel("load, % of the largest throughput")
    figure.align_ylabels(axes)


def _gain(axes: Any, load: Sequence[float], found: Sequence[BestPoint], was: float) -> None:
    """Tokens per joule with their interval, and the reference's."""
    nan = float("nan")
    ends = [(nan, nan, nan) if (e := b.tokens_per_j) is None else (e.value, e.low, e.high) for b in found]
    value, low, high = zip(*ends, strict=True)
    axes.plot(load, value, color=GREEN, linewidth=1.8)
    axes.fill_between(load, low, high, color=GREEN, alpha=0.18, linewidth=0)
    axes.axhline(was, color=GREY, linestyle="--", linewidth=1.3, label="found limit, launch batch")
    axes.legend(frameon=False, fontsize=SMALL, loc="lower left")


def _residuals(figure: Any, model: Fitted) -> None:
    expected = np.exp(
        told(values_of(model.x), model.base, conditions_of(model.rows, model.mixes, model.facts.step_tokens))
    )
    ratio = np.exp(observations_of(model.rows)) / expected
    mix = np.array([r.mix for r in model.rows])
    grid, handles = figure.subplots(2, 3), list[Any]()
    for i, name in enumerate(RESIDUALS):
        axes = grid[i // 3][i % 3]
        words, unit, factor = QUANTITY_WORDS[name]
        q = OBSERVED.index(name)
        axes.axhline(1.0, color=BLACK, linewidth=1.0)
        drawn = [
            axes.plot(factor * expected[q, mix == m], ratio[q, mix == m], linestyle="none", alpha=0.85, markersize=4.5,
                      marker=MARKS[m % len(MARKS)], color=COLOURS[m % len(COLOURS)], label=model.mixes[m].name)[0]
            for m in range(len(model.mixes))
        ]  # fmt: skip
        handles = handles or drawn
        low, high = np.nanmin(ratio[q], initial=0.98), np.nanmax(ratio[q], initial=1.02)
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        axes.set_title(words.split(",")[0], fontsize=10, loc="left")
        axes.set_xlabel(f"predicted, {unit}", fontsize=SMALL)
        axes.tick_params(labelsize=SMALL)
        if (known := np.isfinite(ratio[q])).any():
            _spread_axis(axes, factor * expected[q][known])
        else:
            axes.text(0.5, 0.8, "not measured", transform=axes.transAxes, ha="center", fontsize=SMALL, color=GREY)
        if i % 3 == 0:
            axes.set_ylabel("measured / predicted", fontsize=SMALL)
        _house(axes)
    figure.suptitle("Residuals of the fitted rows", fontsize=12.5, x=0.02, ha="left")
    figure.legend(
        handles=handles, frameon=False, fontsize=SMALL, loc="outside lower center", ncols=4, handletextpad=0.1
    )


def _spread_axis(axes: Any, values: FloatArray) -> None:
    """Logarithmic where figures span more than a factor of five; ticks at 1, 2 and 5 within a decade or so, else at 1."""
    from matplotlib.ticker import LogLocator, NullFormatter

    times = float(values.max() / values.min())
    if times <= 5:
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if times < 10 else (1.0, 3.0) if times < 40 else (1.0,))
    )
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _shades(name: str, low: float, high: float) -> Any:
    """Part of a colour map: without what is too pale on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[name](np.linspace(low, high, 128)))
