"""From judged cases to the lines of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pals.experiments.profile_checks.case import SIMULATED
from pals.experiments.profile_checks.judge import OWN_BOLD, Judged, Mark, Pick
from pals.experiments.profile_checks.line import Line
from pals.experiments.profile_checks.own import OWN
from pals.experiments.profile_checks.question import POWER, QUANTITIES, THROUGHPUT, TPOT, TTFT
from pals.experiments.profile_checks.rivals import RIVALS
from pals.experiments.profile_checks.score import added, spread_of
from pals.experiments.profile_checks.splits import EDGE, FEW, INTERIOR, LOWEST, PRIORS, RANDOM, SWEEP, UNSWEPT

NAMES = {POWER: "power", THROUGHPUT: "throughput", TPOT: "TPOT p95", TTFT: "TTFT p95"}
WHOLE_PCT = {POWER: 3.0, THROUGHPUT: 4.0, TPOT: 8.0, TTFT: 15.0}  # largest mean errors allowed
LEVEL_PCT = {POWER: 8.0, THROUGHPUT: 8.0}
ERROR_PCT = {RANDOM: WHOLE_PCT, SWEEP: WHOLE_PCT, **dict.fromkeys(INTERIOR.values(), LEVEL_PCT)}
WIDEST = 10.0  # mean width of an interval that is told by its size
COVERAGE_PCT, REGRET_PCT = (85.0, 95.0), 2.0
COVERAGE_NOTE = "share of truths in the 90 % intervals, over all cases; worst: the case with the least"
COVERED = (RANDOM, SWEEP, *INTERIOR.values())  # kinds whose intervals must hold as often as they say
TRANSFERRED = (FEW, PRIORS, UNSWEPT)  # kinds of which it is shown how often they do
CLEAR = 0.02  # a target broken by more than this is broken beyond the noise of a window
#: Figure of `Judged.costs`, what it is called, its unit, and the most allowed.
COSTS = (
    ("rows", "rows used, most", "", 50.0),
    ("file_bytes", "profile file, largest", "bytes", 8192.0),
    ("sweep_minutes", "engine time of the sweep, mean", "min", 20.0),
    ("decision_us", "prediction of all candidates of a decision, mean", "µs", 100.0),
    ("candidates", "candidates of that decision, mean", "", None),
    ("new_load_us", "the same under a load far from all before, mean", "µs", None),
    ("forecast_us", "full forecast of the same candidates, mean", "µs", None),
    ("load_ms", "loading the file, mean", "ms", 5.0),
    ("fit_ms", "one fit, mean", "ms", None),
)
Figure = Callable[[Judged, str], float | None]  # of one case and method


def lines_of(judged: Sequence[Judged]) -> list[Line]:
    """All simulated cases together, then by boards; then each measured set."""
    simulated = [j for j in judged if j.basis == SIMULATED]
    measured = [j for j in judged if j.basis != SIMULATED]
    lines = [*_section("all boards", simulated), *cost_lines(simulated)]
    groups = list(dict.fromkeys(j.group for j in simulated))
    for group in groups if len(groups) > 1 else ():
        lines += [x for x in _section(group, [j for j in simulated if j.group == group]) if x.target is not None]
    for group in dict.fromkeys(j.group for j in measured):
        lines += _section(group, [j for j in measured if j.group == group])
    return lines


def _section(title: str, judged: Sequence[Judged]) -> list[Line]:
    if not judged:
        return []
    return [
        *(line for kind in (RANDOM, SWEEP, *INTERIOR.values()) for line in _error_lines(title, judged, kind)),
        *(line for kind in (*COVERED, *TRANSFERRED) for line in _coverage_lines(title, judged, kind)),
        *_lowest_lines(title, judged),
        *(line for kind in (LOWEST, EDGE, FEW, PRIORS, UNSWEPT) for line in _error_lines(title, judged, kind)),
        *_regret_lines(title, judged),
    ]


def _error_lines(title: str, judged: Sequence[Judged], kind: str) -> list[Line]:
    """Mean absolute errors of each quantity."""
    found = []
    for quantity in QUANTITIES:
        bound = ERROR_PCT.get(kind, {}).get(quantity)
        line = _line(
            title, judged, f"{NAMES[quantity]}, {kind}", _mape(kind, quantity),
            target=None if bound is None else (0.0, bound),
            note=_refusals([m for m in _marks(judged, kind, quantity) if m]),
        )  # fmt: skip
        found += [line] if line else []
    return found


def _coverage_lines(title: str, judged: Sequence[Judged], kind: str) -> list[Line]:
    """How often 90 % intervals hold the truth."""
    found = []
    for quantity in QUANTITIES:
        marks = [m.score for m in _marks(judged, kind, quantity) if m and m.score.judged]
        total = added(marks)
        if total.coverage is None or total.width is None:
            continue
        shares = [100.0 * (m.coverage or 0.0) for m in marks]
        found.append(
            Line(
                section=title, basis=judged[0].basis, check=f"{NAMES[quantity]}, {kind}: coverage (mean width {_told_width(total.width)})",
                cases=len(marks), value=100.0 * total.coverage, median=float(np.median(shares)), worst=min(shares),
                target=COVERAGE_PCT if kind in COVERED else None, note=COVERAGE_NOTE,
            )
        )  # fmt: skip
    return found


def _lowest_lines(title: str, judged: Sequence[Judged]) -> list[Line]:
    """What became of the lowest limit: held by the interval, refused, or a confident miss."""
    found = []
    for quantity in (POWER, THROUGHPUT):
        marks = [m.score for m in _marks(judged, LOWEST, quantity) if m]
        total = added(marks)
        if not total.asked:
            continue
        missed = [100.0 * m.confident_misses / m.asked for m in marks if m.asked]
        found.append(
            Line(
                section=title, basis=judged[0].basis, check=f"{NAMES[quantity]}, {LOWEST}: confident misses",
                cases=len(marks), value=100.0 * total.confident_misses / total.asked, median=float(np.median(missed)),
                worst=max(missed), target=(0.0, 0.0),
                note=f"of {total.asked} points {total.inside} in the interval, {total.refused} refused, "
                f"{total.confident_misses} missed, by {100.0 * total.farthest:.1f} % beyond the interval at most",
            )
        )  # fmt: skip
    return found


def _told_width(width: float) -> str:
    """In per cent; a few rows with a wild tail make intervals that say nothing, which their size need not tell."""
    return f"{100.0 * width:.1f} %" if width < WIDEST else f"above {100.0 * WIDEST:.0f} %"


def _regret_lines(title: str, judged: Sequence[Judged]) -> list[Line]:
    """Tokens/J lost where the targets were kept, and targets broken that search keeps; also with the intervals left aside."""
    scenarios = max((sum(p.method == OWN for p in j.picks) for j in judged), default=0)
    choices = [p.choice for j in judged for p in j.picks if p.method == OWN]
    sure = 100.0 * float(np.mean([c.sure for c in choices])) if choices else 0.0
    note = f"up to {scenarios} scenarios a case; in {sure:.0f} % of all some point keeps every target by the pessimistic ends"
    wanted = (
        ("regret in tokens/J, targets kept", _regret, (0.0, REGRET_PCT)),
        ("regret, a point surely keeps all", _sure_regret, None),
        ("picks that break a target search keeps", _broken(0.0), (0.0, 0.0)),
        ("picks that break it by more than 2 %", _broken(CLEAR), None),
        ("loss where a broken target counts as a loss of all", _loss, None),
    )
    lines = [
        _line(title, judged, check, figure, target=target, note=note, compare=figure not in (_regret, _sure_regret))
        for check, figure, target in wanted
    ]  # each method keeps its targets in scenarios of its own: regret over those is no comparison
    bold = "with the intervals left aside, as the rivals pick"
    lines += [
        _line(
            title,
            judged,
            f"{check}, by values",
            _instead(figure),
            target=None,
            note=bold,
            compare=figure is not _regret,
        )
        for check, figure, _ in (wanted[0], wanted[2], wanted[3], wanted[4])
    ]
    return [line for line in lines if line]


def _instead(figure: Figure) -> Figure:
    """The same figure of the profile's picks by values."""
    return lambda case, method: figure(case, OWN_BOLD if method == OWN else method)


def cost_lines(judged: Sequence[Judged]) -> list[Line]:
    """What a profile takes."""
    found = []
    for name, check, unit, most in COSTS:
        values = [j.costs[name] for j in judged if name in j.costs]
        if not values:
            continue
        mean, median, worst = spread_of(values)
        found.append(
            Line(
                section="cost", basis=SIMULATED, check=check, cases=len(values), unit=unit,
                value=worst if check.endswith(("most", "largest")) else mean, median=median, worst=worst,
                target=None if most is None else (0.0, most),
            )
        )  # fmt: skip
    return found


def _line(
    title: str,
    judged: Sequence[Judged],
    check: str,
    figure: Figure,
    *,
    target: tuple[float, float] | None,
    note: str,
    compare: bool = True,
) -> Line | None:
    """The profile's figure over all cases, and everybody's over the cases that the rivals were judged on."""
    mine = [v for j in judged if (v := figure(j, OWN)) is not None]
    if not mine:
        return None
    rivals, beside = _compared(judged, figure) if compare else ({}, None)
    mean, median, worst = spread_of(mine)
    return Line(
        section=title, basis=judged[0].basis, check=check, cases=len(mine), value=mean, median=median, worst=worst,
        target=target, beside=beside, rivals=rivals, note=note,
    )  # fmt: skip


def _compared(judged: Sequence[Judged], figure: Figure) -> tuple[dict[str, float], float | None]:
    """Means over the cases in which every method has a figure."""
    table = [[figure(j, method) for method in (OWN, *RIVALS)] for j in judged]
    whole = [[v for v in row if v is not None] for row in table if None not in row]
    if not whole:
        return {}, None
    means = np.mean(np.array(whole), axis=0)
    return dict(zip(RIVALS, (float(v) for v in means[1:]), strict=True)), float(means[0])


def _marks(judged: Sequence[Judged], kind: str, quantity: str) -> list[Mark | None]:
    return [_mark(j, kind, OWN, quantity) for j in judged]


def _mark(case: Judged, kind: str, method: str, quantity: str) -> Mark | None:
    wanted = (kind, method, quantity)
    return next((m for m in case.marks if (m.kind, m.method, m.quantity) == wanted), None)


def _mape(kind: str, quantity: str) -> Figure:
    def figure(case: Judged, method: str) -> float | None:
        mark = _mark(case, kind, method, quantity)
        return None if mark is None or mark.shared.mape is None else 100.0 * mark.shared.mape

    return figure


def _regret(case: Judged, method: str) -> float | None:
    kept = [p.choice.regret for p in _picks(case, method) if not p.choice.excess and not p.choice.declined]
    return 100.0 * float(np.mean(kept)) if kept else None


def _sure_regret(case: Judged, method: str) -> float | None:
    kept = [p.choice.regret for p in _picks(case, method) if p.choice.sure and not p.choice.excess]
    return 100.0 * float(np.mean(kept)) if kept else None


def _loss(case: Judged, method: str) -> float | None:
    """Of the best tokens/J, over all scenarios."""
    picks = [p.choice for p in _picks(case, method)]
    return 100.0 * float(np.mean([1.0 if c.excess or c.declined else c.regret for c in picks])) if picks else None


def _broken(beyond: float) -> Figure:
    def figure(case: Judged, method: str) -> float | None:
        picks = _picks(case, method)
        return 100.0 * float(np.mean([p.choice.excess > beyond for p in picks])) if picks else None

    return figure


def _picks(case: Judged, method: str) -> list[Pick]:
    return [p for p in case.picks if p.method == method]


def _refusals(marks: Sequence[Mark]) -> str:
    total = added(m.score for m in marks)
    return f"{total.refused} of {total.asked} points refused, compared on the others" if total.refused else ""
