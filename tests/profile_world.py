"""A world that a profile can be fitted to: the model's own physics at parameters far from the priors, seen through noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from pals.core.architecture import ModelShape
from pals.core.load import Mix
from pals.core.quantities import Fingerprint, OperatingPoint
from pals.engines.model_zoo import shipped_config
from pals.models.engine_facts import EngineFacts
from pals.models.fitted import Fitted
from pals.models.observed import OBSERVED, conditions_of, told
from pals.models.parameters import NAMES, values_of
from pals.models.physics import base_of
from pals.models.profile import Profile
from pals.models.row import ProfileRow

FINGERPRINT = Fingerprint(
    engine="vllm", engine_version="0.32.0", model="m", board="b", driver="1", boards=4, parallelism="tp4 pp1 dp1 ep0",
    launch_sequences=64,
)  # fmt: skip
FACTS = EngineFacts(
    board="NVIDIA A100-SXM4-80GB", boards=4, min_limit_w=100.0, max_limit_w=400.0, min_sm_clock_mhz=210, max_sm_clock_mhz=1410,
    launch_sequences=64, tensor_parallel=4, shape=ModelShape.from_config(shipped_config("mistralai/Mixtral-8x7B-v0.1")),
)  # fmt: skip
CHAT = Mix(name="chat", prompt_tokens=1200, output_tokens=225)
PREFILL = Mix(name="prefill", prompt_tokens=2000, output_tokens=16)
DECODE = Mix(name="decode", prompt_tokens=128, output_tokens=512)
MIXES = (CHAT, PREFILL, DECODE)
LIMITS_W = (150.0, 200.0, 250.0, 300.0, 400.0)
LEVELS = (4, 8, 16, 32, 64)
CLOCKS = (1410, 1200, 1005, 810)
TRUTH = np.random.default_rng(7).normal(0.0, 1.0, len(NAMES))  # a deviation or so from every prior
TRUTH[[NAMES.index(n) for n in ("static", "busy", "memory_w")]] = (
    1.0,
    1.5,
    0.5,
)  # and boards hungry enough for limits to bind


def points(
    limits_w: Iterable[float] = LIMITS_W, levels: Iterable[int] = LEVELS, clocks: Iterable[int] = ()
) -> list[OperatingPoint]:
    """Limits × levels, and locks at the highest limit × levels."""
    levers: list[tuple[float, int | None]] = [(w, None) for w in limits_w] + [(400.0, mhz) for mhz in clocks]
    return [OperatingPoint(power_limit_w=w, sm_clock_mhz=mhz, active_sequences=n) for n in levels for w, mhz in levers]


def rows_at(
    where: Sequence[OperatingPoint],
    *,
    mix: int = 0,
    noise: float = 0.0,
    seed: int = 0,
    truth: np.ndarray = TRUTH,
    facts: EngineFacts = FACTS,
) -> tuple[ProfileRow, ...]:
    """What would be measured there; `noise` is relative, of each figure by itself."""
    blank = [
        ProfileRow(
            power_limit_w=p.power_limit_w, sm_clock_lock_mhz=p.sm_clock_mhz, active_sequences=p.active_sequences or 64, mix=mix,
            running=float(p.active_sequences or 64), power_w=1.0, tokens_per_s=1.0,
            prefill_tokens_per_s=MIXES[mix].prefill_per_output, steps_per_s=1.0, sm_clock_mhz=1.0, window_s=8.0,
        )
        for p in where
    ]  # fmt: skip
    exact = told(values_of(truth), base_of(facts), conditions_of(blank, MIXES, facts.step_tokens))[: len(OBSERVED)]
    seen = np.exp(exact + noise * np.random.default_rng(seed).standard_normal(exact.shape))
    return tuple(_row(b, dict(zip(OBSERVED, seen[:, i].tolist(), strict=True))) for i, b in enumerate(blank))


def _row(blank: ProfileRow, seen: dict[str, float]) -> ProfileRow:
    known: dict[str, Any] = {name: seen[name] for name in OBSERVED if name != "step_s"}
    kept = {
        name: getattr(blank, name)
        for name in ("power_limit_w", "sm_clock_lock_mhz", "active_sequences", "mix", "running", "window_s")
    }
    ratio = MIXES[blank.mix].prefill_per_output
    return ProfileRow(
        **kept, **known, steps_per_s=1.0 / seen["step_s"], prefill_tokens_per_s=ratio * seen["tokens_per_s"]
    )


def profile_of(rows: Sequence[ProfileRow]) -> Profile:
    """A profile of these rows."""
    return Profile.of(
        rows,
        MIXES,
        FACTS,
        FINGERPRINT,
        source="emulated",
        made_at="2026-01-01",
        command="pals profile",
        notes=("a note",),
    )


@cache
def profile() -> Profile:
    """Power limits alone."""
    return profile_of(rows_at(points(), noise=0.003))


@cache
def clock_profile() -> Profile:
    """Limits and locks."""
    return profile_of(rows_at(points(clocks=CLOCKS), noise=0.003))


@cache
def whole_profile() -> Profile:
    """All mixes, limits and locks, few rows of each."""
    some = rows_at(points((100.0, 200.0, 400.0), (1, 8, 64), (1200, 600)), noise=0.005)
    more = [rows_at(points((100.0, 250.0, 400.0), (4, 32), (900,)), mix=i, noise=0.005, seed=i) for i in (1, 2)]
    return profile_of([*some, *more[0], *more[1]])


def model() -> Fitted:
    """The fitted model of `profile`."""
    return profile().model()
