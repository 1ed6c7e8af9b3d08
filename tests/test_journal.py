"""The journal round-trips exactly, survives a torn last line, and a replay reproduces or tells the difference."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pals.control.guard import Guard
from pals.control.levers import LEVERS
from pals.control.pals_paper import PaperSettings
from pals.control.policies import build_policy
from pals.core.errors import ConfigError
from pals.core.quantities import Slo
from pals.models.profile import Profile
from pals.runtime.budgets import parse_budget
from pals.runtime.journal import ADDED_LATER, Journal, JournalHeader, read_journal
from pals.runtime.loop import GridClock, run
from pals.runtime.replay import replay
from pals.runtime.tick import Rig, TickRecord
from tests.profile_world import clock_profile
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
        profile_json=clock_profile().to_json(),
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
        controller=build_policy(policy, settings, clock_profile(), guard), guard=guard, period_s=0.5,
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


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of a sound journal."""
    path = tmp_path_factory.mktemp("sound") / "j.jsonl"
    record_run(path)
    return path.read_text().splitlines()


@pytest.mark.parametrize(
    ("line", "was", "becomes", "told"),
    [
        (1, '"boards":[', '"boards":[],"old":[', "line 1: old is unknown"),
        (1, '"min_limit_w":100.0', '"min_limit_w":"100"', r"line 1: boards\[0\].min_limit_w is '100', not a number"),
        (1, '"period_s":0.5', '"period_s":0', "line 1: .*period_s must be above 0"),
        (1, '"dead_band":0.05', '"dead_band":"x"', "line 1: policy_settings.dead_band is 'x', not a number"),
        (4, '"power_w":', '"watts":', r"line 4: sample.boards\[0\].watts is unknown .a newer.*the 2 records before it"),
        (4, '"budget":{"power_w":null}', '"budget":{}', "line 4: budget.power_w is missing"),
        (4, '"slo":{', '"slo":[],"x":{', "line 4: x is unknown"),
        (3, '"waiting":3', '"waiting":NaN', "line 3: NaN is no JSON.*the header and the record before it are sound"),
        (3, '"waiting":3', '"waiting":3.5', "line 3: sample.engine.waiting is '3.5', not a whole number"),
        (3, '"waiting":3', '"waiting":true', "line 3: sample.engine.waiting is 'True', not a whole number"),
        (3, '"waiting":3', '"waiting":1' + "0" * 400, "line 3: sample.engine.waiting is a whole number of 1329 bits"),
        (2, '"window_s":0.0', '"window_s":1e999', "line 2: sample.window_s is inf.*the header before it is sound"),
        (2, '"ttft_counts":[0,', '"ttft_counts":[', "line 2: sample.engine: 56 TTFT and 57 TPOT counts"),
        (5, '"index":3', '"index":7', "line 5: index is 7 where tick 3 should stand"),
    ],
)
def test_damage_is_told_with_its_line_and_what_is_sound_before_it(
    tmp_path: Path, sound: list[str], line: int, was: str, becomes: str, told: str
) -> None:
    assert was in sound[line - 1]
    path = tmp_path / "j.jsonl"
    path.write_text("\n".join([*sound[: line - 1], sound[line - 1].replace(was, becomes, 1), *sound[line:]]) + "\n")

    with pytest.raises(ConfigError, match=told):
        list(read_journal(path)[1])


@pytest.mark.parametrize("line", ["[]", "{}", "3", "null", '"x"', "[" * 5000 + "]" * 5000])
@pytest.mark.parametrize("at", [1, 3])
def test_a_line_of_another_kind_is_damage_even_where_it_is_json(
    tmp_path: Path, sound: list[str], line: str, at: int
) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text("\n".join([*sound[: at - 1], line, *sound[at:]]) + "\n")

    with pytest.raises(ConfigError, match="not a PALS journal" if at == 1 else "line 3: .*are sound"):
        list(read_journal(path)[1])


def test_empty_boards_are_no_journal(tmp_path: Path, sound: list[str]) -> None:
    head = json.loads(sound[0])
    (tmp_path / "j.jsonl").write_text(json.dumps({**head, "boards": []}) + "\n")

    with pytest.raises(ConfigError, match="line 1: boards is empty"):
        read_journal(tmp_path / "j.jsonl")


def test_every_cut_of_a_record_is_told_or_left_out_and_never_a_traceback(tmp_path: Path, sound: list[str]) -> None:
    path, record = tmp_path / "j.jsonl", json.loads(sound[3])
    for where in keys_of(record):
        damaged = json.loads(sound[3])
        *above, last = where
        inside = damaged
        for key in above:
            inside = inside[key]
        del inside[last]
        path.write_text("\n".join([*sound[:3], json.dumps(damaged), *sound[4:]]) + "\n")
        if last in ADDED_LATER or (above and above[-1] == "violations"):
            assert len(list(read_journal(path)[1])) == len(sound) - 1
        else:
            with pytest.raises(ConfigError, match=f"line 4: .*{last} is missing"):
                list(read_journal(path)[1])


def keys_of(table: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The path of every key in a record."""
    found: list[tuple[Any, ...]] = []
    for key, value in table.items():
        found.append((key,))
        if isinstance(value, dict):
            found += [(key, *below) for below in keys_of(value)]
        if isinstance(value, list) and value and isinstance(value[0], dict):
            found += [(key, 0, *below) for below in keys_of(value[0])]
    return found


def test_absurd_but_finite_values_end_a_replay_with_the_tick(tmp_path: Path, sound: list[str]) -> None:
    path = tmp_path / "j.jsonl"
    text = re.sub(r'("window_s":)[0-9.]+', r"\g<1>1e308", sound[3])
    text = re.sub(r'("power_w":)[0-9.]+(,"engine")', r"\g<1>1e308\2", text)
    assert text.count("1e308") == 2
    path.write_text("\n".join([*sound[:3], text, *sound[4:]]) + "\n")
    header, records = read_journal(path)
    guard = Guard.of(header.boards, 64)
    policy = build_policy(header.policy, header.policy_settings, Profile.from_json(header.profile_json or ""), guard)

    with pytest.raises(ConfigError, match=r"tick 2: its values cannot be computed with .*; the 2 decisions before it"):
        replay(policy, guard, records)
