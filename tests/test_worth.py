"""What watts are worth: a policy is asked at most once a second, also through the watch around it, and its claim says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pals.control.guard import Guard
from pals.control.static import StaticPolicy
from pals.control.watched import Watched
from pals.core.protocols import AnyController, WorthOfWatts
from pals.core.quantities import Budget, Decision, OperatingPoint, Slo, TelemetrySample
from pals.runtime.agent import Session
from pals.runtime.channel import EngineChannel, find_engines
from pals.runtime.group import EngineGroup
from pals.runtime.tick import Rig
from tests.watched_world import Forecaster
from tests.worlds import Board, Clock, Engine, engine_info


@dataclass
class Valuing:
    """Wants the most; its state is the number of ticks, and each watt is worth as much."""

    asked_at: list[int] = field(default_factory=list)

    def initial(self) -> int:
        return 0

    def step(self, state: int, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float) -> tuple[Decision, int]:
        return Decision(point=OperatingPoint(power_limit_w=400.0), reason="test"), state + 1

    def worth(self, state: int) -> tuple[tuple[float, float], ...]:
        self.asked_at.append(state)
        return ((200.0, 0.0), (800.0, 600.0 * state))

    def needed_w(self, state: int) -> float | None:
        return 300.0 + state


@pytest.fixture
def group(tmp_path: Path) -> Iterator[EngineGroup]:
    channel = EngineChannel(tmp_path, engine_info(os.getpid()), name="vllm-test")
    yield EngineGroup(find_engines(tmp_path))
    channel.close()


def session(policy: AnyController, clock: Clock, group: EngineGroup) -> Session:
    boards = [Board(clock, i) for i in range(2)]
    engine = Engine(clock)
    guard = Guard.of([b.info for b in boards], launch_sequences=64)
    rig = Rig(
        meters=boards, actuators=boards, engine=engine, setter=engine, controller=policy, guard=guard, period_s=0.5
    )
    return Session(name="m", group=group, rig=rig, slo=Slo(), sink=lambda record: None, exits=ExitStack())


def test_a_claim_says_what_the_policy_knows_now_and_asks_it_once_a_second(group: EngineGroup) -> None:
    clock, policy = Clock(), Valuing()
    steered = session(policy, clock, group)
    told: list[float | None] = []
    for _ in range(6):  # every half second; a node asks for what each engine holds several times a tick
        told += [steered.holding(clock.now).claim.needed_w for _ in range(3)][-1:]
        steered.tick(Budget(power_w=800.0), clock.now)
        clock.now += 0.5

    assert policy.asked_at == [0, 2, 4]
    assert told == [300.0, 300.0, 302.0, 302.0, 304.0, 304.0]
    assert steered.holding(clock.now).claim.worth == ((200.0, 0.0), (800.0, 3600.0))


def test_a_watched_policy_is_asked_through_the_watch(group: EngineGroup) -> None:
    clock = Clock()
    steered = session(Watched(Valuing(), Forecaster(), top_w=400.0), clock, group)
    steered.tick(Budget(power_w=800.0), clock.now)

    claim = steered.holding(clock.now).claim
    assert (claim.worth, claim.needed_w) == (((200.0, 0.0), (800.0, 600.0)), 301.0)


def test_a_policy_that_does_not_know_claims_nothing(group: EngineGroup) -> None:
    plain = StaticPolicy(OperatingPoint(power_limit_w=400.0))
    assert isinstance(Valuing(), WorthOfWatts)
    assert not isinstance(plain, WorthOfWatts)
    for policy in (plain, Watched(plain, Forecaster(), top_w=400.0)):
        claim = session(policy, Clock(), group).holding(100.0).claim
        assert (claim.worth, claim.needed_w, claim.knows) == ((), None, False)
