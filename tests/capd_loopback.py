"""Two emulated H100 with a time of their own, and the real capd over them: its keeper and its socket, in a thread."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pals.core.quantities import OperatingPoint
from pals.hardware.nvml import Nvml, open_boards
from pals.hardware.nvml_board import NvmlBoard
from pals.plant.boards import BoardBank
from pals.plant.specs import board_specs
from pals_capd.audit import FileAudit
from pals_capd.driver import NvmlDriver
from pals_capd.keeper import Keeper
from pals_capd.policy import Policy
from pals_capd.record import FileRecord, boot_id
from pals_capd.server import Server, listen

H100 = board_specs()["h100-sxm5-80gb"]


class Otherwise:
    """pynvml with some functions of another board's driver."""

    def __init__(self, **functions: Any) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        import pynvml

        return self._functions.get(name, getattr(pynvml, name))


@dataclass
class Boards:
    """The boards; setters' latency passes in their time, which stands still otherwise."""

    folder: Path
    writable: bool = True
    now: float = 10.0
    nvml: Any = field(default_factory=Otherwise)

    def __post_init__(self) -> None:
        self.path = self.folder / "bank"
        self.bank = BoardBank.create(self.path, H100, 2, writable=self.writable, now_s=self.now)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    @contextmanager
    def opened(self) -> Iterator[Nvml]:
        """NVML as an agent opens it."""
        with open_boards(emulated=self.path, clock=self.clock, sleep=self.sleep, indices=()) as nvml:
            yield nvml
        self.bank.close()

    def board(self, index: int, *, may_write: bool = True) -> NvmlBoard:
        """One board, as it stands now."""
        return NvmlBoard(self.nvml, index, clock=self.clock, may_write=may_write)

    def limit_w(self, index: int) -> float:
        """The limit set now, whoever set it."""
        return float(self.nvml.nvmlDeviceGetPowerManagementLimit(self.nvml.nvmlDeviceGetHandleByIndex(index))) / 1000.0


def point(limit_w: float, clock_mhz: int | None = None) -> OperatingPoint:
    """An operating point of one board."""
    return OperatingPoint(power_limit_w=limit_w, sm_clock_mhz=clock_mhz)


class Capd:
    """A capd that serves until it is stopped, crashed (the socket goes, boards stay) or hung."""

    def __init__(self, boards: Boards, policy: Policy) -> None:
        self.socket = (
            Path(tempfile.mkdtemp(prefix="capd-")) / "sock"
        )  # a short path: a Unix socket's holds 107 characters
        self.policy, self._boards = policy, boards
        self._turn = threading.Lock()  # held by whoever hangs it
        self._asked = threading.Event()
        self.begin()

    def begin(self) -> None:
        """Start, or start again after a crash."""
        state = self.socket.parent
        self.keeper = Keeper(
            driver=NvmlDriver(self._boards.nvml),
            record=FileRecord(state / "state.json", boot_id()),
            audit=FileAudit(state / "audit.jsonl"),
            policy=self.policy,
        )
        self.keeper.start(self._boards.now)
        self._server = Server(self.keeper, listen(self.socket, None), self._boards.clock)
        self._asked.clear()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._asked.is_set():
            with self._turn:
                self._server.round()

    def crash(self) -> None:
        """It ends without a word to anybody, boards as they are."""
        self._asked.set()
        self._thread.join()
        self._server.close()

    def stop(self) -> None:
        """It ends in order."""
        self.crash()
        self.socket.unlink(missing_ok=True)
        self.keeper.stop("stopped", self._boards.now)

    @contextmanager
    def hung(self) -> Iterator[None]:
        """It answers nobody meanwhile."""
        with self._turn:
            yield

    def lease(self, uuid: str) -> Any:
        """Who leases a board now."""
        return self.keeper.ledger.boards[uuid].lease

    @property
    def budget(self) -> Any:
        """The budget a client set."""
        return self.keeper.ledger.budget

    def wait_turns(self, moved: Callable[[], bool]) -> None:
        """Let it turn until something is so; the test's time limit is the limit."""
        while not moved():
            threading.Event().wait(0.005)


@contextmanager
def capd_over(boards: Boards, policy: Policy | None = None) -> Iterator[Capd]:
    """A capd over boards whose NVML is open."""
    capd = Capd(boards, policy or Policy())
    try:
        yield capd
    finally:
        if capd._thread.is_alive():
            capd.stop()
        shutil.rmtree(capd.socket.parent)
