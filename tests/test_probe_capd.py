"""What stands between a user and capd has a name, and looking at capd changes nothing of what others hold."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from pals.core.diagnosis_writing import Reach
from pals.hardware.capd_board import CapdBoard
from pals.hardware.capd_client import CapdClient
from pals.hardware.probe_capd import probe_capd
from pals_capd.policy import Exit, Policy
from tests.capd_loopback import Boards, Capd, capd_over, point
from tests.test_capd_client import answering

pytest.importorskip("pynvml")


@pytest.fixture
def exits() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def world(folder: Path, exits: ExitStack, policy: Policy | None = None) -> tuple[Boards, Capd]:
    boards = Boards(folder)
    exits.enter_context(boards.opened())
    return boards, exits.enter_context(capd_over(boards, policy))


def test_a_capd_that_answers_tells_all(tmp_path: Path, exits: ExitStack) -> None:
    boards, capd = world(tmp_path, exits, Policy(node=Exit(exit="safe", safe_w=300.0), ttl_s=2.0))
    uuid = boards.board(0).info.uuid
    with closing(CapdClient(capd.socket, now_s=boards.clock)) as client:
        held = CapdBoard(boards.board(0, may_write=False), client, ttl_s=3.0, reason="pals agent 7")
        held.apply(point(400.0))

        facts = probe_capd(capd.socket)

        assert (facts.reach, facts.rights, facts.ttl_s, facts.dry_run, facts.off) == (
            Reach.ANSWERS,
            "admin",
            2.0,
            False,
            False,
        )
        leased, free = facts.boards
        assert (leased.leased_by, leased.leased_w) == (f"user {os.geteuid()} (pals agent 7)", 400.0)
        assert (free.leased_by, free.exit_policy) == (None, "safe")
        assert facts.writes > 0
        assert facts.write_p99_s is not None
        assert held.apply(point(390.0)).power_limit_w == 390.0  # the one who holds it holds on
        assert capd.lease(uuid).watts == 390.0


def test_no_socket_a_file_that_nobody_listens_at_and_one_who_hangs_are_told_apart(
    tmp_path: Path, exits: ExitStack
) -> None:
    _, capd = world(tmp_path, exits)
    assert probe_capd(tmp_path / "none").reach is Reach.MISSING
    with capd.hung():
        assert probe_capd(capd.socket).reach is Reach.SILENT
    capd.crash()
    stale = probe_capd(capd.socket)
    assert (stale.reach, stale.boards) == (Reach.STALE, ())
    assert stale.error is not None


def test_a_user_without_a_right_and_something_else_at_the_socket(exits: ExitStack) -> None:
    away = exits.enter_context(answering(lambda request: {"ok": False, "error": "rights", "message": "no rights"}))
    assert probe_capd(away).reach is Reach.TURNED_AWAY
    other = exits.enter_context(answering(lambda request: {"ok": True, "something": "else"}))
    assert probe_capd(other).reach is Reach.STRANGE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every socket")
def test_a_socket_that_this_user_may_not_open(tmp_path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        (tmp_path / "s").chmod(0)

        facts = probe_capd(tmp_path / "s")

    assert (facts.reach, facts.group is not None) == (Reach.CLOSED, True)
