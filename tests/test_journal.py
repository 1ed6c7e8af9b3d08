"""The journal round-trips exactly, survives a torn last line, and a replay reproduces or tells the difference."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from pals.control.guard import Guard
from pals.control.levers import LEVERS
from pals.control.pals_paper import PaperSettings
from pals.control.policies import build_policy
from pals.core.errors import ConfigError
from pals.core.quantities import Slo
from pals.models.profile import Profile
from pals.runtime.budgets import parse_budget
from pals.runtime.journal import Journal, JournalHeader, read_journal
from pals.runtime.loop import GridClock, run
from pals.runtime.replay import replay
from pals.runtime.tick import Rig, TickRecord
from tests.test_lever_policies import with_clocks
from tests.worlds import Board, Clock, Engine, board_info, engine_info


def record_run(path: Path, policy: str = "pals-paper") -> list[TickRecord]:
    clock = Clock(until_s=140.0)
    boards = [Board(clock, i) for i in range(4)]
    engine = Engine(clock, per_sequence=9.7)
    guard = Guard.of([b.info for b in boards], 64)
    settings = asdict(PaperSettings())
    header = JournalHeader(
        policy=policy,
        policy_settings=settings,
        profile_json=with_clocks().to_json(),
        boards=tuple(board_info(i) for i in range(4)),
        engine=engine_info(),
        period_s=0.5,
        emulated=True,
        started_at="2026-01-01T00:00:00",
        command="pals agent",
    )
    journal = Journal(path, header)
    records: list[TickRecord] = []

    def sink(record: TickRecord) -> None:
        records.append(record)
        journal.append(record)

    rig = Rig(
        meters=boards, actuators=boards, engine=engine, setter=engine,
        controller=build_policy(policy, settings, with_clocks(), guard), guard=guard, period_s=0.5,
    )  # fmt: skip
    run(
        rig, budget=parse_budget("0:none,10:700,25:1600"), slo=Slo(throughput_tokens_s=480.0, ttft_p95_s=1.0),
        clock=GridClock(now_s=clock.now_s, wait=clock.wait), sink=sink,
    )  # fmt: skip
    journal.close()
    return records


def test_records_come_back_exactly(tmp_path: Path) -> None:
    written = record_run(tmp_path / "j.jsonl")

    header, read = read_journal(tmp_path / "j.jsonl")

    assert list(read) == written
    assert header.policy == "pals-paper"
    assert len({r.guarded.point for r in written}) > 2


@pytest.mark.parametrize("name", list(LEVERS))
def test_a_replay_reproduces_every_decision_and_tells_a_changed_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / "j.jsonl"
    total = len(record_run(path, name))
    header, records = read_journal(path)
    guard = Guard.of(header.boards, 64)
    measured = Profile.from_json(header.profile_json or "")
    policy = build_policy(header.policy, header.policy_settings, measured, guard)

    assert replay(policy, guard, records).same == total

    other = build_policy(header.policy, {**header.policy_settings, "dead_band": 0.9}, measured, guard)
    changed = replay(other, guard, read_journal(path)[1])
    assert changed.same < total
    assert changed.differences[0].startswith("tick ")


def test_a_journal_of_before_the_clock_lever_still_reads(tmp_path: Path) -> None:
    written = record_run(tmp_path / "j.jsonl")
    text = (tmp_path / "j.jsonl").read_text()
    added = (
        ',"accepted_clocks_mhz":[null,null,null,null]',
        ',"scheduled":null,"lowering":"drain"',
        ',"sm_clocks_mhz":[]',
    )
    for part in added:
        assert part in text
        text = text.replace(part, "")
    (tmp_path / "old.jsonl").write_text(text.replace(',"lowering":"drain"}', "}"))

    header, read = read_journal(tmp_path / "old.jsonl")

    assert [r.decision for r in read] == [r.decision for r in written]
    assert header.lowering == "drain"


def test_a_line_torn_by_a_crash_is_left_out_and_one_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    total = len(record_run(path))
    text = path.read_text()

    path.write_text(text[:-40])
    assert len(list(read_journal(path)[1])) == total - 1

    lines = text.splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:50], *lines[4:]]))
    with pytest.raises(ConfigError, match="line 4"):
        list(read_journal(path)[1])


@pytest.mark.parametrize("text", ["", "hello", "{}", '{"format": "pals-journal/0"}'])
def test_what_is_no_journal_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    path.write_text(text)

    with pytest.raises(ConfigError, match="not a PALS journal"):
        read_journal(path)
