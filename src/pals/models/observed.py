"""What a row tells of each predicted quantity, and the model's word on the same: both as logarithms, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pals.core.load import Mix
from pals.models.latency import latencies
from pals.models.parameters import Values, values_of
from pals.models.physics import Base, Work, curves, settle
from pals.models.row import ProfileRow

FloatArray = NDArray[np.float64]

#: Quantities that rows measure, in the order of the arrays here.
OBSERVED = ("power_w", "step_s", "tokens_per_s", "tpot_p50_s", "tpot_p95_s", "ttft_p50_s", "ttft_p95_s", "sm_clock_mhz")
UNSEEN = ("natural_draw_w", "prefill_tokens_per_s")
#: Relative noise of a row's figure before anything is known of it: windows are short, quantiles come from few requests.
FIRST_NOISE: FloatArray = np.array([0.010, 0.012, 0.012, 0.02, 0.03, 0.04, 0.06, 0.08, 0.02, 0.03])
FULL = 0.85  # rows that ran fewer sequences than this share of their limit had no room for more in the KV cache
FREE_MHZ = 1e9  # a ceiling that holds nothing


class Conditions(NamedTuple):
    """Candidates: batches that some of them share, and what holds each."""

    work: Work
    batch: NDArray[np.intp]  # of each candidate, into `work`
    limit_w: FloatArray
    ceiling_mhz: FloatArray
    mid_step: bool = False  # requests arrive at any time, not when another ends


def sequences_of(row: ProfileRow, mix: Mix, step_tokens: int) -> float:
    """How many sequences shared the engine: its limit, unless fewer had room in the KV cache.

    A gauge read between steps misses those that have ended and those that take their place, at most a few; and where steps
    are full of prompts no more run than those can feed, whatever the cache.
    """
    fed = mix.output_tokens * step_tokens / mix.prompt_tokens
    return float(row.active_sequences) if row.running > FULL * min(row.active_sequences, fed) else round(row.running, 2)


def conditions_of(rows: Sequence[ProfileRow], mixes: Sequence[Mix], step_tokens: int) -> Conditions:
    """Under which the rows were measured, with the share of prefill that each really had."""
    kinds: dict[tuple[float, int, float, float], int] = {}
    batch = np.empty(len(rows), np.intp)
    for i, r in enumerate(rows):
        ratio = (
            r.prefill_tokens_per_s / r.tokens_per_s if r.prefill_tokens_per_s > 0 else mixes[r.mix].prefill_per_output
        )
        key = (sequences_of(r, mixes[r.mix], step_tokens), r.mix, round(ratio, 4), r.distinct_experts or np.nan)
        batch[i] = kinds.setdefault(key, len(kinds))
    like = [mixes[mix] for _, mix, _, _ in kinds]
    work = Work(
        sequences=np.array([k[0] for k in kinds]),
        prompt_tokens=np.array([m.prompt_tokens for m in like]),
        output_tokens=np.array([m.output_tokens for m in like]),
        prefill_per_output=np.array([k[2] for k in kinds]),
        context_tokens=np.array([m.context_tokens for m in like]),
        spread=np.array([m.spread for m in like]),
        distinct=np.array([k[3] for k in kinds]),
    )
    limits = np.array([r.power_limit_w for r in rows])
    return Conditions(work, batch, limits, np.array([float(r.sm_clock_lock_mhz or FREE_MHZ) for r in rows]))


def observations_of(rows: Sequence[ProfileRow]) -> FloatArray:
    """Logarithms of what was measured, shape (quantities, rows), in the order of `told`; NaN where it was not."""
    raw = [
        (
            r.power_w, 1.0 / r.steps_per_s, r.tokens_per_s, r.tpot_p50_s, r.tpot_p95_s, r.ttft_p50_s, r.ttft_p95_s, r.sm_clock_mhz,
        )
        for r in rows
    ]  # fmt: skip
    unseen = [np.nan] * len(UNSEEN)
    values = np.array([[*(np.nan if v is None else v for v in row), *unseen] for row in raw], dtype=float)
    values = values.reshape(-1, len(OBSERVED) + len(UNSEEN))
    return np.asarray(np.log(values).T)


def told(v: Values, b: Base, at: Conditions) -> FloatArray:
    """Logarithms of the same quantities as predicted, shape (quantities, candidates), and of what rows cannot measure: `UNSEEN`."""
    c = curves(v, b, at.work)
    s = settle(v, b, c, batch=at.batch, limit_w=at.limit_w, ceiling_mhz=at.ceiling_mhz)
    waits = latencies(v, at.work, c.steps, s, batch=at.batch, mid_step=at.mid_step)
    yields = c.steps.yields[at.batch]
    rate = c.steps.full[at.batch] / s.full_s
    return np.log(
        np.stack([s.power_w * b.boards, s.step_s, yields / s.step_s, *waits, s.clock_mhz, s.natural_w * b.boards, rate])
    )


DIFFERENCE = 1e-3  # of a prior's standard deviation, for numerical derivatives


def jacobian(x: FloatArray, b: Base, at: Conditions, here: FloatArray | None = None) -> FloatArray:
    """d told / d x, shape (quantities, candidates, parameters); all parameters are moved at once, each in a copy of the batches."""
    here = told(values_of(x), b, at) if here is None else here
    count, batches, candidates = len(x), len(at.work.sequences), len(at.batch)
    moved = np.repeat(x[None] + DIFFERENCE * np.eye(count), batches, axis=0)
    copies = Conditions(
        Work(*(np.tile(a, count) for a in at.work)),
        np.tile(at.batch, count) + np.repeat(batches * np.arange(count), candidates),
        np.tile(at.limit_w, count),
        np.tile(at.ceiling_mhz, count),
        at.mid_step,
    )
    there = told(values_of(moved), b, copies).reshape(-1, count, candidates)
    return np.asarray((there - here[:, None]).transpose(0, 2, 1) / DIFFERENCE)
