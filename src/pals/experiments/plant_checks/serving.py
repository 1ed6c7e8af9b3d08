"""The LLM step against ML.ENERGY's serving sweep: time per output token and power against batch, held out by model name.

Split, constants and errors: docs/models/step.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pals.core.architecture import ModelShape
from pals.experiments.plant_checks.row import CheckRow, Residual, error_row
from pals.experiments.plant_checks.serving_cases import BOARDS, Case, Prediction, engines, load, predict
from pals.plant.silicon import Silicon
from pals.plant.specs import BoardSpec, board_specs
from pals.plant.step_constants import StepConstants, fitted_constants, step_constants

FloatArray = NDArray[np.float64]

# ---- the split


def held_out(cases: Sequence[Case]) -> set[str]:
    """Architectures kept out of the fit, by name alone.

    sha256("salt:row of models.csv") divisible by 3, with the smallest salt for which every board holds out a dense and a MoE
    model, and the fit still sees every (dense or MoE, board, weight format), every task and every kind of parallelism.
    """
    names = sorted({c.base for c in cases})
    for salt in range(10_000):
        held = {n for n in names if hashlib.sha256(f"{salt}:{n}".encode()).digest()[0] % 3 == 0}
        fit = [c for c in cases if c.base not in held]
        if {_kind(c) for c in cases if c.base in held} >= {_kind(c) for c in cases} and _seen(fit) == _seen(cases):
            return held
    raise ValueError("the data hold too few models for a split by name")


def _kind(c: Case) -> tuple[bool, str]:
    return c.shape.experts > 0, c.board


def _seen(cases: Sequence[Case]) -> set[tuple[Any, ...]]:
    formats = {(*_kind(c), _weights(c.shape)[:4]) for c in cases}
    return formats | {(c.task,) for c in cases} | {(c.board, "data-parallel") for c in cases if c.group.data > 1}


def _weights(shape: ModelShape) -> str:
    return shape.expert_format if shape.experts else shape.ffn_format


# ---- the check


def check(folder: Path) -> list[CheckRow]:
    """TPOT and power against batch, by board, for models the constants were not fitted on and for those they were."""
    cases, left = load(folder)
    known = set(fitted_constants()["_fitted_on"])
    rows = []
    for board in BOARDS:
        for fitted in (False, True):
            some = [c for c in cases if c.board == board and (c.base in known) == fitted]
            if some:
                rows += _rows_of(board, some, "models of the fit" if fitted else "held-out models", _note(left))
    return rows


def _rows_of(board: str, cases: Sequence[Case], which: str, note: str) -> list[CheckRow]:
    spec, prompts = board_specs()[BOARDS[board]], fitted_constants()["_prompt_tokens"]
    tpot, power = [], []
    for engine in engines(cases):
        p = predict(engine, spec, step_constants(spec), spec.silicon, prompts[engine[0].task])
        for i, c in enumerate(engine):
            group = f"{c.model}, {c.boards} boards, {c.task}"
            tpot.append(Residual(group=group, x=c.batch, measured=c.tpot_s, predicted=float(p.tpot_s[i])))
            power.append(Residual(group=group, x=c.batch, measured=c.power_w, predicted=float(p.power_w[i])))
    return [_row("TPOT", board, which, tpot, 10.0, note), _row("power", board, which, power, 6.0, note)]


def _row(what: str, board: str, which: str, residuals: Sequence[Residual], at_most: float, note: str) -> CheckRow:
    """A row whose note names the engines that miss the target."""
    groups: dict[str, list[float]] = {}
    for r in residuals:
        groups.setdefault(r.group, []).append(r.error_pct)
    over = {g: e for g, e in groups.items() if np.mean(np.abs(e)) > at_most}
    missed = "; ".join(f"{g} {min(e):+.0f}..{max(e):+.0f} %" for g, e in over.items())
    return error_row(
        f"{what} against batch, {board}, {which}",
        f"mlenergy-v3, {which}",
        residuals,
        at_most=at_most,
        x_axis="batch",
        in_sample=which == "models of the fit",
        note=f"engines over the target: {missed or 'none'} (why: docs/models/step.md); {note}",
    )


def _note(left: Counter[str]) -> str:
    return "left out: " + ("; ".join(f"{name} ({count} rows)" for name, count in sorted(left.items())) or "nothing")


# ---- the fit

TIME_PRIORS = {  # start, and how far (σ of the logarithm) the data may easily move it
    "host_s": (1e-3, 0.5),
    "host_per_sequence_s": (2e-5, 0.7),
    "chunked_host_s": (2e-3, 0.7),
    "chunked_host_per_sequence_s": (2e-5, 0.7),
    "layer_gap_s": (5e-6, 0.7),
    "moe_gap_s": (1e-5, 0.7),
    "narrow_moe_gap_s": (5e-5, 0.7),
    "expert_factor": (1.0, 0.3),
    "narrow_expert_factor": (1.0, 0.4),
    "attention_factor": (1.1, 0.2),
    "link_factor": (1.0, 0.3),
    "launch_layer_s": (1e-4, 0.5),
    "launch_moe_layer_s": (8e-4, 0.3),
    "popularity_cv": (0.5, 0.3),
}
POWER_PRIORS = {  # W/GHz by board: of any kernel, and of one that streams HBM (busy + memory)
    "H100": {"busy": (92.0, 0.3), "stream": (98.5, 0.03)},  # counters of the same die in H200
    "B200": {"busy": (92.0, 0.3), "stream": (158.5, 0.5)},  # streams at 1597 MHz; serving draws more, so it may move
}
PRODUCT_W_PER_GHZ = {"H100": 409.6, "B200": 608.0}  # a saturated product under the default limit, at its measured clock
ACTIVITY = ("busy_w_per_ghz", "memory_w_per_ghz", "tensor_w_per_ghz")
GEMM_MEMORY = 0.2  # HBM share of a saturated matrix product
ACTIVITY_PRIORS = {"expert_activity": (0.4, 0.5), "narrow_expert_activity": (0.6, 0.3)}
GIVEN = {"capture_tokens": 512.0}
PROMPT_PRIORS = {
    "lm-arena-chat": (250.0, 0.03),
    "sourcegraph-fim": (850.0, 0.03),
}  # KV capacity over the largest batch it held
ASSUMED_PROMPTS = {"gpqa": 250.0}  # no row of the task is in the data; outputs of thousands of tokens outweigh it
PRIOR_WEIGHT = 1.0
ROBUST_FROM = 0.03  # relative error from which a row weighs less


def fit(folder: Path) -> dict[str, Any]:
    """Constants of `step_constants.json`, and the activity terms of `board_specs.json` that go with them.

    First H100 with the prompt length of the chat task, then B200, which keeps that and adds the length of the code task.
    """
    cases, _ = load(folder)
    held = held_out(cases)
    training = [e for e in engines(cases) if e[0].base not in held]
    prompts = dict(ASSUMED_PROMPTS)
    out: dict[str, Any] = {}
    for board, name in BOARDS.items():
        some, spec = [e for e in training if e[0].board == board], board_specs()[name]
        free = {t: p for t, p in PROMPT_PRIORS.items() if t not in prompts and any(e[0].task == t for e in some)}
        k, silicon, lengths = _fit_board(some, spec, prompts, free)
        prompts |= lengths
        out[name] = {"values": asdict(k), "activity": {n: getattr(silicon, n) for n in ACTIVITY}}
    return out | {"_fitted_on": sorted({e[0].base for e in training}), "_prompt_tokens": prompts}


def _fit_board(
    some: Sequence[Sequence[Case]],
    spec: BoardSpec,
    prompts: Mapping[str, float],
    free: Mapping[str, tuple[float, float]],
) -> tuple[StepConstants, Silicon, dict[str, float]]:
    """Times, then power, twice: power decides the clock where the limit binds."""
    times = TIME_PRIORS | dict(free)
    board = some[0][0].board
    watts = POWER_PRIORS[board] | ACTIVITY_PRIORS
    x, y = np.zeros(len(times)), np.zeros(len(watts))

    def made(x: FloatArray, y: FloatArray) -> tuple[StepConstants, Silicon, dict[str, float]]:
        t, w = _values(times, x), _values(watts, y)
        k = StepConstants(**{n: t[n] for n in TIME_PRIORS}, **{n: w[n] for n in ACTIVITY_PRIORS}, **GIVEN)
        return k, _silicon(spec.silicon, w["busy"], w["stream"], PRODUCT_W_PER_GHZ[board]), {n: t[n] for n in free}

    def predicted(x: FloatArray, y: FloatArray) -> list[Prediction]:
        k, silicon, lengths = made(x, y)
        return [predict(e, spec, k, silicon, {**prompts, **lengths}[e[0].task]) for e in some]

    def time_errors(x: FloatArray) -> list[FloatArray]:
        return [_time_errors(e, p) for e, p in zip(some, predicted(x, y), strict=True)]

    def power_errors(y: FloatArray) -> list[FloatArray]:
        pairs = list(zip(some, predicted(x, y), strict=True))  # where the limit binds, watts show in the time alone
        return [np.log(p.power_w / [c.power_w for c in e]) for e, p in pairs] + [_time_errors(e, p) for e, p in pairs]

    for _ in range(2):
        x = _least_squares(time_errors, np.array([s for _, s in times.values()]), x)
        y = _least_squares(power_errors, np.array([s for _, s in watts.values()]), y)
    return made(x, y)


def _silicon(s: Silicon, busy: float, stream: float, product: float) -> Silicon:
    """Activity terms, W/GHz, of which a saturated product takes what was measured of it."""
    busy = min(busy, stream)
    memory = stream - busy
    tensor = product - busy - GEMM_MEMORY * memory
    return s._replace(busy_w_per_ghz=busy, memory_w_per_ghz=memory, tensor_w_per_ghz=tensor)


def _values(priors: Mapping[str, tuple[float, float]], x: FloatArray) -> dict[str, float]:
    return {n: start * float(np.exp(v)) for (n, (start, _)), v in zip(priors.items(), x, strict=True)}


def _time_errors(engine: Sequence[Case], p: Prediction) -> FloatArray:
    """Logarithms of predicted over measured: TPOT, and half of that of the median ITL where most steps only decode."""
    mean = np.log(p.tpot_s / [c.tpot_s for c in engine])
    decode = np.array([c.batch / c.output / c.group.data < 0.5 for c in engine])
    return np.concatenate([mean, 0.5 * decode * np.log(p.median_itl_s / [c.median_itl_s for c in engine])])


def _least_squares(errors: Any, spread: FloatArray, start: FloatArray) -> FloatArray:
    """Minimum of soft-L1 errors and of the distance to the priors; robust, for rows that the host disturbed."""
    from scipy.optimize import least_squares

    def residuals(x: FloatArray) -> FloatArray:
        e = np.concatenate(errors(x)) / ROBUST_FROM
        robust = np.sign(e) * np.sqrt(2.0 * (np.sqrt(1.0 + e**2) - 1.0))
        return np.concatenate([robust, PRIOR_WEIGHT * x / spread])

    return np.asarray(least_squares(residuals, start, x_scale=0.1, diff_step=1e-3, max_nfev=14).x)
