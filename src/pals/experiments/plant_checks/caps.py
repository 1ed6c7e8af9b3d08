"""Throughput, power and clock against a power limit or a clock lock: two rows of a sweep calibrate, the plant says the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from pals.experiments.plant_checks.row import CheckRow, Residual, error_row
from pals.experiments.plant_checks.sweep_fit import (
    Rows,
    calibrate,
    constants,
    fit_board,
    fit_spread,
    fit_voltage,
    given,
    settled,
    sustained_mhz,
)
from pals.experiments.plant_checks.sweeps import Floats, Sweep, read_lock_grid, read_sweeps
from pals.plant.silicon import Silicon
from pals.plant.specs import board_specs
from pals.plant.steady import Settled

TOKENS_PCT, POWER_PCT, LOCK_PCT, CLOCK_PCT = 4.0, 3.0, 4.0, 5.0  # largest mean absolute errors allowed
SPLIT = "calibrated on two settings of each sweep (highest, and lowest + 1/6 of the range)"
THINNED = 7  # settings of a sweep among which all pairs are tried
PLATEAU_NOTE = (
    "RTX 3090: firmware holds 327-354 W for every limit from about 340 to 370 W and is free again at 380 W; no rule of "
    "power or voltage says so, it is left in the error"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A sweep with what its calibration rows said, and what the plant predicts of its other rows."""

    sweep: Sweep
    unknowns: Floats
    rows: Rows  # those predicted
    says: Settled


def check(folder: Path) -> list[CheckRow]:
    """Errors on the rows that did not calibrate, then with every other choice of calibration rows.

    Raises:
        ConfigError: data that cannot be read.
    """
    every = read_sweeps(folder)
    known = [s for s in every if s.board in board_specs()]
    skipped = sorted({s.gpu for s in every} - {s.gpu for s in known})
    note = f"left out, no constants of the board: {', '.join(skipped)}" if skipped else ""
    calibrated = [c for c in (_calibrated(s) for s in known) if c is not None and len(c.rows)]
    rows = [*_limit_rows(calibrated, note), *_lock_rows(calibrated)]
    return [*rows, *_other_choices([c.sweep for c in calibrated])]


def fit(folder: Path) -> dict[str, Any]:
    """`steady_constants.json` anew: constants of the boards and unknowns of the sweeps, from calibration rows alone.

    The boards' constants stand in `board_specs.json` too, where the plant reads them; a test holds them together.
    """
    sweeps, (knee, curvature) = read_sweeps(folder), fit_voltage(read_lock_grid(folder))
    spread = _short(fit_spread([s for s in sweeps if s.board in given()["boards"]]))
    found: dict[str, Any] = {"spread": spread, "boards": {}, "sweeps": {}}
    for board, priors in given()["boards"].items():
        mine = [s for s in sweeps if s.board == board and len(s.setting) > 2]
        rows = [s.calibration() for s in mine]
        k = _with_voltage(board_specs()[board].silicon, priors["voltage"], knee, curvature)
        top_mhz = sustained_mhz(board_specs()[board], mine, rows)
        silicon, _ = fit_board(board, mine, rows, k, spread=spread, top_mhz=top_mhz)
        silicon = Silicon(*map(_short, silicon))
        found["boards"][board] = {"sustained_mhz": top_mhz, "silicon": silicon._asdict()}
        for s, r in zip(mine, rows, strict=True):
            unknowns = calibrate(s, r[None, :], silicon, spread=spread, top_mhz=top_mhz)[:, 0]
            found["sweeps"][s.key] = {"calibration": s.setting[r].tolist(), "unknowns": [_short(u) for u in unknowns]}
    return {**constants(), "found": found}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _with_voltage(k: Silicon, voltage: dict[str, Any], knee: float, curvature: float) -> Silicon:
    if voltage.get("from_lock_grid"):
        return k._replace(knee_ghz=_short(knee), voltage_per_ghz=0.0, voltage_per_ghz2=_short(curvature))
    return k._replace(voltage_per_ghz=voltage["slope"], voltage_per_ghz2=voltage["curvature"])


def _world(board: str) -> dict[str, Any]:
    """What `settled` and `calibrate` need of a board: constants, spread, and the clock nothing holds down."""
    spec, found = board_specs()[board], constants()["found"]
    top_mhz = found["boards"].get(board, {}).get("sustained_mhz", float(spec.max_sm_clock_mhz))
    return {"k": spec.silicon, "spread": found["spread"], "top_mhz": top_mhz}


def _calibrated(sweep: Sweep) -> Calibrated | None:
    """With the committed calibration where there is one, else with the sweep's own two rows; None: too few rows."""
    world, stored = _world(sweep.board), constants()["found"]["sweeps"].get(sweep.key)
    if stored:
        used, unknowns = sweep.rows_at(stored["calibration"]), np.array(stored["unknowns"])
    elif len(sweep.setting) > 2:
        used = sweep.calibration()
        unknowns = calibrate(sweep, used[None, :], **world)[:, 0]
    else:
        return None
    rows = np.delete(np.arange(len(sweep.setting)), used)
    return Calibrated(sweep=sweep, unknowns=unknowns, rows=rows, says=settled(sweep, rows, unknowns=unknowns, **world))


def _residuals(
    found: Sequence[Calibrated], measured: Callable[[Sweep], Floats], said: Callable[[Settled], Any]
) -> list[Residual]:
    return [
        Residual(group=c.sweep.name, x=float(x), measured=float(m), predicted=float(p))
        for c in found
        for x, m, p in zip(c.sweep.setting[c.rows], measured(c.sweep)[c.rows], said(c.says), strict=True)
        if np.isfinite(m)
    ]


def _limit_rows(calibrated: Sequence[Calibrated], note: str) -> list[CheckRow]:
    """Throughput, power and clock against the limit: a row each for a board and a kind of model."""
    groups: dict[tuple[str, str], list[Calibrated]] = defaultdict(list)
    for c in calibrated:
        if not c.sweep.lock:
            groups[c.sweep.gpu, {"moe": "MoE"}.get(c.sweep.kind, c.sweep.kind)].append(c)
    rows = []
    for (gpu, kind), found in groups.items():
        said = {"data": f"{found[0].sweep.data}, {SPLIT}", "x_axis": found[0].sweep.x_axis}
        notes = "; ".join(n for n in (note, PLATEAU_NOTE if "3090" in gpu else "") if n)
        rows += _three_rows(f"{{}} against limit, {gpu}, {kind}", found, (TOKENS_PCT, POWER_PCT), note=notes, **said)
    return rows


def _lock_rows(calibrated: Sequence[Calibrated]) -> list[CheckRow]:
    found = [c for c in calibrated if c.sweep.lock]
    if not found:
        return []
    said = {"data": f"{found[0].sweep.data}, {SPLIT}", "x_axis": found[0].sweep.x_axis}
    note = "the lowest lock, 180 MHz, included; below about 1.5 GHz this engine loses less than the clock does"
    return _three_rows(
        f"{{}} against clock lock, {found[0].sweep.gpu}", found, (LOCK_PCT, LOCK_PCT), note=note, clock=False, **said
    )


def _three_rows(
    title: str, found: Sequence[Calibrated], bounds: tuple[float, float], *, clock: bool = True, **said: Any
) -> list[CheckRow]:
    tokens = _residuals(found, lambda s: s.tokens_s, lambda p: 1.0 / p.step_s)
    power = _residuals(found, lambda s: s.draw_w, lambda p: p.power_w)
    clocks = _residuals(found, lambda s: s.clock_mhz, lambda p: p.clock_mhz) if clock else []
    rows = [
        error_row(title.format("throughput"), residuals=tokens, at_most=bounds[0], **said),
        error_row(title.format("power"), residuals=power, at_most=bounds[1], **said),
    ]
    return [*rows, error_row(title.format("SM clock"), residuals=clocks, at_most=CLOCK_PCT, **said)] if clocks else rows


def _other_choices(sweeps: Sequence[Sweep]) -> list[CheckRow]:
    """Every pair of (thinned) settings calibrates instead; and all settings but one. The boards' constants stay."""
    sweeps = [s for s in sweeps if len(s.setting) > 2]
    if not sweeps:
        return []
    pairs, others = _errors(sweeps, _pairs), _errors(sweeps, _all_but_one)
    data = "all sweeps; only the sweep's three unknowns are calibrated anew"
    return [
        CheckRow(
            check=f"{name}, {choice}", data=data, value=float(np.mean(errors[i])), worst=float(np.max(errors[i])),
            cases=len(errors[i]), target=(0.0, bound), note=note,
        )
        for choice, errors, note in (
            ("any two settings calibrate", pairs, "value: mean over the pairs of a pair's mean error; worst: the worst pair"),
            ("all settings but one calibrate", others, "the error at the one left out"),
        )
        for i, (name, bound) in enumerate((("throughput", TOKENS_PCT), ("power", POWER_PCT)))
    ]  # fmt: skip


def _errors(sweeps: Sequence[Sweep], choose: Callable[[Sweep], Rows]) -> tuple[list[float], list[float]]:
    """Mean absolute errors of throughput and power, %, on the rows left out, for each choice of calibration rows."""
    tokens: list[float] = []
    power: list[float] = []
    for s in sweeps:
        world, chosen = _world(s.board), choose(s)
        unknowns = calibrate(s, chosen, **world)
        every = np.broadcast_to(np.arange(len(s.setting)), (len(chosen), len(s.setting)))
        says = settled(s, every, unknowns=unknowns[:, :, None], **world)
        out = np.array([~np.isin(np.arange(len(s.setting)), r) for r in chosen])
        for into, error in ((tokens, 1.0 / says.step_s / s.tokens_s - 1.0), (power, says.power_w / s.draw_w - 1.0)):
            into += [float(100.0 * np.abs(e[o]).mean()) for e, o in zip(error, out, strict=True)]
    return tokens, power


def _pairs(sweep: Sweep) -> Rows:
    thinned = np.unique(np.linspace(0, len(sweep.setting) - 1, THINNED).round().astype(int))
    return np.array(list(combinations(thinned, 2)))


def _all_but_one(sweep: Sweep) -> Rows:
    n = len(sweep.setting)
    return np.array([np.delete(np.arange(n), i) for i in range(n)])
