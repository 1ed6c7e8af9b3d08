"""A canary acts in its share of time, by a draw that nobody can foresee and everybody can repeat."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.control.correction import Correction
from pals.control.guard import Guard
from pals.control.interleaved import ARMS, OFF, ON, Interleaved, Interleaving
from pals.control.static import StaticPolicy
from pals.control.watched import Watched
from pals.core.errors import ConfigError
from pals.core.quantities import Budget, Decision, OperatingPoint, Slo, TelemetrySample
from pals.runtime.config import load_config
from pals.runtime.journal import Journal, JournalHeader, read_journal
from pals.runtime.replay import replay
from pals.runtime.tick import Rig, TickRecord, TickState, tick
from pals.views.metrics import AgentMetrics
from tests.node_world import AgentWorld
from tests.watched_world import Forecaster, steady
from tests.worlds import Board, Clock, Engine, board_info, engine_info, telemetry

LOW = OperatingPoint(power_limit_w=250.0, active_sequences=32)
FOUND = OperatingPoint(power_limit_w=400.0, active_sequences=64)
HALF = Interleaving(share=0.5, window_s=10.0, seed=3)

designs = st.builds(
    Interleaving,
    share=st.integers(1, 99).map(lambda percent: percent / 100),
    seed=st.integers(0, 1000),
    window_s=st.sampled_from([5.0, 20.0, 30.0]),
)


@settings(max_examples=20, deadline=None)
@given(designs)
def test_the_policy_has_exactly_its_share_of_every_thousand_windows(design: Interleaving) -> None:
    arms = Counter(design.arm(w) for w in range(1000))

    assert arms[ON] == pytest.approx(1000 * design.share, abs=1)


@settings(max_examples=30, deadline=None)
@given(designs, st.integers(0, 5000))
def test_a_block_holds_one_window_of_the_rarer_arm_beside_its_partner(design: Interleaving, window: int) -> None:
    block = design.block_of(window)
    on, off = design.pair(block)
    windows = [w for w in range(window - 110, window + 110) if w >= 0 and design.block_of(w) == block]

    assert (design.arm(on), design.arm(off)) == (ON, OFF)
    assert abs(on - off) == 1
    assert {on, off} <= set(windows)
    assert sum(design.arm(w) == design.rarer for w in windows) == 1


def test_the_two_windows_of_a_pair_change_places_like_a_fair_coin() -> None:
    first = [on < off for on, off in (Interleaving(share=0.5, seed=s).pair(b) for s in range(40) for b in range(100))]

    assert sum(first) / len(first) == pytest.approx(0.5, abs=0.03)
    again = sum(a == b for a, b in pairwise(first)) / len(first)
    assert again == pytest.approx(0.5, abs=0.03)


def test_the_draw_is_the_same_in_every_version_and_on_every_machine() -> None:
    design = Interleaving(share=0.1, seed=7)

    drawn = [w for w in range(60) if design.arm(w) == ON]
    assert drawn == [7, 13, 24, 33, 41, 53]
    assert [w for w in range(60) if replace(design, seed=8).arm(w) == ON] != drawn


def test_windows_begin_where_they_should_though_times_are_sums_of_floats() -> None:
    design, now_s = Interleaving(share=0.5, window_s=0.3), 0.0
    for _ in range(3):
        now_s += 0.1

    assert design.window_at(0.1 + 0.1 + 0.1 - 1e-9) == 1
    assert design.window_at(now_s) == 1


@pytest.mark.parametrize("values", [{"share": 0.0}, {"share": 1.0}, {"share": 0.5, "window_s": 0.0}])
def test_a_share_that_compares_nothing_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Interleaving(**values)  # type: ignore[arg-type]


@dataclass
class Counting:
    """A policy that wants LOW, counts its steps, and hears of the correction."""

    heard: int = 0

    def initial(self) -> int:
        return 0

    def step(self, state: int, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float) -> tuple[Decision, int]:
        return Decision(point=LOW, reason="low", detail=f"step {state}"), state + 1

    def step_corrected(
        self, state: int, sample: TelemetrySample, budget: Budget, slo: Slo, now_s: float, correction: Correction
    ) -> tuple[Decision, int]:
        self.heard += 1
        return self.step(state, sample, budget, slo, now_s)


def stepped(policy: Any, samples: Sequence[TelemetrySample]) -> tuple[list[Decision], Any]:
    state, decisions = policy.initial(), []
    for sample in samples:
        decision, state = policy.step(state, sample, Budget(), Slo(), sample.time_s)
        decisions.append(decision)
    return decisions, state


def test_each_arm_asks_for_its_point_and_the_policy_stays_warm_in_the_others_windows() -> None:
    policy = Interleaved(Counting(), StaticPolicy(FOUND), HALF)

    decisions, state = stepped(policy, [telemetry(100.0 + 0.5 * i) for i in range(400)])

    for i, decision in enumerate(decisions):
        assert decision.arm == HALF.arm(i // 20)
        assert decision.point == (LOW if decision.arm == ON else FOUND)
        assert decision.reason == ("low" if decision.arm == ON else "static")
    assert state.inner == 400
    advice = next(d.detail for d in decisions if d.arm == OFF)
    assert advice.endswith("the policy would ask for 250 W, no clock lock, 32 sequences (low)")


def test_the_watch_works_around_an_interleaved_policy_and_the_policy_hears_of_it() -> None:
    inner = Counting()
    samples = list(steady(1800.0, power=lambda t: 1.05))
    alone, state_alone = stepped(Watched(StaticPolicy(FOUND), Forecaster(), top_w=400.0), samples)
    watched = Watched(Interleaved(inner, StaticPolicy(FOUND), HALF), Forecaster(), top_w=400.0)

    decisions, state = stepped(watched, samples)

    assert inner.heard == len(decisions)
    assert watched.tell(state).bias == pytest.approx(watched.tell(state_alone).bias)
    assert watched.tell(state).bias["power"] == pytest.approx(1.05, abs=0.01)
    assert {d.arm for d in alone} == {None}


def test_a_policy_that_watches_nothing_is_stepped_as_if_nobody_watched() -> None:
    watched = Watched(Interleaved(StaticPolicy(LOW), StaticPolicy(FOUND), HALF), Forecaster(), top_w=400.0)

    decisions, _ = stepped(watched, list(steady(60.0)))

    assert {d.point for d in decisions} == {LOW, FOUND}


def canary_records(seconds: float, budget: Budget) -> list[TickRecord]:
    clock = Clock()
    board, engine = Board(clock), Engine(clock)
    rig = Rig(
        meters=[board], actuators=[board], engine=engine, setter=engine,
        controller=Interleaved(StaticPolicy(LOW), StaticPolicy(FOUND), HALF),
        guard=Guard.of([board.info], 64), period_s=0.5, acting="canary",
    )  # fmt: skip
    state, records = TickState(controller=rig.controller.initial()), []
    while clock.now < 100.0 + seconds:
        record, state = tick(rig, state, budget, Slo(), clock.now)
        records.append(record)
        clock.wait(0.5)
    return records


def test_a_budget_holds_in_both_arms() -> None:
    records = canary_records(120.0, Budget(power_w=230.0))

    assert {r.guarded.arm for r in records} == set(ARMS)
    assert {r.enforced_limits_w for r in records} == {(225.0,)}
    assert {r.mode for r in records} == {"canary"}


def test_a_journal_of_a_canary_replays_and_a_changed_arm_is_found(tmp_path: Path) -> None:
    records = canary_records(60.0, Budget())
    header = JournalHeader(
        policy="static", policy_settings={"power_limit_w": 250.0, "active_sequences": 32}, profile_json=None,
        boards=(board_info(),), engine=engine_info(), period_s=0.5, emulated=True, started_at="", command="",
        interleaving=HALF,
    )  # fmt: skip
    journal = Journal(tmp_path / "j.jsonl", header)
    for record in records:
        journal.append(record)
    journal.close()

    told, read = read_journal(tmp_path / "j.jsonl")
    assert told.interleaving == HALF
    policy = Interleaved(StaticPolicy(LOW), StaticPolicy(FOUND), told.interleaving)
    guard = Guard.of(told.boards, 64)
    assert replay(policy, guard, read).same == len(records)
    other = Interleaved(StaticPolicy(LOW), StaticPolicy(FOUND), replace(HALF, seed=4))
    assert replay(other, guard, records).same < len(records)


def test_a_journal_from_before_canaries_is_read(tmp_path: Path) -> None:
    record = canary_records(0.5, Budget())[0]
    header = JournalHeader(
        policy="static", policy_settings={}, profile_json=None, boards=(board_info(),), engine=engine_info(),
        period_s=0.5, emulated=True, started_at="", command="",
    )  # fmt: skip
    journal = Journal(tmp_path / "j.jsonl", header)
    journal.append(record)
    journal.close()
    head, line = (json.loads(text) for text in (tmp_path / "j.jsonl").read_text().splitlines())
    del head["interleaving"], line["decision"]["arm"], line["guarded"]["arm"]
    (tmp_path / "old.jsonl").write_text(f"{json.dumps(head)}\n{json.dumps(line)}\n")

    told, read = read_journal(tmp_path / "old.jsonl")
    assert told.interleaving is None
    assert next(iter(read)).decision.arm is None


def test_metrics_tell_the_arm_and_count_what_each_did() -> None:
    metrics = AgentMetrics()
    view = metrics.engine("m", [0])
    records = canary_records(100.0, Budget())
    for record in records:
        view.observe(record)

    def value(name: str, arm: str) -> float:
        return metrics.registry.get_sample_value(name, {"engine": "m", "arm": arm}) or 0.0

    now = records[-1].guarded.arm
    assert {arm: value("pals_arm_info", arm) for arm in ARMS} == {arm: float(arm == now) for arm in ARMS}
    assert sum(value("pals_arm_seconds_total", arm) for arm in ARMS) == pytest.approx(99.5)
    on_w = value("pals_arm_energy_joules_total", ON) / value("pals_arm_seconds_total", ON)
    off_w = value("pals_arm_energy_joules_total", OFF) / value("pals_arm_seconds_total", OFF)
    assert on_w == pytest.approx(250.0)
    assert off_w == pytest.approx(320.0)
    assert metrics.registry.get_sample_value("pals_mode_info", {"engine": "m", "mode": "canary"}) == 1.0


@pytest.mark.parametrize(
    ("mode", "share"), [("canary", 0.1), ("canary:10%", 0.1), ("canary:0.25", 0.25), ("canary:50 %", 0.5)]
)
def test_the_mode_names_its_share(mode: str, share: float) -> None:
    control = load_config(None, {"control": {"mode": mode}}).control

    assert (control.mode, control.canary_share) == ("canary", share)
    assert control.interleaving == Interleaving(share=share, window_s=30.0)


@pytest.mark.parametrize(
    ("control", "told"),
    [
        ({"mode": "auto:10%"}, "only canary takes a share"),
        ({"mode": "canary:ten"}, "expected a share like 10%"),
        ({"mode": "canary:10"}, "expected a share like 10%"),
        ({"mode": "canary:0%"}, "canary_share = 0 must lie in 0.01..0.99; modes auto and advise"),
        ({"mode": "canray"}, "did you mean 'canary'"),
        ({"canary_window_s": 1.0}, "at least 6 control periods"),
        ({"canary_baseline": "statik"}, "did you mean 'static'"),
        ({"mode": "canary", "canary_baseline": "pals-paper"}, "throughput target"),
    ],
)
def test_a_canary_that_cannot_be_is_refused_with_what_to_do(control: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(None, {"control": control})


@pytest.mark.parametrize(("may_write", "mode"), [(True, "canary"), (False, "advise")])
def test_an_agent_is_a_canary_only_where_it_may_write(tmp_path: Path, may_write: bool, mode: str) -> None:
    node = AgentWorld(tmp_path, Clock(until_s=130.0), may_write=may_write)
    node.add("m", boards=(0, 1))
    journal = tmp_path / "j.jsonl"

    assert node.run(
        control={"mode": "canary:50%", "canary_window_s": 5.0, "power_limit_w": 250.0}, output={"journal": str(journal)}
    ) == 0  # fmt: skip

    header, _ = read_journal(journal)
    records = node.records["m"]
    assert {r.mode for r in records} == {mode}
    assert (header.interleaving is not None) == may_write
    assert {r.guarded.arm for r in records} == ({ON, OFF} if may_write else {None})
    assert (250.0 in node.boards[0].written_w) == may_write
    assert [b.limit_w for b in node.boards] == [400.0, 400.0]
