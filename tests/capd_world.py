"""Boards, a record and a log in memory for capd's tests, and a crash at any effect: what a process dies of in the middle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pals_capd.driver import DriverError, Facts, Reading
from pals_capd.ledger import Clocks
from pals_capd.record import State, UnreadableError

MIN_W, MAX_W = 100.0, 400.0


class Crash(BaseException):
    """The process is gone, as after kill -9."""


@dataclass(slots=True, kw_only=True)
class Silicon:
    """One board: what survives the process."""

    limit_w: float = MAX_W
    lock: Clocks | None = None
    natural_mhz: int = 1410
    mig: bool = False
    lost: bool = False
    denied: bool = False
    no_locks: bool = False


@dataclass(slots=True, kw_only=True)
class Fuse:
    """Blows at the n-th effect from when it was set, before or after the effect."""

    left: int | None = None

    def burn(self) -> None:
        """One effect happens."""
        if self.left is None:
            return
        self.left -= 1
        if self.left <= 0:
            self.left = None
            raise Crash


@dataclass(slots=True, kw_only=True)
class FakeDriver:
    """A driver whose boards are `Silicon`; told of each write before it is made."""

    boards: dict[str, Silicon]
    fuse: Fuse = field(default_factory=Fuse)
    on_limit: Callable[[str, float], None] = lambda uuid, watts: None
    on_lock: Callable[[str, Clocks | None], None] = lambda uuid, clocks: None
    reloaded: bool = False
    writes: int = 0

    def open(self) -> dict[str, Facts | str]:
        """All boards, lost ones as unusable."""
        self.reloaded = False
        return self.enumerate()

    def enumerate(self) -> dict[str, Facts | str]:
        """All boards, lost ones as unusable."""
        return {u: "lost" if s.lost else self._facts(u, s) for u, s in self.boards.items()}

    def _facts(self, uuid: str, s: Silicon) -> Facts:
        return Facts(
            uuid=uuid, name="A100", min_w=MIN_W, max_w=MAX_W, default_w=MAX_W,
            clock_range=None if s.no_locks else (210, 1410), mig=s.mig,
        )  # fmt: skip

    def read(self, uuid: str) -> Reading:
        """As it stands."""
        s = self._board(uuid)
        clock = s.natural_mhz if s.lock is None else min(s.natural_mhz, s.lock[1])
        return Reading(limit_w=s.limit_w, enforced_w=s.limit_w, sm_clock_mhz=clock)

    def set_limit(self, uuid: str, watts: float) -> None:
        """Obey, or refuse as the board is made to."""
        s = self._writable(uuid)
        self.on_limit(uuid, watts)
        self.fuse.burn()
        s.limit_w = watts
        self.fuse.burn()

    def lock(self, uuid: str, clocks: Clocks) -> None:
        """Obey, or refuse as the board is made to."""
        s = self._writable(uuid)
        if s.no_locks:
            raise DriverError("not_supported", f"{uuid}: no locks")
        self.on_lock(uuid, clocks)
        self.fuse.burn()
        s.lock = clocks
        self.fuse.burn()

    def unlock(self, uuid: str) -> None:
        """Obey, or refuse as the board is made to."""
        s = self._writable(uuid)
        self.on_lock(uuid, None)
        self.fuse.burn()
        s.lock = None

    def _board(self, uuid: str) -> Silicon:
        if self.reloaded:
            raise DriverError("reloaded", "NVML was shut down")
        s = self.boards[uuid]
        if s.lost:
            raise DriverError("lost", f"{uuid}: the board is lost")
        return s

    def _writable(self, uuid: str) -> Silicon:
        s = self._board(uuid)
        if s.denied:
            raise DriverError("permission", f"{uuid}: no permission")
        self.writes += 1
        return s


@dataclass(slots=True, kw_only=True)
class MemoryRecord:
    """A record that outlives a crash; of a full disk, or damaged, where a test says so."""

    fuse: Fuse = field(default_factory=Fuse)
    state: State = field(default_factory=State)
    full: bool = False
    damaged: bool = False

    def load(self) -> State:
        """What was saved last."""
        if self.damaged:
            raise UnreadableError("the state file cannot be understood")
        return self.state

    def save(self, state: State, *, sure: bool) -> None:
        """Keep it, atomically."""
        if self.full:
            raise OSError(28, "No space left on device")
        self.fuse.burn()
        self.state = state
        self.fuse.burn()


@dataclass(slots=True, kw_only=True)
class MemoryAudit:
    """Lines kept in memory."""

    lines: list[Mapping[str, object]] = field(default_factory=list)
    full: bool = False

    def write(self, event: str, **facts: object) -> bool:
        """Append one line."""
        if not self.full:
            self.lines.append({"seq": len(self.lines) + 1, "event": event, **facts})
        return not self.full
