"""What can be known of who writes this node's boards, and of what writing them does: facts as they were read or tried."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pals.core.quantities import Checked


class Reach(StrEnum):
    """How far one gets with capd."""

    MISSING = "missing"  # no socket
    CLOSED = "closed"  # this user may not open the socket
    STALE = "stale"  # the socket's file is there, and nobody listens
    SILENT = "silent"  # somebody listens and does not answer in time
    STRANGE = "strange"  # what answers is no capd
    TURNED_AWAY = "turned away"  # capd's policy gives this user no right
    ANSWERS = "answers"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapdBoardFacts(Checked):
    """One board as capd tells it."""

    uuid: str
    exit_policy: str | None  # restore, safe or hold; None: this capd does not tell
    refusal: str | None = None  # why capd does not write it
    leased_by: str | None = None  # "user 1000 (pals agent 12)"
    leased_w: float | None = None
    lease_ends_s: float | None = None
    other_hand_w: float | None = None  # the limit another hand set
    suspected_lock: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CapdFacts(Checked):
    """capd as this user finds it; what follows `error` is known only where it answers."""

    path: str
    reach: Reach = Reach.MISSING
    error: str | None = None
    group: str | None = None  # that owns the socket
    in_group: bool = False  # the user database has this user in it, whatever this login has
    took_s: float | None = None  # to say hello
    version: str | None = None
    rights: str | None = None  # read, set or admin
    ttl_s: float | None = None
    max_ttl_s: float | None = None
    dry_run: bool = False
    off: bool = False
    alarm: str | None = None
    boards: tuple[CapdBoardFacts, ...] = ()
    budget_w: float | None = None
    others: tuple[str, ...] = ()  # "zeusd (process 12)"
    writes: int = 0
    write_p50_s: float | None = None
    write_p99_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterChoice:
    """Who would write the boards for an agent started here, and why it is that one."""

    kind: str  # capd, direct, zeusd or none
    told: str
    why: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program of this node that can set limits or clocks, or that asks the driver over and over."""

    pid: int
    name: str
    writes: bool | None  # None: only where it is told to


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockTrial(Checked):
    """A lock at one clock, held for a moment."""

    before_mhz: int
    target_mhz: int
    measured_mhz: int | None  # the nearest seen while it held; None: the lock was refused
    took_s: float | None = None  # until the clock was there; None: it never was
    capped: bool = False  # the power limit held the clock below the lock
    idle: bool = False
    after_mhz: int | None = None  # once released
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitTrial(Checked):
    """A limit a little lower, held for a moment."""

    before_w: float
    asked_w: float | None  # None: it stands at its minimum, and nothing lower can be asked for
    enforced_w: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTrial(Checked):
    """The same limit asked for again and again, s."""

    writes: int
    p50_s: float
    p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardTrial(Checked):
    """What `--try-writes` did to one board; `refused` says why it did nothing."""

    index: int
    writer: str = "none"
    refused: str | None = None
    remedy: str | None = None
    clock: ClockTrial | None = None
    limit: LimitTrial | None = None
    latency: LatencyTrial | None = None
    error: str | None = None  # it ended early
    found_w: float | None = None
    left_w: float | None = None  # read at the very end; None: it could not be read
