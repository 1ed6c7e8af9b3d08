"""Measured routing in control: a sliding window, a drift that is found in seconds and not by chance, decisions that name it and replay."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pals.control.controller import PalsPolicy
from pals.control.correction import Correction
from pals.control.drift_cause import Shifts, guess_cause
from pals.control.estimator import estimate
from pals.control.guard import Guard
from pals.control.policies import build_policy
from pals.control.routing import FRESH_S, Routing, RoutingTrack, followed, judged
from pals.control.static import StaticPolicy
from pals.control.watched import Watched
from pals.core.errors import ConfigError
from pals.core.experts import ExpertSummary
from pals.core.plain import decode
from pals.core.quantities import Budget, Decision, OperatingPoint, Slo, TelemetrySample
from pals.core.routing import popularity_parts
from pals.models.profile import MOST_BYTES, Profile
from pals.runtime.config import load_config
from pals.runtime.journal import ADDED_LATER, Journal, JournalHeader, encode, read_journal
from pals.runtime.loop import GridClock, run
from pals.runtime.replay import replay
from pals.runtime.routing_meter import RoutingMeter
from pals.runtime.tick import Rig, TickRecord
from tests.profile_world import whole_profile
from tests.routing_world import CountingWorker, gamma_weights, half_the_popular_changed, profiled, read_for
from tests.test_pals_policy import GUARD, World
from tests.watched_world import Forecaster
from tests.worlds import Board, Clock, Engine, board_info, engine_info, telemetry

EVEN = (1.0,) * 16
SKEWED = popularity_parts([[1, 1, 1, 1, 1, 1, 1, 30]])


def summary(time_s: float, popularity: tuple[float, ...] | None = EVEN, **more: object) -> ExpertSummary:
    """Of Mixtral's eight experts."""
    given = {
        "time_s": time_s, "span_s": 10.0, "steps": 400, "tokens": 9000, "experts": 8, "top_k": 2, "layers": 32,
        "layers_known": 32, "distinct_per_step": 6.5, "variation": 0.4, "top_fifth_share": 0.4, "hottest_rank_over_mean": None,
        "drift": 0.05, "drift_by_chance": 0.03, "drift_from": "profile", "unknown": {"hottest_rank_over_mean": "one rank"},
        "popularity": popularity,
    }  # fmt: skip
    return ExpertSummary(**given | more)  # type: ignore[arg-type]


# ---- reading


def test_a_window_slides_and_its_drift_is_from_the_profile(tmp_path: Path) -> None:
    worker = CountingWorker(tmp_path, gamma_weights())
    meter = RoutingMeter.of_engine(tmp_path, [1], reference=profiled(worker))
    assert read_for(worker, meter, 9.5) is None  # not full yet
    first = read_for(worker, meter, 1.0)
    later = read_for(worker, meter, 0.5)
    assert first is not None
    assert later is not None
    assert (first.span_s, later.span_s, later.time_s - first.time_s) == (10.0, 10.0, 0.5)
    assert later.drift_from == "profile"
    assert later.drift is not None
    assert later.drift_by_chance is not None
    assert later.drift == pytest.approx(later.drift_by_chance, abs=0.02)
    assert meter.note is None
    assert meter.read() == later  # nothing new was published


def test_without_a_profiles_routing_the_first_full_window_is_the_reference_and_it_is_said(tmp_path: Path) -> None:
    worker = CountingWorker(tmp_path, gamma_weights())
    meter = RoutingMeter.of_engine(tmp_path, [1])
    first = read_for(worker, meter, 10.5)
    assert first is not None
    assert "no reference" in first.unknown["drift"]
    assert "first full window" in (meter.note or "")
    later = read_for(worker, meter, 20.0)
    assert later is not None
    assert later.drift_from == "start"


def test_an_engine_started_anew_begins_a_new_window(tmp_path: Path) -> None:
    worker = CountingWorker(tmp_path, gamma_weights())
    meter = RoutingMeter.of_engine(tmp_path, [1])
    assert meter.read() is None
    assert read_for(worker, meter, 15.0) is not None
    again = CountingWorker(tmp_path, gamma_weights())
    again.now_s = worker.now_s
    assert read_for(again, meter, 1.0) is None
    assert meter.note is None


# ---- what is known, and for how long


def test_an_estimate_carries_fresh_routing_and_none_that_is_old() -> None:
    sample = replace(telemetry(100.0), experts=summary(97.0))
    now = estimate([sample])
    assert (now.popularity_cv, now.distinct_experts, now.routing_drift, now.experts_age_s) == (0.4, 6.5, 0.05, 3.0)
    old = estimate([replace(sample, experts=summary(100.0 - FRESH_S - 0.1))])
    assert (old.popularity_cv, old.distinct_experts, old.routing_drift, old.experts_age_s) == (None,) * 4


def test_a_popularity_is_held_while_little_changes_and_left_when_nobody_tells_any_more() -> None:
    base = whole_profile().model().base

    def after(r: Routing, now_s: float, s: ExpertSummary | None) -> Routing:
        return followed(r, replace(telemetry(now_s), experts=s), base)

    held = after(Routing(), 10.0, summary(10.0))
    assert held.now == held.then == EVEN
    nearly = popularity_parts([[100, 101, 99, 100, 100, 102, 98, 100]])
    assert after(held, 11.0, summary(11.0, nearly)).now == EVEN
    assert after(held, 11.0, summary(11.0, SKEWED)).now == SKEWED
    assert after(held, 11.0, summary(11.0, SKEWED)).then == EVEN
    assert after(held, 11.0, summary(11.0, SKEWED, experts=64)).now == EVEN  # of another model
    assert after(held, 10.0 + FRESH_S, None).now == EVEN
    assert after(held, 10.5 + FRESH_S, None).now is None


# ---- drift


def watched() -> Watched:
    return Watched(StaticPolicy(OperatingPoint(power_limit_w=400.0)), Forecaster(), top_w=400.0, experts=True)


class Watch:
    """A watched policy beside a worker, tick by tick."""

    def __init__(self, worker: CountingWorker, meter: RoutingMeter) -> None:
        self.worker, self.meter, self.policy = worker, meter, watched()
        self.state = self.policy.initial()

    def told(self, seconds: float) -> list[tuple[float, str]]:
        """When a decision's sentence spoke of routing, and how."""
        found = []
        for _ in range(round(2 * seconds)):
            self.worker.work()
            sample = replace(telemetry(self.worker.now_s), experts=self.meter.read())
            decision, self.state = self.policy.step(self.state, sample, Budget(), Slo(), self.worker.now_s)
            found += [(self.worker.now_s, decision.detail)] if "routing" in decision.detail else []
        return found


def test_a_drift_of_half_the_popular_experts_is_told_within_thirty_seconds_and_its_end_too(tmp_path: Path) -> None:
    weights = gamma_weights()
    worker = CountingWorker(tmp_path, weights)
    watch = Watch(worker, RoutingMeter.of_engine(tmp_path, [1], reference=profiled(worker)))
    assert watch.told(60.0) == []
    worker.weights, began_s = half_the_popular_changed(weights), worker.now_s
    ((told_s, detail),) = watch.told(40.0)  # once
    assert told_s - began_s <= 30.0
    assert "routing drifted: distance" in detail
    assert "from the profile's" in detail
    assert "`pals profile`" in detail
    (note,) = watch.policy.tell(watch.state).notes
    assert note in detail
    worker.weights = weights
    ((_, ended),) = watch.told(60.0)
    assert "drift of routing has ended" in ended
    assert watch.policy.tell(watch.state).notes == ()


def test_ten_minutes_of_one_routing_are_no_drift_however_few_tokens_come(tmp_path: Path) -> None:
    worker = CountingWorker(tmp_path, gamma_weights(layers=2), tokens=90)
    assert Watch(worker, RoutingMeter.of_engine(tmp_path, [1])).told(600.0) == []


def test_a_drift_needs_more_than_chance_and_a_while() -> None:
    def at(time_s: float, drift: float, by_chance: float = 0.05) -> TelemetrySample:
        return replace(telemetry(time_s), experts=summary(time_s, drift=drift, drift_by_chance=by_chance))

    track = RoutingTrack()
    for i in range(20):
        track, said = judged(track, at(float(i), 0.3, by_chance=0.25))
        assert said is None
    for i in range(20, 30):
        track, said = judged(track, at(float(i), 0.3 if i % 3 else 0.1))
        assert said is None
    track, told = judged(track, at(30.0, 0.1))[0], list[str]()
    for i in range(31, 40):
        track, said = judged(track, at(float(i), 0.31))
        told += [said] if said else []
    assert len(told) == 1
    assert told[0].startswith("routing drifted: distance 0.31 from the profile's (0.15 is chance")
    assert track.drift is not None
    assert (track.drift.since_s, track.drift.found_s) == (31.0, 36.0)
    unknown, said = judged(track, telemetry(47.0))
    assert (unknown.drift, said) == (track.drift, None)  # unknown ends nothing


def test_a_step_time_that_drifts_has_the_measured_cause_and_not_a_guess() -> None:
    slower = Shifts(step=2.0)

    def cause(routing: RoutingTrack) -> str:
        return guess_cause("step", slower, experts=True, temperature_c=None, routing=routing)

    assert "distinct experts" in cause(RoutingTrack())
    assert "experts" not in cause(RoutingTrack(measured=True))  # counted, and as it was
    track = RoutingTrack()
    for i in range(8):
        track, _ = judged(track, replace(telemetry(float(i)), experts=summary(float(i), drift=0.31)))
    assert cause(track) == "routing drifted: distance 0.31 from the profile's"


# ---- decisions


def policy(**settings: object) -> PalsPolicy:
    profile = whole_profile()
    known = replace(profile, facts=replace(profile.facts, popularity=EVEN))
    made = build_policy("pals", settings, known, GUARD)
    assert isinstance(made, Watched)
    assert isinstance(made.policy, PalsPolicy)
    return made.policy


def decisions(p: PalsPolicy, popularity: tuple[float, ...] | None, *, seconds: float = 120.0) -> list[Decision]:
    world, state, said = World(inside=4), p.initial(), []
    for _ in range(round(2 * seconds)):
        sample = world.tick()
        sample = replace(sample, experts=None if popularity is None else summary(sample.time_s, popularity))
        decision, state = p.step(state, sample, Budget(), Slo(ttft_p95_s=10.0, tpot_p95_s=1.0), sample.time_s)
        said.append(decision)
    return said


def test_a_decision_names_the_experts_where_they_matter_and_only_there() -> None:
    named = [d.detail for d in decisions(policy(), SKEWED) if "experts:" in d.detail]
    assert named
    assert " of 8 touched a step (profile: " in named[-1]
    assert not any("experts:" in d.detail for d in decisions(policy(), EVEN))
    assert not any("experts:" in d.detail for d in decisions(policy(), None))


def test_switched_off_all_is_as_if_nothing_were_measured() -> None:
    off = policy(use_experts=False)
    assert decisions(off, SKEWED) == decisions(off, None)
    assert decisions(policy(), EVEN)[-1].point == decisions(policy(), None)[-1].point


def test_a_drift_of_routing_widens_margins_as_any_other_drift_does() -> None:
    track = RoutingTrack()
    for i in range(8):
        track, _ = judged(track, replace(telemetry(float(i)), experts=summary(float(i), drift=0.4)))
    drifted = Correction().routed(track)
    assert drifted.told.notes == (track.drift.told(),)  # type: ignore[union-attr]

    def slowest_mhz(correction: Correction) -> int:
        """The lowest clock that a policy came down to under a target that binds."""
        p, world = policy(), World()
        state, clocks = p.initial(), []
        for _ in range(300):
            sample = world.tick()
            decision, state = p.step_corrected(
                state, sample, Budget(), Slo(tpot_p95_s=0.035), sample.time_s, correction
            )
            clocks.append(decision.point.sm_clock_mhz or 1410)
        return min(clocks)

    assert slowest_mhz(drifted) > slowest_mhz(Correction())


def test_a_profile_of_other_routing_is_corrected_by_the_change_since_the_start_alone() -> None:
    """Its popularity is a guess, and its price of an expert fits that guess."""
    plain = build_policy("pals", {}, whole_profile(), GUARD)
    assert isinstance(plain, Watched)
    p = plain.policy
    assert isinstance(p, PalsPolicy)
    assert [d.point for d in decisions(p, SKEWED)] == [d.point for d in decisions(p, None)]


# ---- records


class Told:
    """A meter whose routing changes after a while, as an engine's would."""

    note = "said once"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def read(self) -> ExpertSummary | None:
        t = self._clock.now
        return None if t < 105.0 else summary(t - 0.2, EVEN if t < 115.0 else SKEWED, drift=0.05 if t < 115.0 else 0.4)


def test_a_journal_with_routing_reads_back_and_replays_to_the_same_decisions(tmp_path: Path) -> None:
    clock = Clock(until_s=140.0)
    boards, engine = [Board(clock, i) for i in range(4)], Engine(clock, per_sequence=9.7)
    guard, profile = Guard.of([b.info for b in boards], 64), whole_profile()
    profile = replace(profile, facts=replace(profile.facts, popularity=EVEN))
    header = JournalHeader(
        policy="pals", policy_settings={}, profile_json=profile.to_json(), boards=tuple(board_info(i) for i in range(4)),
        engine=engine_info(), period_s=0.5, emulated=True, started_at="2026-01-01T00:00:00", command="pals agent",
    )  # fmt: skip
    journal, written = Journal(tmp_path / "j.jsonl", header), list[TickRecord]()

    def sink(record: TickRecord) -> None:
        written.append(record)
        journal.append(record)

    rig = Rig(
        meters=boards, actuators=boards, engine=engine, setter=engine, controller=build_policy("pals", {}, profile, guard),
        guard=guard, period_s=0.5, experts=Told(clock),
    )  # fmt: skip
    run(
        rig, budget=load_config(None).budget, slo=Slo(tpot_p95_s=0.1), clock=GridClock(now_s=clock.now_s, wait=clock.wait),
        sink=sink,
    )  # fmt: skip
    journal.close()
    header, records = read_journal(tmp_path / "j.jsonl")
    assert list(records) == written
    assert sum("said once" in r.notes for r in written) == 1
    assert any("routing drifted" in r.decision.detail for r in written)
    again = build_policy("pals", {}, Profile.from_json(header.profile_json or ""), guard)
    assert replay(again, guard, read_journal(tmp_path / "j.jsonl")[1]).same == len(written)


def test_samples_without_routing_still_read_and_a_damaged_routing_does_not() -> None:
    sample = replace(telemetry(1.0), experts=summary(1.0))
    plain = json.loads(json.dumps(encode(sample)))
    assert decode(TelemetrySample, plain, may_lack=ADDED_LATER) == sample
    older = {k: v for k, v in plain.items() if k != "experts"}
    assert decode(TelemetrySample, older, may_lack=ADDED_LATER).experts is None
    for name in ("experts", "variation", "unknown"):
        damaged = plain | {"experts": {k: v for k, v in plain["experts"].items() if k != name}}
        with pytest.raises(ValueError, match=f"experts.{name} is missing"):
            decode(TelemetrySample, damaged, may_lack=ADDED_LATER)


def test_a_profile_keeps_its_routing_in_less_than_a_kilobyte_more(tmp_path: Path) -> None:
    worker = CountingWorker(tmp_path, gamma_weights(layers=48))
    reference, profile = profiled(worker, 20.0), whole_profile()
    with_routing = replace(
        profile, routing=reference, facts=replace(profile.facts, popularity=popularity_parts(worker.counts.routed))
    )
    text = with_routing.to_json()
    back = Profile.from_json(text)
    assert (back.routing, back.facts) == (reference, with_routing.facts)
    assert back.to_json() == text
    assert len(text) - len(profile.to_json()) < 1024
    assert len(text) < MOST_BYTES + 1024
    assert Profile.from_json(profile.to_json()).routing is None
    damaged = text.replace(reference.shares, reference.shares[:-8])
    with pytest.raises(ConfigError, match="shares do not fit"):
        Profile.from_json(damaged)


def test_the_use_of_routing_can_be_switched_off(tmp_path: Path) -> None:
    assert load_config(None).control.experts == "auto"
    assert load_config(None, {"control": {"experts": "off"}}).control.experts == "off"
    with pytest.raises(ConfigError, match="experts"):
        load_config(None, {"control": {"experts": "on"}})
    assert asdict(load_config(None).control)["experts"] == "auto"
