"""A watched policy decides as it would alone, learns from comparable windows only, and replays exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pals.control.correction import Correction
from pals.control.guard import Guard
from pals.control.static import StaticPolicy
from pals.control.watched import ControllerState, Watched
from pals.core.quantities import Budget, Decision, OperatingPoint, Slo, TelemetrySample
from pals.runtime.journal import encode
from pals.runtime.replay import replay
from pals.runtime.tick import Rig, TickRecord, TickState, tick
from tests.watched_world import CLOCK_MHZ, RUNNING, Forecaster, steady
from tests.worlds import Board, Clock, Engine

POINT = OperatingPoint(power_limit_w=400.0, active_sequences=64)
Change = Callable[[TelemetrySample], TelemetrySample]


def watched(forecaster: Forecaster | None = None, *, clock_mhz: int | None = None) -> Watched:
    return Watched(StaticPolicy(replace(POINT, sm_clock_mhz=clock_mhz)), forecaster or Forecaster(), experts=True)


def stepped(policy: Watched, samples: Iterable[TelemetrySample]) -> tuple[list[Decision], ControllerState]:
    state, decisions = policy.initial(), []
    for sample in samples:
        decision, state = policy.step(state, sample, Budget(), Slo(), sample.time_s)
        decisions.append(decision)
    return decisions, state


def test_an_engine_that_does_as_forecast_has_factors_of_one_and_the_policy_decides_as_alone() -> None:
    forecaster = Forecaster()

    decisions, state = stepped(watched(forecaster), steady(600.0))
    alone = StaticPolicy(POINT).step(None, next(steady(1.0)), Budget(), Slo(), 0.0)[0]
    assert set(map(repr, decisions)) == {repr(alone)}
    assert state.correction.told.bias == pytest.approx({"power": 1.0, "step": 1.0, "clock": 1.0}, abs=0.003)
    point, load = forecaster.asked[-1]
    assert point == POINT
    assert load.running == RUNNING
    assert load.mix.prompt_tokens == pytest.approx(600.0)
    assert load.mix.cached_tokens == pytest.approx(300.0)
    assert load.mix.output_tokens == pytest.approx(500.0, rel=0.02)
    assert load.prefill_tokens_per_s == pytest.approx(2400.0, rel=0.02)


def test_a_slower_engine_is_told_once_in_a_decision_and_as_a_note_while_it_lasts() -> None:
    policy = watched()

    decisions, state = stepped(
        policy, steady(3600.0, step=lambda t: 1.1 if t > 1800.0 else 1.0, power=lambda t: 0.93 if t > 1800.0 else 1.0)
    )
    told = [
        (0.5 * (i + 1), d.detail) for i, d in enumerate(decisions) if "drift" in d.detail and "step time" in d.detail
    ]
    assert len(told) == 1
    assert 1800.0 < told[0][0] <= 2100.0
    assert "step time is +" in told[0][1]
    assert "host" in told[0][1]
    news = policy.tell(state)
    assert news.drift.keys() == {"step", "power"}
    assert news.bias["step"] == pytest.approx(1.1, abs=0.01)
    assert len(news.notes) == 2


def engine_of(change: Callable[[Any], Any]) -> Change:
    return lambda s: replace(s, engine=change(s.engine))


def limits(change: Callable[[float], float]) -> Change:
    return lambda s: replace(s, boards=tuple(replace(b, enforced_limit_w=change(s.time_s)) for b in s.boards))


@pytest.mark.parametrize(
    "change",
    [
        engine_of(lambda e: None),
        lambda s: replace(s, boards=s.boards[:1], absent=(1,)),
        engine_of(lambda e: replace(e, busy_s=0.8 * e.busy_s)),
        engine_of(lambda e: replace(e, steps=e.steps // 20)),
        engine_of(lambda e: replace(e, running=0 if int(e.time_s) % 4 == 0 else RUNNING)),
        engine_of(lambda e: replace(e, running=70)),
        engine_of(lambda e: replace(e, finished_requests=0)),
        engine_of(lambda e: replace(e, active_limit=64 - int(e.time_s) % 3)),
        limits(lambda t: 400.0 - 20.0 * (int(t) % 3)),
    ],
    ids=["no engine", "board absent", "idle gaps", "few steps", "empty at times", "draining", "no answers", "batch moves", "limit moves"],
)  # fmt: skip
def test_what_is_not_comparable_teaches_nothing(change: Change) -> None:
    _, state = stepped(watched(), map(change, steady(600.0, step=lambda t: 2.0, power=lambda t: 2.0)))

    assert state.correction == Correction()


def test_a_trim_of_a_few_watts_does_not_end_a_window() -> None:
    _, state = stepped(watched(), map(limits(lambda t: 400.0 - int(t) % 5), steady(300.0)))

    assert state.correction.told.bias["step"] == pytest.approx(1.0, abs=0.003)


def test_without_a_power_reading_the_step_time_is_still_learnt() -> None:
    _, state = stepped(watched(), (replace(s, power_w=None) for s in steady(300.0)))

    assert state.correction.told.bias.keys() == {"step", "clock"}


def test_a_profile_that_does_not_reach_the_load_teaches_nothing() -> None:
    forecaster = Forecaster(reaches=False)

    _, state = stepped(watched(forecaster), steady(300.0))
    assert forecaster.asked
    assert state.correction == Correction()


@pytest.mark.parametrize(("lock_mhz", "learns"), [(CLOCK_MHZ, True), (CLOCK_MHZ - 200, False)])
def test_a_clock_lock_that_is_not_in_force_is_not_compared(lock_mhz: int, learns: bool) -> None:
    _, state = stepped(watched(clock_mhz=lock_mhz), steady(300.0))

    assert (state.correction != Correction()) == learns


@dataclass
class Curious:
    """A policy that asks for the correction."""

    seen: list[Correction]

    def initial(self) -> None:
        return None

    def step(self, *_: Any) -> tuple[Decision, None]:
        raise AssertionError("the corrected step is asked for instead")

    def step_corrected(
        self, state: None, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float, correction: Correction
    ) -> tuple[Decision, None]:
        self.seen.append(correction)
        return Decision(point=POINT, reason="static"), None


def test_a_policy_that_asks_for_it_gets_the_correction() -> None:
    policy = Curious([])

    _, state = stepped(Watched(policy, Forecaster()), steady(300.0))
    assert policy.seen[-1] == state.correction


def test_records_carry_the_correction_and_a_replay_compares_it(tmp_path: Path) -> None:
    policy, guard = watched(), Guard(min_limit_w=100.0, max_limit_w=400.0, boards=2, launch_sequences=64)
    samples = list(steady(2400.0, step=lambda t: 1.1 if t > 1200.0 else 1.0))
    state, records = policy.initial(), []
    for i, sample in enumerate(samples):
        decision, state = policy.step(state, sample, Budget(), Slo(), sample.time_s)
        news = policy.tell(state)
        records.append(
            TickRecord(
                index=i,
                sample=sample,
                budget=Budget(),
                slo=Slo(),
                decision=decision,
                guarded=guard.check(decision, Budget()),
                enforced_limits_w=(400.0, 400.0),
                mode="auto",
                correction=news.bias,
                drift=news.drift,
                notes=news.notes,
            )
        )
    assert records[-1].drift.keys() == {"step"}

    again = replay(watched(), guard, records)
    assert again.same == again.total == len(samples)
    forged = [*records[:-1], replace(records[-1], correction={"step": 1.0})]
    assert "recorded correction" in replay(watched(), guard, forged).differences[0]
    assert encode(records[-1])["correction"].keys() == {"step", "power", "clock"}


def test_a_tick_writes_what_its_controller_learnt() -> None:
    clock = Clock()
    boards, engine = [Board(clock)], Engine(clock)
    policy = watched()
    rig = Rig(
        meters=boards, actuators=boards, engine=engine, setter=engine, controller=policy,
        guard=Guard.of([b.info for b in boards], 64), period_s=0.5,
    )  # fmt: skip
    _, learnt = stepped(policy, steady(600.0, step=lambda t: 1.2))

    record, _ = tick(rig, TickState(controller=learnt._replace(window=None)), Budget(), Slo(), clock.now)
    assert record.correction == policy.tell(learnt).bias
    assert record.drift == policy.tell(learnt).drift
    assert any("step time is +" in note for note in record.notes)
