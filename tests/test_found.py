"""The record of found limits: who wrote it, what it allows to put back, and what becomes of a damaged one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.cli.mending import mend, warn_of_left_limits
from pals.core.errors import ConfigError, PalsError
from pals.core.quantities import BoardWrite, OperatingPoint
from pals.hardware.limit_owner import LimitOwner
from pals.hardware.nvml import Nvml, open_boards
from pals.plant.boards import BoardBank
from pals.plant.specs import board_specs
from pals.runtime.channel import EngineChannel
from pals.runtime.found import add_found, forget_found, left_by_dead_agent, note_writes, read_found
from pals.runtime.processes import process_started, same_process
from tests.found_records import DEAD_PID, write_record
from tests.worlds import Board, Clock, engine_info

pytest.importorskip("pynvml")
A100 = board_specs()["a100-sxm4-80gb"]


class Node:
    """A run directory with three emulated A100 and a record in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record, self.now = folder, folder / "limits-found.json", 10.0
        self.path = folder / "emulated-boards.bank"
        self.bank = BoardBank.create(self.path, A100, 3, now_s=self.now)

    def open(self) -> Nvml:
        return open_boards(emulated=self.path, clock=lambda: self.now, sleep=lambda seconds: None)

    def mend(self) -> int:
        return mend(self.folder, self.path, clock=lambda: self.now)

    def stand_at(self, *limits_w: float) -> None:
        for i, limit_w in enumerate(limits_w):
            self.bank.set_limit(i, limit_w, self.now)

    def limits_w(self) -> list[float]:
        return [self.bank.reading(i, self.now).enforced_limit_w for i in range(3)]

    def uuids(self) -> list[str]:
        return [self.bank.uuid(i) for i in range(3)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.bank.close()


def test_only_boards_that_stand_where_the_dead_agent_left_them_are_put_back(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = node.uuids()
    write_record(node.record, {a: (400.0, [300.0, 200.0]), b: (400.0, [200.0]), c: (350.0, [300.0, 200.0])})
    node.stand_at(300.0, 250.0, 200.0)  # killed before the driver was asked; another hand; killed after

    assert node.mend() == 2

    assert node.limits_w() == [400.0, 250.0, 350.0]
    told = capsys.readouterr().err
    assert "board 1: somebody else set 250 W after the agent was killed; left so" in told
    assert "putting 2 boards back" in told
    assert not node.record.exists()


def test_a_killed_agent_that_had_written_nothing_leaves_nothing_to_mend(node: Node) -> None:
    write_record(node.record, {u: (400.0, []) for u in node.uuids()})
    node.stand_at(250.0)  # somebody else

    assert node.mend() == 0

    assert node.limits_w()[0] == 250.0
    assert not node.record.exists()


def test_what_an_agent_writes_is_known_at_the_moment_it_writes_it(node: Node) -> None:
    with node.open() as nvml:
        add_found(node.record, nvml.boards)
        board = nvml.boards[0]
        board.announce_to(lambda write: note_writes(node.record, [write]))
        board.apply(OperatingPoint(power_limit_w=300.0))
        board.apply(OperatingPoint(power_limit_w=200.0, sm_clock_mhz=1005))

    told = read_found(node.record)
    assert told is not None
    assert (told.pid, told.alive) == (os.getpid(), True)
    assert told.boards[board.info.uuid] == BoardWrite(
        uuid=board.info.uuid, found_limit_w=400.0, written_w=(300.0, 200.0), clock_locked=True
    )
    assert told.boards[node.uuids()[1]].written_w == ()
    forget_found(node.record, node.uuids()[:2])
    assert set(read_found(node.record).boards) == {node.uuids()[2]}  # type: ignore[union-attr]
    forget_found(node.record, node.uuids())
    assert not node.record.exists()


def test_a_lost_board_keeps_none_of_the_others_limited_and_stays_in_the_record(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(node.record, {u: (400.0, [200.0]) for u in node.uuids()})
    node.stand_at(200.0, 200.0, 200.0)
    node.bank.inject(1, "lost", 1, node.now)

    assert node.mend() == 2

    assert node.limits_w() == [400.0, 200.0, 400.0]
    assert "1 boards that a killed agent left limited cannot be reached" in capsys.readouterr().err
    with node.open() as nvml:
        add_found(node.record, nvml.boards)  # the next agent keeps what it cannot mend
    assert set(left_by_dead_agent(node.record)) == {node.uuids()[1]}
    node.bank.inject(1, "lost", 0, node.now)
    assert node.mend() == 1
    assert node.limits_w() == [400.0] * 3


DAMAGED: list[Any] = [
    {},
    [],
    None,
    "text",
    {"pid": DEAD_PID, "limits_w": {"GPU-0": 400.0}, "clocks_locked": False},  # the format of before
    {"format": "pals-limits-found/2", "pid": "x", "started": 1, "boards": {}},
    {"format": "pals-limits-found/2", "pid": True, "started": 1, "boards": {}},
    {"format": "pals-limits-found/2", "pid": 1, "started": -4, "boards": {}},
    {"format": "pals-limits-found/2", "pid": 1, "started": 1, "boards": []},
    *(
        {"format": "pals-limits-found/2", "pid": DEAD_PID, "started": 1, "boards": {"GPU-0": b}}
        for b in (
            {},
            {"found_w": "400", "written_w": [], "clock_locked": False},
            {"found_w": -1.0, "written_w": [], "clock_locked": False},
            {"found_w": 400.0, "written_w": [True], "clock_locked": False},
            {"found_w": 400.0, "written_w": 200.0, "clock_locked": False},
            {"found_w": 400.0, "written_w": [], "clock_locked": 1},
            {"found_w": float("nan"), "written_w": [], "clock_locked": False},
        )
    ),
]


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_record_names_the_file_and_the_remedy(tmp_path: Path, data: Any) -> None:
    record = tmp_path / "limits-found.json"
    record.write_text(json.dumps(data))

    with pytest.raises(ConfigError, match=r"limits-found.json is damaged.*nvidia-smi.*remove the file"):
        left_by_dead_agent(record)


@given(st.text(max_size=40))
def test_whatever_text_is_in_the_record_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    record = tmp_path_factory.mktemp("found") / "limits-found.json"
    record.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError, match="is damaged"):
        read_found(record)


@pytest.mark.parametrize("board", [(4000.0, [200.0]), (400.0, [200.0, 5.0])])
def test_a_record_with_limits_a_board_cannot_have_is_refused_before_anything_is_written(
    node: Node, board: tuple[float, list[float]]
) -> None:
    a, b, _ = node.uuids()
    write_record(node.record, {a: (400.0, [200.0]), b: board})
    node.stand_at(200.0, 200.0)

    with pytest.raises(ConfigError, match=r"is damaged: .* W lies outside board 1's 100\.\.400 W; nothing was written"):
        node.mend()

    assert node.limits_w() == [200.0, 200.0, 400.0]
    assert node.record.exists()


def test_a_process_is_known_by_its_start_and_not_by_its_id_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = process_started(child.pid)
        assert started is not None
        assert started >= (process_started(os.getpid()) or 0)
        assert same_process(child.pid, started)
        assert not same_process(child.pid, started - 1)
        child.kill()
    assert process_started(child.pid) is None
    assert not same_process(child.pid, started)
    (tmp_path / "7").mkdir()
    fields = ["S", *map(str, range(4, 22)), "4711", "0"]
    (tmp_path / "7" / "stat").write_text(f"7 (a) name (Z)) {' '.join(fields)}")
    assert process_started(7, proc=tmp_path) == 4711
    (tmp_path / "7" / "stat").write_text(f"7 (a) {' '.join(['Z', *fields[1:]])}")
    assert process_started(7, proc=tmp_path) is None


def test_an_adviser_says_that_a_killed_agent_left_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "limits-found.json"
    warn_of_left_limits(tmp_path)
    write_record(record, {"GPU-0": (400.0, [])})
    warn_of_left_limits(tmp_path)
    write_record(record, {"GPU-0": (400.0, [200.0])}, pid=1, started=process_started(1) or 0)
    warn_of_left_limits(tmp_path)
    assert capsys.readouterr().err == ""

    write_record(record, {"GPU-0": (400.0, [200.0])})
    warn_of_left_limits(tmp_path)
    assert "killed and left 1 boards limited" in (told := capsys.readouterr().err)
    assert "pals restore" in told
    record.write_text("{}")
    warn_of_left_limits(tmp_path)
    assert "is damaged" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / f".limits-found.json.{os.getpid()}.new").mkdir()

    with pytest.raises(PalsError, match="no board was written"):
        add_found(tmp_path / "limits-found.json", [Board(Clock())])
    (tmp_path / "limits-found.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_found(tmp_path / "limits-found.json")


@given(st.lists(st.tuples(st.sampled_from(["ask", "refused", "other"]), st.integers(100, 400)), max_size=20))
def test_whoever_writes_when_the_limit_never_rises_above_the_last_other_hand(steps: list[tuple[str, int]]) -> None:
    owner, stands_w, left_w, ceiling_w, back_w = LimitOwner("GPU-0", 400.0), 400.0, 400.0, 400.0, 400.0

    def look() -> None:
        """Whoever brought the limit back to where it was left between two looks was not there."""
        nonlocal ceiling_w, back_w
        if abs(stands_w - left_w) >= 1.0:
            ceiling_w = back_w = stands_w
        owner.seen(stands_w)

    for what, watts in steps:
        if what == "other":
            stands_w = float(watts)
            continue
        look()
        limit_w = owner.capped(float(watts))
        assert limit_w <= max(ceiling_w, stands_w)
        owner.about_to_write(limit_w)
        assert owner.is_mine(stands_w)
        assert owner.is_mine(limit_w)
        if what == "ask":
            stands_w = limit_w
            owner.wrote(limit_w)
        assert not owner.seen(stands_w)
        left_w = stands_w
    look()
    assert abs(owner.restore_w - back_w) < 1.0


def pals(node: Node, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pals.cli", *args], env={**os.environ, "PALS_RUN_DIR": str(node.folder)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_boards_not_put_back_are_exit_code_4_and_restore_mends_them_later(node: Node) -> None:
    EngineChannel(
        node.folder, replace(engine_info(os.getpid()), boards=(0, 1), bank=str(node.bank.path)), name="engine"
    )
    command = [sys.executable, "-m", "pals.cli", "agent", "--metrics-port", "0", "--power-limit-w", "200"]
    with subprocess.Popen(
        command, env={**os.environ, "PALS_RUN_DIR": str(node.folder)}, stderr=subprocess.PIPE, text=True
    ) as agent:
        end_s = time.monotonic() + 30.0
        while node.limits_w() != [200.0, 200.0, 400.0] and time.monotonic() < end_s:
            time.sleep(0.02)
        node.bank.inject(0, "limit_denied", 1, node.now)
        node.bank.inject(2, "lost", 1, node.now)  # of no engine
        agent.send_signal(signal.SIGINT)
        _, said = agent.communicate(timeout=30)

    assert agent.returncode == 4, said
    assert "1 of 2 boards could not be put back" in said
    assert "Traceback" not in said
    assert node.limits_w()[:2] == [200.0, 400.0]
    node.bank.inject(0, "limit_denied", 0, node.now)
    shown = pals(node, "status")
    assert (shown.returncode, "1 boards may stay limited" in " ".join(shown.stdout.split())) == (0, True), shown
    assert "board 2" in shown.stderr
    assert "lost" in shown.stderr
    mended = pals(node, "restore")
    assert (mended.returncode, node.limits_w()[:2]) == (0, [400.0, 400.0]), mended.stderr
