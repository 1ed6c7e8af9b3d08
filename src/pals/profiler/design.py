"""Which point a sweep measures next: the corners first, then whatever promises most per second; pure.

Gain is I-optimality: how much the variance of all predictions, summed over the candidates, would fall.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pals.core.load import Mix
from pals.core.quantities import SAME_LIMIT_W, OperatingPoint
from pals.models.engine_facts import EngineFacts
from pals.models.forecast import FloatArray
from pals.models.row import ProfileRow
from pals.profiler.plan import SweepPlan
from pals.profiler.repeats import REACHED, is_at

Mask = NDArray[np.bool_]
BELOW_NATURAL = 0.97  # of natural draw: a limit that just binds
APART = (
    0.15  # of a lever's range: candidates nearer to a measured one count less, since a model may bend between points
)


class SweepModel(Protocol):
    """What the design needs of a fitted model; see `pals.models.fitted.Fitted`."""

    def sensitivities(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix], /) -> FloatArray: ...
    @property
    def precision(self) -> FloatArray: ...
    def relative_sd(self, points: Sequence[OperatingPoint], mixes: Sequence[Mix], /) -> FloatArray: ...


class Candidate(NamedTuple):
    """A point that may be measured, under one of the plan's mixes."""

    point: OperatingPoint
    mix: int

    @property
    def sequences(self) -> int:
        """Its active sequences; candidates always say them."""
        return self.point.active_sequences or 1


class Corners(NamedTuple):
    """The levels between which the start design looks."""

    found_w: float
    floor_w: float
    lock_mhz: int | None
    fewest: int
    prefill: int  # mixes
    decode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """All candidates of a plan, and arrays that describe them, shape (candidates, …)."""

    candidates: tuple[Candidate, ...]
    mixes: tuple[Mix, ...]
    corners: Corners
    places: FloatArray  # limit, clock and log of sequences, each 0..1 of its range
    mix: NDArray[np.intp]
    sequences: FloatArray
    index: Mapping[tuple[int, int, int | None], list[tuple[float, int]]]  # limits and positions by mix, sequences, lock
    room: FloatArray  # sequences that a closed loop can keep running, by mix: prompts that fit a step, for as long as they last

    @staticmethod
    def of(plan: SweepPlan, facts: EngineFacts) -> Space:
        """Limits × sequences × mixes without a lock, and locks × sequences × mixes at the highest limit."""
        found_w = max(plan.limits_w)
        levels: list[tuple[float, int | None]] = [(w, None) for w in sorted(set(plan.limits_w), reverse=True)]
        levels += [(found_w, mhz) for mhz in sorted(set(plan.clocks_mhz), reverse=True)]
        chosen = tuple(
            Candidate(OperatingPoint(power_limit_w=w, sm_clock_mhz=mhz, active_sequences=n), mix)
            for mix in range(len(plan.mixes))
            for n in sorted(set(plan.sequences), reverse=True)
            for w, mhz in levels
        )
        shares = [m.prefill_share for m in plan.mixes]
        index = defaultdict[tuple[int, int, int | None], list[tuple[float, int]]](list)
        for i, c in enumerate(chosen):
            index[c.mix, c.sequences, c.point.sm_clock_mhz].append((c.point.power_limit_w, i))
        return Space(
            candidates=chosen,
            mixes=plan.mixes,
            corners=Corners(
                found_w, min(plan.limits_w), min(plan.clocks_mhz, default=None), min(plan.sequences),
                int(np.argmax(shares)), int(np.argmin(shares)),
            ),
            places=_places([c.point for c in chosen], plan),
            mix=np.array([c.mix for c in chosen]),
            sequences=np.array([float(c.sequences) for c in chosen]),
            index=index,
            room=np.array([m.output_tokens * facts.step_tokens / m.prompt_tokens for m in plan.mixes]),
        )  # fmt: skip

    @property
    def points(self) -> list[OperatingPoint]:
        """Of each candidate."""
        return [c.point for c in self.candidates]

    @property
    def loads(self) -> list[Mix]:
        """Of each candidate."""
        return [self.mixes[c.mix] for c in self.candidates]

    def where(self, row: ProfileRow) -> int | None:
        """Position of the candidate that `row` was measured at; None: it is no candidate."""
        levels = (row.mix, row.active_sequences, row.sm_clock_lock_mhz)
        return next((i for w, i in self.index.get(levels, ()) if abs(w - row.power_limit_w) < SAME_LIMIT_W), None)

    def measured(self, rows: Sequence[ProfileRow]) -> Mask:
        """Which candidates have a row."""
        mask = np.zeros(len(self.candidates), dtype=bool)
        mask[[i for row in rows if (i := self.where(row)) is not None]] = True
        return mask

    def possible(self, rows: Sequence[ProfileRow]) -> Mask:
        """Which candidates the engine has room for: where steps are full of prompts, or it ran fewer, more change nothing."""
        room = self.room.copy()
        for r in rows:
            if r.running < REACHED * r.active_sequences:
                room[r.mix] = min(room[r.mix], r.running / REACHED)
        fits: Mask = self.sequences <= np.maximum(room[self.mix], self.corners.fewest)
        return fits


def _places(points: Sequence[OperatingPoint], plan: SweepPlan) -> FloatArray:
    low_w, high_w = min(plan.limits_w), max(plan.limits_w)
    low_mhz, high_mhz = min(plan.clocks_mhz, default=0), max(plan.clocks_mhz, default=1)
    spans = max(high_w - low_w, 1.0), 1.25 * max(high_mhz - low_mhz, 1), max(np.log(max(plan.sequences)), 0.1)
    return np.array(
        [
            (
                (p.power_limit_w - low_w) / spans[0],
                1.0 if p.sm_clock_mhz is None else (p.sm_clock_mhz - low_mhz) / spans[1],
                np.log(p.active_sequences or 1) / spans[2],
            )
            for p in points
        ]
    )


def next_corner(
    space: Space, rows: Sequence[ProfileRow], left_out: Collection[Candidate], facts: EngineFacts
) -> Candidate | None:
    """The first corner of the start design that has no row; None: all have, or were left out.

    No limit at the largest batch that finds room, the clock floor by limit and by lock, just below natural draw (as the first row shows
    it), the smallest batch, then a prefill-heavy and a decode-heavy mix.
    """
    k, room = space.corners, space.possible(rows)
    most = [int(space.sequences[room & (space.mix == mix)].max()) for mix in range(len(space.mixes))]
    wanted = [(_at(k.found_w, None, most[0]), 0), (_at(k.floor_w, None, most[0]), 0)]
    wanted += [(_at(k.found_w, k.lock_mhz, most[0]), 0)] * (k.lock_mhz is not None)
    if (natural := next((r for r in rows if is_at(r, *wanted[0])), None)) is not None:
        highest_w = BELOW_NATURAL * min(natural.power_w / facts.boards, k.found_w)
        binding = [c.point.power_limit_w for c in space.candidates if c.point.power_limit_w <= highest_w]
        wanted.append((_at(max(binding, default=k.floor_w), None, most[0]), 0))
    wanted.append((_at(k.found_w, None, k.fewest), 0))
    wanted += [(_at(k.found_w, None, most[mix]), mix) for mix in (k.prefill, k.decode)]
    for point, mix in wanted:
        candidate = Candidate(point, mix)
        if candidate not in left_out and not any(is_at(r, point, mix) for r in rows):
            return candidate
    return None


def _at(limit_w: float, mhz: int | None, sequences: int) -> OperatingPoint:
    return OperatingPoint(power_limit_w=limit_w, sm_clock_mhz=mhz, active_sequences=sequences)


def gains(sensitivities: FloatArray, covariance: FloatArray, counted: Mask) -> FloatArray:
    """How much the summed variance of the counted candidates' outputs, in units of their noise, falls by measuring each.

    Args:
        sensitivities: over the noise, shape (candidates, outputs, parameters).
        covariance: of the parameters, shape (parameters, parameters).
        counted: candidates whose variance matters, shape (candidates,).

    Returns:
        Shape (candidates,), not negative.

    Source: with C the covariance and S a point's sensitivities, C falls by C Sᵀ (I + S C Sᵀ)⁻¹ S C (Woodbury).
    """
    s = sensitivities
    importance = np.einsum("jop,joq->pq", s[counted], s[counted])
    spread = s @ covariance
    own = np.eye(s.shape[1]) + spread @ s.transpose(0, 2, 1)
    removed = spread @ importance @ spread.transpose(0, 2, 1)
    return np.asarray(np.trace(np.linalg.solve(own, removed), axis1=1, axis2=2))


def scores(space: Space, rows: Sequence[ProfileRow], gain: FloatArray, seconds: FloatArray) -> FloatArray:
    """Gain per second, less beside measured points of the same mix, and more for mixes that have few rows; shape (candidates,)."""
    apart, balance, measured = np.ones(len(gain)), np.ones(len(gain)), space.measured(rows)
    for mix in range(len(space.mixes)):
        here, there = space.places[space.mix == mix], space.places[(space.mix == mix) & measured]
        if len(there):
            gaps = np.linalg.norm(here[:, None, :] - there[None, :, :], axis=2).min(axis=1)
            apart[space.mix == mix] = gaps / (gaps + APART)
        count = sum(r.mix == mix for r in rows)
        balance[space.mix == mix] = (len(rows) / len(space.mixes) + 1.0) / (count + 1.0)
    return gain * apart * balance / seconds
