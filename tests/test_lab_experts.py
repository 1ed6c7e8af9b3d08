"""Simulated engines that count their experts, and the experiment on what the counts are worth."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pals.control.controller import PalsPolicy
from pals.control.policies import watched
from pals.core.errors import ConfigError
from pals.core.experts import ExpertCounts
from pals.core.load import Mix
from pals.core.quantities import Budget, Slo, fingerprint_of
from pals.experiments.lab.engines import EngineCase
from pals.experiments.lab.experiment import Row, Wish
from pals.experiments.lab.experts import (
    BLIND,
    ROUTINGS,
    SINCE,
    STORED,
    Experts,
    StepErrors,
    guard_of,
    with_interval,
)
from pals.experiments.lab.loads import ClosedLoop
from pals.experiments.lab.run import RunTask, rigged, run
from pals.experiments.simulated_node import COUNTED_EVERY_S, SimulatedBoard, SimulatedCounts, SimulatedGroup
from pals.models.profile import Profile
from pals.plant.routing_schedule import parse_routing
from pals.runtime.tick import TickState, tick
from tests.profile_world import clock_profile

MIXTRAL = EngineCase(model="mistralai/Mixtral-8x7B-v0.1", boards="4xa100-sxm4-80gb", seed=1)
LOAD = ClosedLoop(mix=Mix(name="m", prompt_tokens=600, output_tokens=120), in_flight=96, warmup_s=2.0, span_s=40.0)


def profile_here() -> Profile:
    """A profile that says it was measured on `MIXTRAL`."""
    sim = MIXTRAL.simulation()
    group = SimulatedGroup(sim.replica(), sim.spec, sim.boards)
    boards = [SimulatedBoard(group, i).info for i in range(sim.boards)]
    return replace(clock_profile(), fingerprint=fingerprint_of(sim.engine, boards))


class Asked:
    """A replica that tells how often its counts were drawn."""

    def __init__(self) -> None:
        self.now_s, self.draws = 0.0, 0

    def expert_counts(self) -> ExpertCounts | None:
        self.draws += 1
        return replica_counts(self.now_s)


def replica_counts(time_s: float) -> ExpertCounts:
    counts = MIXTRAL.simulation().replica().expert_counts()
    assert counts is not None
    return replace(counts, time_s=time_s)


def test_counts_are_drawn_no_oftener_than_workers_publish() -> None:
    replica = Asked()
    counts = SimulatedCounts(replica)
    for i in range(101):
        replica.now_s = i / 50
        told = counts()
        assert told is not None
        assert replica.now_s - told.time_s < COUNTED_EVERY_S
    assert replica.draws == 5  # at 0, 0.5, 1, 1.5 and 2 s


@pytest.mark.parametrize(("counts", "policy"), [(False, "pals"), (True, "static")])
def test_where_nobody_counts_or_nobody_would_look_nothing_is_read(counts: bool, policy: str) -> None:
    sim = replace(MIXTRAL.simulation(), counts_experts=counts)
    profile = profile_here() if policy == "pals" else None
    _, rig, _ = rigged(RunTask(sim=sim, load=LOAD, policy=policy, profile=profile))
    assert rig.experts is None


def test_a_policy_that_uses_counts_sees_the_plants_routing_and_how_it_drifts() -> None:
    sim = replace(MIXTRAL.simulation(), counts_experts=True, routing=parse_routing("12:swap=1,cv=1.5"))
    task = RunTask(sim=sim, load=LOAD, policy="pals", profile=profile_here())
    replica, rig, faults = rigged(task)
    feed, state, seen = LOAD.start(replica, task.rng()), TickState(controller=rig.controller.initial()), {}
    for i in range(50):
        feed.feed()
        faults.advance(i / 2)
        record, state = tick(rig, state, Budget(), Slo(), i / 2)
        seen[i / 2] = record.sample.experts
    before, after = seen[11.5], seen[24.5]
    assert seen[9.0] is None  # no window is full yet
    assert before is not None
    assert after is not None
    assert before.variation is not None
    assert after.variation is not None
    assert before.drift is not None
    assert after.drift is not None
    assert after.variation > 2 * before.variation
    assert before.drift < 0.1 < after.drift


def test_noting_how_long_steps_take_changes_no_decision() -> None:
    sim, profile = MIXTRAL.simulation(), profile_here()
    noting = StepErrors(PalsPolicy(profile.model(), guard_of(sim)))
    ran = []
    for policy in (PalsPolicy(profile.model(), guard_of(sim)), noting):
        controller = watched(policy, profile, guard_of(sim))
        ran.append(run(RunTask(sim=sim, load=LOAD, policy="pals", profile=profile, controller=controller)))
    assert ran[0] == ran[1]
    off = noting.error(20.0)
    assert off is not None
    assert off > 0.0
    assert noting.error(1000.0) is None  # nothing was noted then


def test_an_interval_is_students_over_paired_differences() -> None:
    assert with_interval([1.0, 2.0, 3.0]) == "+2.0 (-0.5..+4.5)"  # 4.303 / sqrt(3)
    assert with_interval([1.0]) == "+1.0"
    assert with_interval([]) == "–"


def rows(*, gain: float, late: float, off: float) -> list[Row]:
    """Two seeds in which the arms with counts differ so from the one without."""
    return [
        {
            "engine": "e", "routing": "cv 2", "seed": seed, "policy": arm, "missed": 0.01 + (late if arm != BLIND else 0.0),
            "tokens_per_j_node": gain if arm != BLIND else 1.0, "step_error": off if arm != BLIND else 0.1,
        }
        for seed in (1, 2)
        for arm in (BLIND, STORED, SINCE)
    ]  # fmt: skip


def test_counts_that_do_not_pay_are_told_as_misses() -> None:
    assert [v.reached for v in Experts().verdicts(rows(gain=1.02, late=0.0, off=0.03))] == [True] * 6
    assert [v.reached for v in Experts().verdicts(rows(gain=0.98, late=0.02, off=0.2))] == [False] * 6
    line = Experts().tables(rows(gain=0.98, late=0.02, off=0.2))[0].lines[0]
    assert line[:5] == ["e", "cv 2", "1.0 %", "-2.0 (-2.0..-2.0)", "+2.0 (+2.0..+2.0)"]


def test_five_seeds_meet_every_routing_and_dense_models_are_refused() -> None:
    cells = Experts().cells(Wish(models=("Mixtral-8x7B",), boards=("4xa100-sxm4-80gb",)))
    assert len({c.slug for c in cells}) == len(cells) == 5 * len(ROUTINGS)
    with pytest.raises(ConfigError, match="has no experts"):
        Experts().cells(Wish(models=("Llama-3.1-8B",), boards=("h100-sxm5-80gb",)))
