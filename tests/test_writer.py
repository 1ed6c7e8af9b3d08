"""Who writes the boards: what `auto` chooses, what it says where it cannot, and that two never write at once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pals.cli.caps import caps
from pals.cli.mending import mend, refuse_left_limits
from pals.cli.writer import Writer, may_mend, will_write, writing
from pals.core.errors import ConfigError, PalsError
from pals.hardware.capd_board import CapdBoard
from pals.hardware.capd_client import CapdClient
from pals.hardware.nvml import Nvml
from pals.hardware.nvml_board import NvmlBoard
from pals.hardware.zeusd_board import Zeusd
from pals.runtime.agent import FOUND_RECORD
from pals.runtime.config import Config, ControlConfig, load_config
from pals.runtime.found import left_by_dead_agent
from pals.views.capd_metrics import CapdCollector
from pals.views.metrics import AgentMetrics
from tests.capd_loopback import Boards, capd_over, point
from tests.fake_zeusd import zeusd_over
from tests.found_records import write_record
from tests.test_capd_client import answering

pytest.importorskip("pynvml")


@dataclass
class World:
    """Two boards that the agent has opened, and what it said."""

    boards: Boards
    nvml: Nvml
    exits: ExitStack
    said: list[str] = field(default_factory=list)

    def writer(
        self, environ: Mapping[str, str], *, emulated: bool = True, writer: str = "auto", period_s: float = 0.5
    ) -> Writer:
        return self.exits.enter_context(
            writing(
                ControlConfig(writer=writer, period_s=period_s),
                self.nvml,
                self.opened,
                bank=self.boards.path if emulated else None,
                say=self.said.append,
                environ=environ,
            )
        )

    @property
    def opened(self) -> list[NvmlBoard]:
        return [self.boards.board(i, may_write=self.nvml.may_write) for i in range(2)]

    def capd(self) -> dict[str, str]:
        return {"PALS_CAPD_SOCKET": str(self.exits.enter_context(capd_over(self.boards)).socket)}

    def told(self, **hello: Any) -> dict[str, str]:
        """A program that says hello as a capd would which ..."""
        boards = [{"uuid": b.info.uuid, "found_w": 700.0, "refusal": None} for b in self.opened]
        usual = {
            "ok": True, "epoch": 1, "rights": "set", "dry_run": False, "ttl_s": 3.0, "max_ttl_s": 60.0, "boards": boards,
        }  # fmt: skip
        path = self.exits.enter_context(answering(lambda request: {**usual, **hello}))
        return {"PALS_CAPD_SOCKET": str(path)}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    boards = Boards(tmp_path)
    with ExitStack() as exits:
        yield World(boards, exits.enter_context(boards.opened()), exits)


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[World]:
    boards = Boards(tmp_path, writable=False)
    with ExitStack() as exits:
        yield World(boards, exits.enter_context(boards.opened()), exits)


NO_CAPD = {"PALS_CAPD_SOCKET": "/nonexistent/capd.sock"}


def test_a_capd_that_knows_the_boards_and_grants_set_writes_them(world: World) -> None:
    writer = world.writer(world.capd())
    board = writer.board(world.opened[0])

    assert isinstance(board, CapdBoard)
    assert board.apply(point(300.0)).power_limit_w == 300.0
    assert "dead-man: capd, 3 s" in writer.told
    assert len(world.said) == 1
    assert writer.budget_keeper is not None


def test_a_slow_agent_asks_for_longer_leases_and_one_slower_than_capd_allows_is_told(world: World) -> None:
    assert "dead-man: capd, 12 s" in world.writer(world.capd(), period_s=2.0).told
    with pytest.raises(ConfigError, match="longest lease, 60 s, is shorter than two control periods"):
        world.writer(world.told(), writer="capd", period_s=40.0)


def test_without_capd_this_process_writes_where_it_may_and_says_once_that_there_is_no_dead_man(world: World) -> None:
    writer = world.writer(NO_CAPD)

    assert writer.may_write
    assert writer.board(world.opened[0]).apply(point(300.0)).power_limit_w == 300.0
    assert writer.budget_keeper is None
    assert len(world.said) == 1
    assert "there is no capd at /nonexistent/capd.sock" in world.said[0]


def test_without_capd_and_without_the_right_nobody_writes(unprivileged: World) -> None:
    writer = unprivileged.writer(NO_CAPD)

    assert not writer.may_write
    assert "needs root" in writer.why_not
    assert "there is no capd" in writer.why_not


def test_a_capd_of_other_boards_is_passed_by(world: World) -> None:
    writer = world.writer(world.told(boards=[]))

    assert writer.may_write
    assert not isinstance(writer.board(world.opened[0]), CapdBoard)
    assert "does not know board 0" in world.said[0]


@pytest.mark.parametrize("emulated", [True, False])
def test_where_capd_holds_the_boards_and_grants_no_set_nobody_writes_though_this_process_may(
    world: World, emulated: bool
) -> None:
    writer = world.writer(world.told(rights="read"), emulated=emulated)

    assert not writer.may_write
    assert "only read" in writer.why_not
    assert "two writers would fight" in writer.why_not


def test_a_capd_that_turns_root_away_keeps_real_boards_unwritten_and_leaves_emulated_ones_alone(world: World) -> None:
    away = {"ok": False, "error": "rights", "message": "user 0 has no rights"}

    assert not world.writer(world.told(**away), emulated=False).may_write
    assert world.writer(world.told(**away), emulated=True).may_write


def test_a_capd_that_hangs_may_wake_up_so_nobody_else_writes(world: World) -> None:
    with capd_over(world.boards) as capd, capd.hung():
        writer = world.writer({"PALS_CAPD_SOCKET": str(capd.socket)})

    assert not writer.may_write
    assert "no answer within" in writer.why_not


def test_a_writer_asked_for_by_name_is_had_or_nothing_starts(world: World) -> None:
    with pytest.raises(ConfigError, match="--writer capd: there is no capd"):
        world.writer(NO_CAPD, writer="capd")
    with pytest.raises(ConfigError, match="--writer zeusd: zeusd does not answer"):
        world.writer({"ZEUSD_SOCK_PATH": "/nonexistent/zeusd.sock"}, writer="zeusd")
    assert world.writer(NO_CAPD, writer="direct").may_write
    assert world.said == []


def test_direct_beside_a_capd_of_the_same_boards_is_warned_of(world: World) -> None:
    assert world.writer(world.capd(), writer="direct").may_write
    assert "knows these boards too" in world.said[0]


def test_zeusd_writes_where_it_is_asked_for_and_has_no_dead_man(world: World) -> None:
    path = world.exits.enter_context(zeusd_over(world.boards))
    writer = world.writer({"ZEUSD_SOCK_PATH": str(path)}, writer="zeusd")

    assert writer.board(world.opened[1]).apply(point(300.0)).power_limit_w == 300.0
    assert world.boards.limit_w(1) == 300.0
    assert "no dead-man" in writer.told
    assert "pals restore --writer zeusd" in world.said[0]


@pytest.mark.parametrize(
    ("discover", "match"),
    [
        ({"auth_required": True}, "wants a token"),
        ({"enabled_api_groups": ["gpu-read"]}, "does not offer gpu-control"),
        ({"gpus": [{"id": 0, "name": "NVIDIA A40"}]}, "count differently"),
        ({"gpus": [], "gpu_ids": [0]}, "nothing as board 1"),
    ],
)
def test_a_zeusd_that_cannot_write_these_boards_is_refused_at_the_start(
    world: World, discover: dict[str, Any], match: str
) -> None:
    path = world.exits.enter_context(zeusd_over(world.boards, **discover))
    with pytest.raises(ConfigError, match=match):
        world.writer({"ZEUSD_SOCK_PATH": str(path)}, writer="zeusd")


def config(**control: Any) -> Config:
    return load_config(None, {"control": control})


def test_an_agent_in_advise_mode_writes_nothing_and_one_with_a_capd_does(tmp_path: Path) -> None:
    there = tmp_path / "sock"
    there.touch()
    capd = {"PALS_CAPD_SOCKET": str(there)}

    assert not will_write(config(), emulated=False, environ=capd)
    assert will_write(config(mode="auto"), emulated=False, environ=capd)
    assert will_write(config(mode="auto", writer="zeusd"), emulated=False, environ=NO_CAPD)
    assert will_write(config(), emulated=True, environ=NO_CAPD)
    assert may_mend(ControlConfig(writer="zeusd"), emulated=False)


def test_the_writer_is_the_nodes_and_a_wrong_name_is_told() -> None:
    assert config(writer="capd").control.writer == "capd"
    with pytest.raises(ConfigError, match="did you mean 'direct'"):
        config(writer="dirct")


def test_an_engines_own_section_takes_no_writer(tmp_path: Path) -> None:
    path = tmp_path / "pals.toml"
    path.write_text('[engine."a"]\nwriter = "direct"\n')
    with pytest.raises(ConfigError, match="unknown key 'writer'"):
        load_config(path)


def table(environ: Mapping[str, str], *, action: str | None = None, as_json: bool = False) -> int:
    return caps(argparse.Namespace(action=action, json=as_json, all=True), environ)


def test_caps_show_and_release_what_is_held(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    environ = world.capd()
    world.writer(environ).board(world.opened[0]).apply(point(300.0, 1200))

    assert table(environ) == 0
    shown = capsys.readouterr().out
    for told in ("300/300/700 W", "1200", "3.0 s", "budget: none was set"):
        assert told in shown
    assert table(environ, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["boards"][0]["lease"]["watts"] == 300.0
    assert table(environ, action="release") == 0
    released = capsys.readouterr().out.splitlines()
    assert len(released) == 2
    assert all("700 W in force, as found" in line for line in released)
    assert world.boards.limit_w(0) == 700.0


def test_caps_without_a_capd_say_where_it_should_be_and_without_the_right_why(world: World) -> None:
    with pytest.raises(ConfigError, match=r"no capd at /nonexistent/capd.sock.*systemctl start pals-capd"):
        table(NO_CAPD)
    away = world.told(ok=False, error="rights", message="user 7 may not release_all")
    with pytest.raises(PalsError, match="user 7 may not release_all"):
        table({"PALS_CAPD_SOCKET": away["PALS_CAPD_SOCKET"]}, action="release")


def test_capds_counters_are_metrics_asked_for_every_two_seconds_and_absent_without_it(world: World) -> None:
    environ, asked, now = world.capd(), list[float](), [0.0]
    world.writer(environ).board(world.opened[0]).apply(point(300.0))
    metrics = AgentMetrics()
    assert metrics.registry.get_sample_value("pals_capd_up") is None
    with closing(CapdClient(Path(environ["PALS_CAPD_SOCKET"]))) as client:

        def read() -> Mapping[str, Any]:
            asked.append(now[0])
            if now[0] >= 5.0:
                raise PalsError("it is gone")
            return client.read()

        metrics.registry.register(CapdCollector(read, now_s=lambda: now[0]))
        value = metrics.registry.get_sample_value
        assert value("pals_capd_up") == 1.0
        assert value("pals_capd_writes_total") == 1.0
        assert value("pals_capd_leased_boards") == 1.0
        assert value("pals_capd_budget_watts") is None
        assert (value("pals_capd_write_p99_seconds") or 0) > 0
        now[0] = 2.0
        assert value("pals_capd_off") == 0.0
        assert asked == [0.0, 2.0]
        now[0] = 5.0
        assert value("pals_capd_up") == 0.0
        assert value("pals_capd_writes_total") is None


def test_what_an_agent_killed_while_zeusd_wrote_left_is_put_back_through_zeusd(unprivileged: World) -> None:
    boards, path = unprivileged.boards, unprivileged.exits.enter_context(zeusd_over(unprivileged.boards))
    folder = boards.folder / "run"
    folder.mkdir()
    uuid = boards.board(0).info.uuid
    boards.bank.set_limit(0, 300.0, boards.now)
    write_record(folder / FOUND_RECORD, {uuid: (650.0, [300.0])})

    with pytest.raises(PalsError, match="no permission"):
        mend(folder, boards.path, clock=boards.clock)
    with pytest.raises(PalsError, match="zeusd would not set 650 W"):  # this zeusd may not write either
        mend(folder, boards.path, setters=Zeusd(path), clock=boards.clock)
    assert left_by_dead_agent(folder / FOUND_RECORD)[uuid].found_limit_w == 650.0


def test_zeusd_mends_and_the_record_goes(world: World) -> None:
    boards, path = world.boards, world.exits.enter_context(zeusd_over(world.boards))
    uuid = boards.board(0).info.uuid
    boards.bank.set_limit(0, 300.0, boards.now)
    write_record(boards.folder / FOUND_RECORD, {uuid: (650.0, [300.0])})

    assert mend(boards.folder, boards.path, setters=Zeusd(path), clock=boards.clock) == 1
    assert boards.limit_w(0) == 650.0
    assert not (boards.folder / FOUND_RECORD).exists()


def test_an_agent_that_cannot_mend_does_not_start_on_what_a_killed_one_left(tmp_path: Path) -> None:
    refuse_left_limits(tmp_path)
    write_record(tmp_path / FOUND_RECORD, {"GPU-1": (650.0, [300.0])})
    with pytest.raises(ConfigError, match=r"left 1 boards limited.*sudo pals restore"):
        refuse_left_limits(tmp_path)
