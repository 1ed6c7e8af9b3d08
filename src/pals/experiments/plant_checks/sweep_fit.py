"""What a sweep's calibration rows say of its work, and what those of all sweeps of a board say of its silicon.

A sweep has three unknowns (time, share of it that follows the clock, activity), a board five or six; each has a prior, so that
two rows are enough, with or without a measured clock. Least squares of relative errors over noise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pals.experiments.plant_checks.sweeps import Floats, Sweep
from pals.plant.silicon import Silicon
from pals.plant.specs import BoardSpec, board_specs
from pals.plant.steady import Settled, Work, settle_spread

UNKNOWNS = 3  # of a sweep: log kernel seconds a token at the top clock, log core time over memory time there, activity
LOW, HIGH = (-np.inf, -3.0, 0.0), (np.inf, 4.0, 1.0)
FITTED = ("static_w", "tree_w_per_ghz", "busy_w_per_ghz", "memory_w_per_ghz", "hbm_w", "knee_ghz")
BINDS = 0.97  # a mean draw above this share of the limit is held down by it
P99_DEVIATIONS = 2.326
Rows = NDArray[np.intp]


@cache
def constants() -> dict[str, Any]:
    """`steady_constants.json`."""
    return dict(json.loads((files("pals.plant") / "steady_constants.json").read_text(encoding="utf-8")))


def given() -> dict[str, Any]:
    """Its part that no fit changes."""
    return dict(constants()["given"])


def work_of(sweep: Sweep, unknowns: Floats) -> Work:
    """A token's share of a step; `unknowns` has shape (3, ...)."""
    p = given()["overlap"]["sequence" if sweep.one_after_the_other else "decode"]["value"]
    ratio = np.exp(unknowns[1])
    memory_s = np.exp(unknowns[0]) / (1.0 + ratio**p) ** (1.0 / p)
    top_mhz = board_specs()[sweep.board].max_sm_clock_mhz
    return Work(memory_s, memory_s * ratio, 0.0, p, unknowns[2], float(top_mhz))


def settled(sweep: Sweep, rows: Rows, k: Silicon, unknowns: Floats, *, spread: float, top_mhz: float) -> Settled:
    """What the plant says of `rows` (any shape); `unknowns` has shape (3, ...) and broadcasts against them."""
    spec, setting = board_specs()[sweep.board], sweep.setting[rows]
    floor_mhz = setting if sweep.lock else float(spec.min_sm_clock_mhz)
    return settle_spread(
        k, work_of(sweep, unknowns), spread=spread, limit_w=spec.max_limit_w if sweep.lock else setting,
        floor_mhz=floor_mhz if not sweep.lock else float(spec.min_sm_clock_mhz), ceiling_mhz=setting if sweep.lock else top_mhz,
    )  # fmt: skip


def misfit(sweep: Sweep, rows: Rows, k: Silicon, unknowns: Floats, *, spread: float, top_mhz: float) -> Floats:
    """Residuals over noise of `rows`, shape (n, m), and the priors of `unknowns`, shape (3, n); returns (n, ...)."""
    g, noise = given(), given()["noise"]
    s = settled(sweep, rows, k, unknowns[:, :, None], spread=spread, top_mhz=top_mhz)
    parts = [np.log(sweep.tokens_s[rows] * s.step_s) / noise["tokens_s"]]
    parts.append((s.power_w / sweep.draw_w[rows] - 1.0) / noise["power"])
    clock = sweep.clock_mhz[rows]
    if not sweep.lock:
        parts.append(
            np.where(np.isfinite(clock), np.log(s.clock_mhz / np.where(clock > 0, clock, 1.0)), 0.0) / noise["clock"]
        )
    ratio, activity = g["core_over_memory"], g["activity"]
    priors = [
        (unknowns[1] - np.log(ratio["value"])) / ratio["log_sigma"],
        (unknowns[2] - activity["value"]) / activity["sigma"],
    ]
    return np.concatenate([*parts, np.stack(priors, axis=1)], axis=1)


def first_guess(sweep: Sweep, rows: Rows) -> Floats:
    """Unknowns to start from, shape (3, n) for rows (n, m)."""
    g = given()
    seconds = np.log(1.0 / sweep.tokens_s[rows].max(axis=1))
    ones = np.ones(len(rows))
    return np.stack([seconds, ones * np.log(g["core_over_memory"]["value"]), ones * g["activity"]["value"]])


def calibrate(sweep: Sweep, rows: Rows, k: Silicon, *, spread: float, top_mhz: float) -> Floats:
    """The unknowns of a sweep, shape (3, n), from each of n sets of calibration rows (n, m), independently."""
    from scipy.optimize import least_squares
    from scipy.sparse import block_diag

    n = len(rows)
    start = first_guess(sweep, rows)
    each = misfit(sweep, rows, k, start, spread=spread, top_mhz=top_mhz).shape[1]

    def residuals(x: Floats) -> Floats:
        return misfit(sweep, rows, k, x.reshape(n, UNKNOWNS).T, spread=spread, top_mhz=top_mhz).ravel()

    found = least_squares(
        residuals, start.T.ravel(), bounds=(np.tile(LOW, n), np.tile(HIGH, n)), x_scale=0.3, diff_step=1e-4, max_nfev=100, ftol=1e-7,
        jac_sparsity=block_diag([np.ones((each, UNKNOWNS))] * n) if n > 1 else None,
    )  # fmt: skip
    return np.asarray(found.x).reshape(n, UNKNOWNS).T


def fit_voltage(grid: Sequence[Sweep]) -> tuple[float, float] | None:
    """Knee (GHz) and curvature (GHz⁻²) of v = 1 + q (f − f0)² from sweeps of the clock at reduced memory clocks.

    Needs no model of time: what the core does in a second follows the measured throughput r, so at each memory clock
    P = S + (B f + C r) v², B and C common, S its own. Sweeps that do not reach the top SM clock are left out; None: no
    sweep is left.
    """
    from scipy.optimize import least_squares

    top = max((s.setting.max() for s in grid), default=0.0)
    used = [s for s in grid if s.memory_share < 1.0 and s.setting.max() == top]
    if not used:
        return None
    fastest = max(float(s.tokens_s.max()) for s in used)

    def residuals(x: Floats) -> Floats:
        out = []
        for i, s in enumerate(used):
            ghz = s.setting / 1000.0
            v = 1.0 + x[1] * np.maximum(0.0, ghz - x[0]) ** 2
            power_w = x[4 + i] + (x[2] * ghz + x[3] * s.tokens_s / fastest) * v * v
            out.append((power_w / s.draw_w - 1.0) / given()["noise"]["power"])
        return np.concatenate(out)

    starts = [[knee, 0.1, 15.0, 100.0, *([45.0] * len(used))] for knee in (1.0, 1.5, 2.0)]
    fits = [least_squares(residuals, start, bounds=(0.0, np.inf), x_scale=np.maximum(start, 0.1)) for start in starts]
    best = min(fits, key=lambda fit: float(fit.cost))
    return float(best.x[0]), float(best.x[1])


def fit_board(
    board: str, sweeps: Sequence[Sweep], rows: Sequence[Rows], k: Silicon, *, spread: float, top_mhz: float
) -> Silicon:
    """Constants of a board from the calibration rows of all its sweeps, whose unknowns are fitted beside them.

    `k` holds what is not fitted; the fitted ones have their priors in `steady_constants.json`.
    """
    from scipy.optimize import least_squares

    priors = given()["boards"][board]
    names = [n for n in FITTED if n in priors]
    centre = np.array([priors[n]["value"] for n in names], float)
    sigma = np.array([priors[n]["sigma"] for n in names], float)
    sets = [r[None, :] for r in rows]

    def parts(x: Floats) -> tuple[Silicon, Floats]:
        values = x[: len(names)] * sigma + centre
        return k._replace(**dict(zip(names, values, strict=True))), x[len(names) :].reshape(-1, UNKNOWNS)

    def residuals(x: Floats) -> Floats:
        silicon, unknowns = parts(x)
        each = [
            misfit(s, r, silicon, u[:, None], spread=spread, top_mhz=top_mhz).ravel()
            for s, r, u in zip(sweeps, sets, unknowns, strict=True)
        ]
        return np.concatenate([x[: len(names)], *each])

    guesses = [first_guess(s, r)[:, 0] for s, r in zip(sweeps, sets, strict=True)]
    low = np.concatenate([-centre / sigma, np.tile(LOW, len(sweeps))])
    high = np.concatenate([np.full(len(names), np.inf), np.tile(HIGH, len(sweeps))])
    x_scale = np.concatenate([np.ones(len(names)), np.full(UNKNOWNS * len(sweeps), 0.3)])
    start = np.concatenate([np.zeros(len(names)), *guesses])
    found = least_squares(
        residuals, start, bounds=(low, high), x_scale=x_scale, diff_step=1e-4, max_nfev=100, ftol=1e-7
    )
    return Silicon(*(float(v) for v in parts(np.asarray(found.x))[0]))


def sustained_mhz(spec: BoardSpec, sweeps: Sequence[Sweep], rows: Sequence[Rows]) -> float:
    """The clock a board runs at when nothing holds it: the highest seen in a calibration row below its limit, else the top clock."""
    seen = [
        float(s.clock_mhz[i])
        for s, r in zip(sweeps, rows, strict=True)
        for i in r
        if not s.lock and np.isfinite(s.clock_mhz[i]) and s.draw_w[i] < BINDS * s.setting[i]
    ]
    return max(seen, default=float(spec.max_sm_clock_mhz))


def fit_spread(sweeps: Sequence[Sweep]) -> float:
    """Relative deviation of what is drawn above the static part, from the 99th percentile of draws that no limit clips."""
    found = []
    for s in sweeps:
        top = s.calibration()[-1]
        if np.isfinite(s.p99_w[top]) and s.draw_w[top] < BINDS * s.setting[top]:
            static_w = given()["boards"][s.board]["static_w"]["value"]
            found.append((s.p99_w[top] - s.draw_w[top]) / P99_DEVIATIONS / (s.draw_w[top] - static_w))
    return float(np.mean(found)) if found else 0.0
