"""The agent's side of capd: leases are renewed, a capd that ends or hangs is told, and two agents do not take turns."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socketserver import StreamRequestHandler, UnixStreamServer
from typing import Any

import pytest

from pals.core.errors import DeviceLostError, NotSupportedError, PalsError, PermissionDeniedError
from pals.hardware.capd_board import CapdBoard
from pals.hardware.capd_budget import CapdBudget
from pals.hardware.capd_client import CapdClient, refused, socket_path
from pals_capd.policy import Policy
from tests.capd_loopback import Boards, Capd, capd_over, point

pytest.importorskip("pynvml")
SOON_S = 0.3  # longer than capd leaves between two raises


@dataclass
class World:
    """Two boards, their capd, and whoever speaks to it."""

    boards: Boards
    capd: Capd
    exits: ExitStack

    def client(self, timeout_s: float = 1.0) -> CapdClient:
        return self.exits.enter_context(
            closing(CapdClient(self.capd.socket, timeout_s=timeout_s, now_s=self.boards.clock))
        )

    def board(self, index: int, client: CapdClient) -> CapdBoard:
        return CapdBoard(self.boards.board(index, may_write=False), client, ttl_s=3.0, reason="a test")

    def turns(self, moved: Callable[[], bool]) -> None:
        self.capd.wait_turns(moved)


@contextmanager
def made(folder: Path, policy: Policy | None = None) -> Iterator[World]:
    boards = Boards(folder)
    with ExitStack() as exits:
        exits.enter_context(boards.opened())
        yield World(boards, exits.enter_context(capd_over(boards, policy)), exits)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with made(tmp_path) as w:
        yield w


def test_every_apply_renews_the_lease_and_without_one_the_board_goes_back(world: World) -> None:
    board = world.board(0, world.client())
    for _ in range(4):
        assert board.apply(point(300.0)).power_limit_w == 300.0
        world.boards.now += 2.0

    world.boards.now += 1.5
    world.turns(lambda: world.capd.lease(board.info.uuid) is None)
    world.turns(lambda: world.boards.limit_w(0) == 700.0)
    assert board.apply(point(300.0)).power_limit_w == 300.0


def test_who_applies_seldom_keeps_the_lease_by_reading(world: World) -> None:
    board = world.board(0, world.client())
    board.apply(point(300.0))
    for _ in range(4):
        world.boards.now += 2.0
        assert board.read().enforced_limit_w == 300.0

    board.restore()
    world.boards.now += 2.0
    assert board.read().enforced_limit_w == 700.0  # what was released is not asked for again


def test_a_raise_that_waits_is_on_its_way_and_no_error(world: World) -> None:
    board = world.board(0, world.client())
    board.apply(point(300.0))

    assert board.apply(point(400.0)).power_limit_w == 300.0
    assert board.follows_w == 400.0
    world.boards.now += SOON_S
    world.turns(lambda: world.boards.limit_w(0) == 400.0)
    assert board.apply(point(400.0)).power_limit_w == 400.0
    assert board.follows_w is None


def test_a_capd_that_was_started_again_is_greeted_anew(world: World) -> None:
    board = world.board(0, world.client())
    board.apply(point(300.0))
    world.capd.crash()
    with pytest.raises(PalsError, match=r"capd does not answer.*exit policy by themselves"):
        board.apply(point(300.0))

    world.capd.begin()
    assert board.apply(point(250.0)).power_limit_w == 250.0
    board.restore()
    assert world.boards.limit_w(0) == 700.0


def test_a_capd_that_hangs_is_waited_for_once_and_its_late_answer_is_nobodys(world: World) -> None:
    board = world.board(0, world.client(timeout_s=0.2))
    board.apply(point(300.0))
    with world.capd.hung():
        with pytest.raises(PalsError, match=r"no answer within 0.2 s.*exit policy by themselves"):
            board.apply(point(310.0))
        with pytest.raises(PalsError, match="did not answer just now"):
            board.apply(point(320.0))

    world.boards.now += 1.1
    assert board.apply(point(290.0)).power_limit_w == 290.0


def test_the_agent_that_came_later_keeps_the_board_until_its_lease_ends(world: World) -> None:
    first, second = world.client(), world.client()
    old, new = world.board(0, first), world.board(0, second)
    old.apply(point(300.0))
    new.apply(point(350.0))
    for _ in range(3):
        with pytest.raises(PalsError, match="another agent steers this board"):
            old.apply(point(300.0))
    first.close()  # a new connection has the newest epoch of all, and takes nothing with it
    with pytest.raises(PalsError, match="another agent steers this board"):
        old.apply(point(300.0))

    world.boards.now += SOON_S
    assert new.apply(point(350.0)).power_limit_w == 350.0
    new.restore()
    assert old.apply(point(300.0)).power_limit_w == 300.0


def test_a_board_that_another_agent_took_is_left_to_it(world: World, caplog: pytest.LogCaptureFixture) -> None:
    old, new = world.board(0, world.client()), world.board(0, world.client())
    old.apply(point(300.0))
    new.apply(point(250.0))

    old.restore()
    assert world.boards.limit_w(0) == 250.0
    assert "another agent steers this board" in caplog.text


def test_an_agent_that_comes_after_a_killed_one_takes_over_at_once_and_knows_what_was_found(world: World) -> None:
    world.board(0, world.client()).apply(point(300.0))
    board = world.board(0, world.client())

    assert board.info.found_limit_w == 700.0
    assert board.apply(point(250.0)).power_limit_w == 250.0
    board.restore()
    assert world.boards.limit_w(0) == 700.0


def test_what_the_nodes_budget_leaves_is_taken_where_more_is_asked(tmp_path: Path) -> None:
    with made(tmp_path, Policy(budget_w=700.0)) as world:
        client = world.client()
        boards = [world.board(i, client) for i in range(2)]
        world.boards.now += SOON_S
        assert boards[0].apply(point(600.0)).power_limit_w == 350.0
        assert boards[1].apply(point(200.0)).power_limit_w == 200.0
        world.boards.now += SOON_S
        assert boards[0].apply(point(600.0)).power_limit_w == 500.0


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("rights", PermissionDeniedError),
        ("permission", PermissionDeniedError),
        ("lost", DeviceLostError),
        ("not_supported", NotSupportedError),
        ("board", NotSupportedError),
        ("range", ValueError),
        ("leased", PalsError),
        ("state", PalsError),
        ("a word of tomorrow", PalsError),
    ],
)
def test_a_refusal_is_the_error_it_means_and_keeps_its_words(word: str, kind: type[Exception]) -> None:
    error = refused({"ok": False, "error": word, "message": "300 W is in force"})

    assert type(error) is kind
    assert "300 W is in force" in str(error)


def test_no_capd_and_another_program_are_told_by_the_socket(tmp_path: Path) -> None:
    assert socket_path({"PALS_CAPD_SOCKET": "/x"}) == Path("/x")
    assert socket_path({}) == Path("/run/pals/capd.sock")
    with (
        closing(CapdClient(tmp_path / "nothing")) as client,
        pytest.raises(PalsError, match=f"{tmp_path}/nothing.*No such file.*systemctl restart pals-capd"),
    ):
        client.read()
    with (
        answering(lambda request: "what?") as path,
        closing(CapdClient(path)) as client,
        pytest.raises(PalsError, match="is no capd"),
    ):
        client.read()


def test_the_budget_cuts_at_once_is_told_to_a_new_capd_and_ends_last(world: World) -> None:
    client, said = world.client(), list[str]()
    boards, budget = [world.board(i, client) for i in range(2)], CapdBudget(client, said.append)
    uuids = [b.info.uuid for b in boards]
    budget.keep(1400.0, uuids)
    for board in boards:
        board.apply(point(600.0))

    budget.keep(800.0, uuids)
    assert sum(world.boards.limit_w(i) for i in range(2)) <= 800.0
    world.capd.crash()
    budget.keep(750.0, uuids)
    budget.keep(750.0, uuids)
    assert len(said) == 1
    assert "keeps to its budget itself" in said[0]
    (world.capd.socket.parent / "state.json").unlink()  # a capd that remembers nothing
    world.boards.now += SOON_S
    world.capd.begin()
    budget.keep(750.0, uuids)
    assert world.capd.budget.watts == 750.0
    for board in boards:
        board.apply(point(300.0))
        board.restore()
    assert world.capd.budget.watts == 750.0
    budget.end()
    assert world.capd.budget is None


def test_a_budget_below_the_lowest_is_said_once_and_the_one_before_holds(world: World) -> None:
    client, said = world.client(), list[str]()
    uuids = [world.board(i, client).info.uuid for i in range(2)]
    budget = CapdBudget(client, said.append)
    budget.keep(800.0, uuids)
    budget.keep(300.0, uuids)
    budget.keep(300.0, uuids)

    assert len(said) == 1
    assert "400 W" in said[0]
    assert world.capd.budget.watts == 800.0
    budget.keep(900.0, uuids)
    assert world.capd.budget.watts == 900.0


def test_without_a_budget_nothing_is_told_and_one_that_is_there_is_named(world: World) -> None:
    client, said = world.client(), list[str]()
    uuids = [world.board(i, client).info.uuid for i in range(2)]
    CapdBudget(world.client(), said.append).keep(800.0, uuids)
    mine = CapdBudget(client, said.append)
    mine.keep(None, uuids)
    mine.keep(None, uuids)
    mine.end()

    assert len(said) == 1
    assert "budget of 800 W over 2 boards that this agent did not set" in said[0]
    assert world.capd.budget.watts == 800.0


@contextmanager
def answering(answer: Callable[[dict[str, Any]], object]) -> Iterator[Path]:
    """A program that answers each line as it is told to; it is no capd."""
    path = Path(tempfile.mkdtemp(prefix="capd-")) / "sock"

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write(json.dumps(answer(json.loads(line))).encode() + b"\n")

    with UnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield path
        finally:
            server.shutdown()
            thread.join()
            shutil.rmtree(path.parent)
