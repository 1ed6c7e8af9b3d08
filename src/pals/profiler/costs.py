"""How long points take to measure, from the rows so far: what the design divides its gain by; pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pals.core.load import Mix
from pals.models.engine_facts import EngineFacts
from pals.models.forecast import FloatArray
from pals.models.row import ProfileRow
from pals.profiler.design import Candidate, Space
from pals.profiler.plan import SweepPlan

GENERATION = 1.25  # of a mean answer's steps: then nearly all requests that end began at the point
ENOUGH_REQUESTS = 32  # for a p95, and for means of lengths that differ by half
ENOUGH_TOKENS = 400
DRAIN_PACE = 0.5  # of the step time before: no prompts are prefilled any more, at full speed
FIRST_STEP_S = 0.04  # a guess, before anything is measured
OTHER_MIX = 1.0  # added distance of a row of another mix, in ranges of a lever


def generation_steps(mix: Mix, sequences: int, facts: EngineFacts) -> float:
    """Engine steps until requests of all ages run that began at the present point."""
    return GENERATION * (mix.output_tokens + sequences * mix.prompt_tokens / facts.step_tokens)


def drain_steps(mix: Mix, before: Mix | None) -> float:
    """Engine steps until the requests of the mix before have ended: a running sequence gets a token each step."""
    return 0.0 if before is None or before == mix else (1.0 + before.spread) * before.output_tokens


def seconds_of(
    space: Space, rows: Sequence[ProfileRow], plan: SweepPlan, facts: EngineFacts, now: Candidate | None
) -> FloatArray:
    """Engine time each candidate would take, settling included, shape (candidates,); rough."""
    step_s = _step_s(space, rows)
    before = space.mixes[now.mix] if now is not None else None
    own = np.array([generation_steps(space.mixes[c.mix], c.sequences, facts) for c in space.candidates])
    drained = np.array([drain_steps(space.mixes[c.mix], before) for c in space.candidates])
    outputs = np.array([space.mixes[c.mix].output_tokens for c in space.candidates])
    settle_s = np.clip(own * step_s, plan.settle_s, plan.longest_settle_s)
    drain_s = DRAIN_PACE * drained * (step_s[space.candidates.index(now)] if now in space.candidates else FIRST_STEP_S)
    window_s = ENOUGH_REQUESTS * outputs * step_s / space.sequences
    return np.asarray(
        settle_s
        + np.minimum(drain_s, plan.longest_turnover_s)
        + np.clip(window_s, plan.window_s, plan.longest_window_s)
    )


def _step_s(space: Space, rows: Sequence[ProfileRow]) -> FloatArray:
    """Step time of each candidate: that of the measured one nearest to it."""
    nearest, found = np.full(len(space.candidates), np.inf), np.full(len(space.candidates), FIRST_STEP_S)
    for row in rows:
        at = space.where(row)
        if at is None:
            continue
        distance = np.linalg.norm(space.places - space.places[at], axis=1) + OTHER_MIX * (space.mix != row.mix)
        closer = distance < nearest
        nearest[closer], found[closer] = distance[closer], 1.0 / row.steps_per_s
    return found
