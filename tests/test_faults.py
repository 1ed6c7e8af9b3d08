"""A schedule of faults is read strictly and does to the boards what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.core.errors import ConfigError
from pals.plant.boards import BoardBank, known_faults
from pals.plant.faults import (
    BOARD_KINDS,
    KINDS,
    FaultEvent,
    FaultSchedule,
    apply_to,
    engine_events,
    load_faults,
)
from pals.plant.silicon import Load
from pals.plant.specs import board_specs

A100 = board_specs()["a100-sxm4-80gb"]
CSV = """time_s,kind,board,value
# one board goes, another is limited by the rack
2.5,lost,1,1
1,external_limit,0,220
4,lost,1,0
6,routing_drift,,0.8
6,hot_air,,45
"""


def test_a_csv_and_a_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(CSV)
    listed = [
        {"time_s": 2.5, "kind": "lost", "board": 1},
        {"time_s": 1, "kind": "external_limit", "board": 0, "value": 220},
        {"time_s": 4, "kind": "lost", "board": 1, "value": 0},
        {"time_s": 6, "kind": "routing_drift", "value": 0.8},
        {"time_s": 6, "kind": "hot_air", "board": None, "value": 45},
    ]
    (tmp_path / "f.json").write_text(json.dumps(listed))

    schedule = load_faults(tmp_path / "f.csv")

    assert schedule == load_faults(tmp_path / "f.json")
    assert schedule.times_s() == (1.0, 2.5, 4.0, 6.0)
    assert [e.kind for e in schedule.due(1.0, 4.0)] == ["lost", "lost"]
    assert engine_events(schedule.events) == (FaultEvent(time_s=6.0, kind="routing_drift", value=0.8),)
    schedule.check_boards(2)
    with pytest.raises(ConfigError, match=r"lost at 2\.5 s names board 1; there are 1"):
        schedule.check_boards(1)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("1,lots,0,1", "did you mean 'lost'"),
        ("soon,lost,0,1", "time_s 'soon' is not a number"),
        ("-1,lost,0,1", "not a time of at least 0"),
        (",lost,0,1", "time_s must be given"),
        ("1,lost,0.5,1", "not a whole number"),
        ("1,lost,inf,1", "not a whole number"),
        ("1,lost,-1,1", "boards count from 0"),
        ("1,lost,0,2", "1 .begins. or 0 .ends., not 2"),
        ("1,external_limit,0,nan", "not a number of at least 0"),
        ("1,routing_drift,0,1", "engine events name none"),
        ("1,engine_build,,0", "cannot be 0"),
        ("1,lost,0,1,1", "unknown field"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str, told: str) -> None:
    path = tmp_path / "faults.csv"
    path.write_text(f"time_s,kind,board,value\n0,lost,0,1\n{row}\n")

    with pytest.raises(ConfigError, match=f"row 3: .*{told}.*Nothing was started"):
        load_faults(path)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("f.csv", "at,what\n1,lost\n", "lacks a header"),
        ("f.csv", "", "lacks a header"),
        ("f.json", "{", "is not JSON"),
        ("f.json", '{"time_s": 1}', "not a list of objects"),
        ("f.json", '[{"time_s": true, "kind": "lost"}]', "row 1: time_s True is not a number"),
        ("f.json", '[{"time_s": 1, "kind": "lost", "when": 2}]', "unknown field when"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_faults(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot read the faults"):
        load_faults(tmp_path / "missing.csv")


def test_each_kind_of_board_fault_is_known_to_the_bank_and_acts(tmp_path: Path) -> None:
    assert set(BOARD_KINDS.values()) < set(known_faults())
    bank = BoardBank.create(tmp_path / "bank", A100, 2, now_s=0.0)
    bank.book([0, 1], 0.0, 60.0, Load(compute=0.2, memory=0.8), 0.0)
    before = bank.reading(0, 5.0)
    for kind, value in (
        ("lost", 1.0),
        ("external_limit", 150.0),
        ("slow_setter", 0.2),
        ("stuck_meter", 1.0),
        ("hot_air", 70.0),
    ):
        apply_to(bank, [FaultEvent(time_s=5.0, kind=kind, board=0, value=value)], 5.0)
    faulty, other = bank.reading(0, 15.0), bank.reading(1, 15.0)

    assert (bank.faults(0)[0], bank.faults(1)[0]) == (True, False)
    assert (faulty.enforced_limit_w, faulty.requested_limit_w) == (150.0, 400.0)
    assert (faulty.power_avg_w, faulty.energy_j) == (before.power_avg_w, before.energy_j)
    assert faulty.sm_clock_mhz < 1410 == other.sm_clock_mhz
    assert faulty.temperature_c > other.temperature_c + 5.0
    assert bank.setter_time_s(0) > 0.2 > bank.setter_time_s(1)
    for kind in BOARD_KINDS:
        apply_to(bank, [FaultEvent(time_s=15.0, kind=kind, value=0.0)], 15.0)
    assert bank.reading(0, 20.0).energy_j > before.energy_j
    assert bank.reading(0, 20.0).enforced_limit_w == 400.0
    assert bank.faults(0) == (False, False, False)
    bank.close()


def test_a_fault_without_a_board_strikes_all_and_engine_events_strike_none(tmp_path: Path) -> None:
    bank = BoardBank.create(tmp_path / "bank", A100, 3, now_s=0.0)

    apply_to(bank, [FaultEvent(time_s=0, kind="denied"), FaultEvent(time_s=0, kind="engine_build", value=1.5)], 0.0)

    assert [bank.faults(i)[2] for i in range(3)] == [True] * 3
    bank.close()


def test_what_cannot_be_injected_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    bank = BoardBank.create(tmp_path / "bank", A100, 1, now_s=0.0)
    for fault, value in (("external_limit", float("nan")), ("dip", -1.0), ("gremlins", 1.0)):
        with pytest.raises(ValueError, match=fault):
            bank.inject(0, fault, value, 0.0)
    assert bank.reading(0, 1.0).enforced_limit_w == 400.0
    bank.close()


@given(times=st.lists(st.floats(0, 100), max_size=20), cut_s=st.floats(0, 100))
def test_windows_that_follow_each_other_hold_every_event_once(times: list[float], cut_s: float) -> None:
    schedule = FaultSchedule(
        events=tuple(FaultEvent(time_s=t, kind=KINDS[i % len(KINDS)], value=1.0) for i, t in enumerate(times))
    )

    assert (*schedule.due(-1.0, cut_s), *schedule.due(cut_s, 101.0)) == schedule.events
