"""capd's socket among floods, crowds, clients that never read and clients of other users: who behaves is served, in time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pals_capd.keeper import Keeper
from pals_capd.main import WATCHDOG_S
from pals_capd.policy import Policy
from pals_capd.refused import ConfigError
from pals_capd.server import LINES_A_TURN, MOST_CLIENTS, MOST_MALFORMED, Server, listen
from tests import capd_user
from tests.capd_world import MAX_W, FakeDriver, MemoryAudit, MemoryRecord, Silicon
from tests.leasing_client import Talk

PATIENCE_S = 30.0  # of a client on a busy machine; nothing waits so long
READ = b'{"op":"read"}\n'
MALFORMED = b'{"op":"set","uuid":"GPU-0","watts":"all"}\n'


class Served:
    """A capd over boards in memory, in real time, in a thread."""

    def __init__(self, folder: Path, *, policy: Policy | None = None, boards: int = 2, gid: int | None = None) -> None:
        self.path = folder / "sock"
        self.driver = FakeDriver(boards={f"GPU-{n}": Silicon() for n in range(boards)})
        self.keeper = Keeper(driver=self.driver, record=MemoryRecord(), audit=MemoryAudit(), policy=policy or Policy())
        self.keeper.start(time.monotonic())
        self.server = Server(self.keeper, listen(self.path, gid))
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="capd")
        self._thread.start()

    def _serve(self) -> None:
        while not self._asked.is_set():
            self.server.round()

    def close(self) -> None:
        self._asked.set()
        self._thread.join()
        self.server.close()

    def talk(self) -> Talk:
        """A client that has said hello, and waits for answers."""
        return Talk(str(self.path), PATIENCE_S)

    def raw(self) -> socket.socket:
        """A connection on which nothing was said."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE_S)
        sock.connect(str(self.path))
        return sock

    def wait(self, until: Callable[[], bool]) -> None:
        """Until something is so."""
        end_s = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < end_s, "it never came to that"
            threading.Event().wait(0.005)


@contextmanager
def served(**how: Any) -> Iterator[Served]:
    """capd on a socket whose folder all users may pass."""
    folder = Path(tempfile.mkdtemp(prefix="capd-"))
    folder.chmod(0o755)
    try:
        with closing(Served(folder, **how)) as capd:
            yield capd
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def capd() -> Iterator[Served]:
    with served() as made:
        yield made


def rest_of(sock: socket.socket) -> list[dict[str, Any]]:
    """All answers until capd hangs up."""
    with sock, sock.makefile("rb") as answers:
        lines = []
        with contextlib.suppress(ConnectionResetError):  # what was sent after it hung up is lost
            for line in answers:
                lines.append(json.loads(line))
        return lines


# --- floods ---


def flood(capd: Served, enough: threading.Event) -> int:
    """Malformed lines as fast as they go, and how many; capd hangs up after each hundred."""
    sent = 0
    while not enough.is_set():
        sock = capd.raw()
        sock.sendall(MALFORMED * MOST_MALFORMED)
        assert [answer["error"] for answer in rest_of(sock)] == ["malformed"] * MOST_MALFORMED
        sent += MOST_MALFORMED
    return sent


def test_ten_thousand_malformed_lines_delay_neither_answers_nor_the_end_of_a_lease(capd: Served) -> None:
    put_back = deque[float]()
    capd.driver.on_limit = lambda uuid, w: put_back.append(time.monotonic()) if (uuid, w) == ("GPU-1", MAX_W) else None
    ttl_s, enough = 0.2, threading.Event()
    with closing(capd.talk()) as good, ThreadPoolExecutor(4) as pool:
        floods = [pool.submit(flood, capd, enough) for _ in range(4)]
        try:
            while len(put_back) < 3 or capd.keeper.counters["malformed"] < 10_000:
                leased_s, before = time.monotonic(), len(put_back)
                assert good.lease("GPU-1", 250.0, 1200, ttl_s=ttl_s)["ok"]
                while len(put_back) == before:  # and meanwhile another board's lease is renewed
                    told = good.lease("GPU-0", 200.0 + good.seq % 50, 1200)
                    assert told["ok"], told
                    assert told["seq"] == good.seq
                assert put_back[-1] - leased_s < ttl_s + WATCHDOG_S
        finally:
            enough.set()
        sent = sum(f.result() for f in floods)
    assert capd.keeper.counters["malformed"] == sent >= 10_000
    assert capd.driver.boards["GPU-0"].limit_w < MAX_W, "the good client's board is still leased"


def test_requests_that_keep_the_driver_busy_do_not_keep_the_boards_from_their_turn() -> None:
    """Twenty clients move clock locks, 30 ms each; a board's lease that ends meanwhile ends in time."""
    now = [100.0]
    driver = FakeDriver(boards={f"GPU-{n}": Silicon() for n in range(20)})

    def slow(uuid: str, clocks: object) -> None:
        now[0] += 0.03

    driver.on_lock = slow
    keeper = Keeper(driver=driver, record=MemoryRecord(), audit=MemoryAudit(), policy=Policy())
    keeper.start(now[0])
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="capd-")))
        server = exits.enter_context(closing(Server(keeper, listen(folder / "sock", None), lambda: now[0])))
        clients = []
        for n in range(20):
            sock = exits.enter_context(closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)))
            sock.connect(str(folder / "sock"))
            sock.sendall(b'{"op":"hello"}\n')
            server.round()  # it is taken on
            server.round()  # and answered
            clients.append((n, sock, exits.enter_context(closing(sock.makefile("rb")))))
        for n, sock, answers in clients:
            epoch = json.loads(answers.readline())["epoch"]
            asks = [
                {
                    "op": "set", "uuid": f"GPU-{n}", "watts": None, "sm_clock_mhz": [210, 1400 - seq], "ttl_s": 60.0,
                    "epoch": epoch, "seq": seq, "reason": "test",
                }
                for seq in range(LINES_A_TURN)
            ]  # fmt: skip
            sock.sendall(b"".join(json.dumps(ask).encode() + b"\n" for ask in asks))
        rounds = 0
        while driver.writes < 20 * LINES_A_TURN:
            before_s = now[0]
            server.round()
            assert now[0] - before_s < WATCHDOG_S / 4
            rounds += 1
            assert rounds < 1000
        for _, _, answers in clients:
            assert all(json.loads(answers.readline())["ok"] for _ in range(LINES_A_TURN))


# --- crowds ---


def test_two_hundred_clients_at_once_all_get_answers(capd: Served) -> None:
    with ExitStack() as exits:
        crowd = [exits.enter_context(capd.raw()) for _ in range(200)]
        for n, sock in enumerate(crowd):
            sock.sendall(json.dumps({"op": "read", "id": n}).encode() + b"\n")
        for n, sock in enumerate(crowd):
            with sock.makefile("rb") as answers:
                told = json.loads(answers.readline())
            assert told["ok"]
            assert told["id"] == n
        capd.wait(lambda: capd.keeper.counters["clients"] == 200)


def test_one_client_more_than_there_may_be_is_told_so_until_one_leaves(capd: Served) -> None:
    with ExitStack() as exits:
        crowd = [exits.enter_context(closing(capd.talk())) for _ in range(MOST_CLIENTS)]
        assert [told["error"] for told in rest_of(capd.raw())] == ["busy"]
        assert crowd[0].say(READ)["ok"]
        crowd[1].close()
        capd.wait(lambda: capd.keeper.counters["clients"] < MOST_CLIENTS)
        with closing(capd.talk()) as late:
            assert late.hello["ok"]


# --- clients that do not listen, or do not end what they say ---


def test_a_client_that_never_reads_is_let_go_and_holds_nobody_up(capd: Served) -> None:
    with closing(capd.talk()) as good, capd.raw() as deaf:
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                deaf.sendall(READ * 50)
                assert good.lease("GPU-0", 300.0, 1200)["ok"]
        assert good.say(READ)["counters"]["dropped"] == 1


def test_answers_that_can_be_sent_do_not_count_as_unread() -> None:
    """Sixteen answers over sixteen boards are more than may wait unread, and less than a socket holds."""
    with served(boards=16) as capd, capd.raw() as sock, sock.makefile("rb") as answers:
        sock.sendall(b"".join(json.dumps({"op": "read", "id": n}).encode() + b"\n" for n in range(20)))
        assert [json.loads(answers.readline())["id"] for _ in range(20)] == list(range(20))


def test_who_has_said_all_and_only_listens_still_gets_every_answer() -> None:
    with served(boards=8) as capd:
        sock = capd.raw()
        sock.sendall(READ * 40)
        sock.shutdown(socket.SHUT_WR)
        assert len(rest_of(sock)) == 40


def test_lines_may_come_in_pieces(capd: Served) -> None:
    with capd.raw() as sock, sock.makefile("rb") as answers:
        sock.sendall(b'{"op":"hello"}\n')
        epoch = json.loads(answers.readline())["epoch"]
        ask = {"op": "set", "uuid": "GPU-0", "watts": 250.0, "ttl_s": 60.0, "epoch": epoch, "seq": 1, "reason": "test"}
        for byte in json.dumps(ask).encode() + b"\n":
            assert capd.driver.writes == 0
            sock.sendall(bytes([byte]))
        assert json.loads(answers.readline())["outcome"] == "written"


@pytest.mark.parametrize("cut", [1, 40, -2, -1])
def test_a_client_that_leaves_midway_changes_nothing(capd: Served, cut: int) -> None:
    with closing(capd.talk()) as good:
        other = capd.talk()
        ask = {
            "op": "set", "uuid": "GPU-0", "watts": 250.0, "ttl_s": 60.0, "epoch": other.hello["epoch"], "seq": 1, "reason": "test",
        }  # fmt: skip
        other.sock.sendall((json.dumps(ask).encode() + b"\n")[:cut])
        other.close()
        capd.wait(lambda: capd.keeper.counters["clients"] == 1)
        assert good.say(READ)["boards"][0]["lease"] is None
        assert capd.driver.writes == 0


def test_a_line_without_an_end_is_the_last(capd: Served) -> None:
    sock = capd.raw()
    with contextlib.suppress(ConnectionError):
        for _ in range(1000):
            sock.sendall(b"x" * 1000)
    assert rest_of(sock) == []
    with closing(capd.talk()) as good:
        assert good.say(READ)["counters"]["dropped"] == 1


# --- other users ---

READER, SETTER, OTHER, ADMIN, NOBODY, GROUP = 64001, 64002, 64003, 64004, 64005, 64000
RIGHTS = Policy(rights={READER: "read", SETTER: "set", OTHER: "set", ADMIN: "admin", NOBODY: "none"})
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start processes of other users")


class User:
    """A process of some user, connected to capd."""

    def __init__(self, capd: Served, uid: int, gid: int = GROUP) -> None:
        command = [sys.executable, "-S", capd_user.__file__, str(capd.path), str(uid), str(gid)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._says, self._hears = self._process.stdin, self._process.stdout
        self.connected = self._hears.readline() == b"connected\n"
        self.epoch, self.seq = -1, 0

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one reply; empty where capd hung up."""
        self._says.write(json.dumps(request).encode() + b"\n")
        self._says.flush()
        reply: dict[str, Any] = json.loads(self._hears.readline().strip() or b"{}")
        self.epoch = reply.get("epoch", self.epoch)
        return reply

    def lease(self, uuid: str, watts: float, **otherwise: Any) -> dict[str, Any]:
        """Ask for a board for a minute."""
        self.seq += 1
        request = {
            "op": "set", "uuid": uuid, "watts": watts, "ttl_s": 60.0, "epoch": self.epoch, "seq": self.seq, "reason": "test",
        }  # fmt: skip
        return self.ask(**{**request, **otherwise})

    def release(self, uuid: str) -> dict[str, Any]:
        """Ask for it to be put back."""
        self.seq += 1
        return self.ask(op="release", uuid=uuid, epoch=self.epoch, seq=self.seq)

    def close(self) -> None:
        """It ends."""
        self._says.close()
        self._hears.close()
        self._process.wait()


@contextmanager
def users(*uids: int) -> Iterator[tuple[Served, list[User]]]:
    """capd for a group, and one process of each user."""
    with ExitStack() as exits:
        capd = exits.enter_context(served(policy=RIGHTS, gid=GROUP))
        yield capd, [exits.enter_context(closing(User(capd, uid))) for uid in uids]


@as_root
@pytest.mark.parametrize("uid", [NOBODY, 64999])
def test_a_user_without_rights_is_turned_away(uid: int) -> None:
    with users(uid) as (capd, [user]):
        told = user.ask(op="read")
        assert not told["ok"]
        assert told["error"] == "rights"
        assert str(uid) in told["message"]
        assert user.ask(op="read") == {}, "and the connection is closed"
        assert capd.keeper.counters["turned_away"] == 1


@as_root
def test_a_user_who_may_read_only_reads() -> None:
    with users(READER) as (capd, [user]):
        assert user.ask(op="hello")["rights"] == "read"
        assert user.ask(op="read")["ok"]
        refused = [
            user.lease("GPU-0", 250.0), user.release("GPU-0"), user.ask(op="budget", watts=500, boards=["GPU-0", "GPU-1"]),
            user.ask(op="release_all"),
        ]  # fmt: skip
        assert [r["error"] for r in refused] == ["rights"] * 4
        assert capd.driver.writes == 0


@as_root
def test_a_user_who_may_set_can_not_release_all_nor_touch_what_another_leases() -> None:
    with users(SETTER, OTHER) as (capd, [a, b]):
        assert a.ask(op="hello")["rights"] == "set"
        b.ask(op="hello")
        assert a.lease("GPU-0", 250.0)["outcome"] == "written"
        assert b.lease("GPU-1", 300.0)["outcome"] == "written"

        writes = capd.driver.writes
        assert b.lease("GPU-0", 200.0)["error"] == "leased"
        assert b.lease("GPU-0", 200.0, epoch=a.epoch)["error"] == "stale", "an epoch is worth nothing to another"
        assert b.lease("GPU-0", 200.0, epoch=(1 << 63) - 1)["error"] == "stale"
        assert b.release("GPU-0")["error"] == "leased"
        assert b.ask(op="release_all")["error"] == "rights"
        assert capd.driver.writes == writes
        assert capd.driver.boards["GPU-0"].limit_w == 250.0

        assert a.lease("GPU-0", 220.0)["ok"], "its own lease lives on, and is renewed"
        assert a.release("GPU-0")["ok"]
        assert b.lease("GPU-0", 200.0)["ok"]
        assert a.lease("GPU-0", 300.0)["error"] == "leased"


@as_root
def test_another_user_s_budget_may_be_tightened_but_not_raised_or_lifted() -> None:
    both = ["GPU-0", "GPU-1"]
    with users(SETTER, OTHER) as (capd, [a, b]):
        assert a.ask(op="budget", watts=600, boards=both)["ok"]
        for watts, boards in ((700, both), (None, both), (600, both[:1]), (500, [])):
            assert b.ask(op="budget", watts=watts, boards=boards)["error"] == "rights"
        assert sum(s.limit_w for s in capd.driver.boards.values()) <= 600.0
        assert b.ask(op="budget", watts=500, boards=both)["ok"]


@as_root
def test_an_admin_takes_over_and_releases_everybody() -> None:
    with users(SETTER, ADMIN) as (capd, [a, admin]):
        a.ask(op="hello")
        assert admin.ask(op="hello")["rights"] == "admin"
        assert a.lease("GPU-0", 250.0)["ok"]
        assert a.lease("GPU-1", 250.0)["ok"]
        assert admin.lease("GPU-0", 200.0)["ok"]
        assert a.lease("GPU-0", 300.0)["error"] == "leased"
        told = admin.ask(op="release_all")
        assert told["ok"]
        assert all(board["lease"] is None for board in told["boards"])
        assert {s.limit_w for s in capd.driver.boards.values()} == {MAX_W}


# --- the socket's file ---


@as_root
def test_the_socket_is_for_its_group_and_nobody_else() -> None:
    with served(policy=RIGHTS, gid=GROUP) as capd:
        facts = capd.path.stat()
        assert stat.S_IMODE(facts.st_mode) == 0o660
        assert (facts.st_uid, facts.st_gid) == (0, GROUP)
        with closing(User(capd, SETTER, gid=64123)) as stranger:
            assert not stranger.connected, "a right in the policy file is not enough"
        with closing(User(capd, SETTER)) as member:
            assert member.connected


def test_without_a_group_the_socket_is_for_its_owner(tmp_path: Path) -> None:
    with closing(listen(tmp_path / "sock", None)):
        assert stat.S_IMODE((tmp_path / "sock").stat().st_mode) == 0o600
        with closing(listen(tmp_path / "sock", None)):  # one that a crash left behind is replaced
            assert stat.S_IMODE((tmp_path / "sock").stat().st_mode) == 0o600


def test_another_file_in_the_socket_s_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sock").write_text("precious")
    with pytest.raises(ConfigError, match="cannot be made"):
        listen(tmp_path / "sock", None)
    assert (tmp_path / "sock").read_text() == "precious"
