"""Boards that cannot be read, in what is kept and judged afterwards: journal, replay, energy, doctor, guard."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pals.control.guard import Guard
from pals.control.pals_paper import PaperSettings
from pals.control.policies import build_policy
from pals.core.errors import ConfigError, DeviceLostError
from pals.core.quantities import Slo
from pals.experiments.outcome import energy_between_j
from pals.runtime.budgets import parse_budget
from pals.runtime.journal import Journal, JournalHeader, read_journal
from pals.runtime.loop import GridClock, run
from pals.runtime.replay import replay
from pals.runtime.tick import Rig, TickRecord
from pals.views.doctor.boards import board as board_findings
from tests.profile_world import clock_profile
from tests.test_doctor import NOW, board
from tests.worlds import Board, Clock, Engine, board_info, engine_info


def recorded(path: Path) -> list[TickRecord]:
    """Four boards under a falling and rising budget; one cannot be read for ten seconds, one has no energy counter."""
    clock = Clock(until_s=140.0)
    boards = [Board(clock, i, energy_counter=i != 3) for i in range(4)]
    guard = Guard.of([b.info for b in boards], 64)
    settings = asdict(PaperSettings())
    journal = Journal(
        path,
        JournalHeader(
            policy="pals-paper", policy_settings=settings, profile_json=clock_profile().to_json(),
            boards=tuple(board_info(i) for i in range(4)), engine=engine_info(), period_s=0.5, emulated=True,
            started_at="2026-01-01T00:00:00", command="pals agent",
        ),
    )  # fmt: skip
    records: list[TickRecord] = []

    def sink(record: TickRecord) -> None:
        records.append(record)
        journal.append(record)
        boards[1].fails = DeviceLostError("lost") if 112.0 <= clock.now < 122.0 else None

    rig = Rig(
        meters=boards, actuators=boards, engine=(engine := Engine(clock, per_sequence=9.7)), setter=engine,
        controller=build_policy("pals-paper", settings, clock_profile(), guard), guard=guard, period_s=0.5,
    )  # fmt: skip
    run(
        rig, budget=parse_budget("0:none,10:900,25:1600"), slo=Slo(throughput_tokens_s=480.0),
        clock=GridClock(now_s=clock.now_s, wait=clock.wait), sink=sink,
    )  # fmt: skip
    journal.close()
    return records


def test_a_journal_with_an_absent_board_comes_back_exactly_and_replays_every_decision(tmp_path: Path) -> None:
    written = recorded(tmp_path / "j.jsonl")

    header, read = read_journal(tmp_path / "j.jsonl")
    records = list(read)

    assert records == written
    assert {r.sample.absent for r in records} == {(), (1,)}
    assert records[0].sample.boards[3].energy_j is None
    guard = Guard.of(header.boards, 64)
    policy = build_policy(header.policy, header.policy_settings, clock_profile(), guard)
    assert replay(policy, guard, records).same == len(records)


def test_a_journal_of_before_reads_with_no_board_absent(tmp_path: Path) -> None:
    written = recorded(tmp_path / "j.jsonl")
    text = (tmp_path / "j.jsonl").read_text()
    assert ',"absent":[]' in text
    (tmp_path / "old.jsonl").write_text(text.replace(',"absent":[]', ""))

    assert list(read_journal(tmp_path / "old.jsonl")[1]) == written


def test_energy_is_refused_where_a_board_was_not_read_or_has_no_counter(tmp_path: Path) -> None:
    records = recorded(tmp_path / "j.jsonl")
    away = next(r for r in records if r.sample.absent)

    with pytest.raises(ValueError, match="could not be read"):
        energy_between_j(records[0], away)
    with pytest.raises(ValueError, match="no energy counter"):
        energy_between_j(records[0], records[-1])


def test_doctor_tells_a_board_without_an_energy_counter() -> None:
    (told,) = (
        f
        for f in board_findings(board(now=replace(NOW, energy_j=None), meter=None), steered=False)
        if f.check == "energy-counter"
    )

    assert "no energy counter" in told.text


def test_no_boards_have_no_guard() -> None:
    with pytest.raises(ConfigError, match="engine without boards"):
        Guard.of([], launch_sequences=64)
