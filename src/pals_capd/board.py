"""One board, who leases it, what is asked of it and what is to be written: the words that capd's parts speak."""

from __future__ import annotations

import math
from dataclasses import dataclass

SAME_W = 1.0  # limits this close are the same: a driver rounds what it is told
SMALL_RAISE_W = 5.0
RAISE_GAP_S, SMALL_RAISE_GAP_S = 0.2, 1.0  # least time since a board's last write before it is raised again
SLOWEST_REASSERT_S = 60.0
RETRY_S, SLOWEST_RETRY_S = 0.25, 30.0  # from a write that failed to the same one again, at first and at last
LOCK_MARGIN_MHZ, LOCK_SETTLE_S = 30, 1.0  # a lock takes tens of ms; two clock steps are noise
UNKNOWN_LOCK = (0, 0)  # a lock that an earlier capd may have left

Clocks = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What somebody asked of one board, and until when."""

    uid: int
    epoch: int
    watts: float | None  # granted; None: the limit is not asked for
    asked_w: float | None
    sm_clock_mhz: Clocks | None
    expires_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request to hold one board."""

    uuid: str
    watts: float | None
    sm_clock_mhz: Clocks | None
    ttl_s: float
    epoch: int
    seq: int
    reason: str


@dataclass(slots=True, kw_only=True)
class Board:
    """One board: what it is, how it stood when last read, and what of it is ours."""

    uuid: str
    name: str
    min_w: float
    max_w: float
    default_w: float
    clock_range: Clocks | None  # what a lock may name; None: this board cannot be locked
    mig: bool
    refusal: str | None  # why it must not be written
    limit_w: float
    enforced_w: float
    sm_clock_mhz: int
    read_s: float
    found_w: float  # to put back, and never exceeded: as found, or as another hand set it since
    lost: str | None = None
    ours_w: tuple[float, ...] = ()  # it was left there by us if it stands at one of these; empty: nothing of ours
    locked: Clocks | None = None  # a clock lock of ours
    locked_s: float = -math.inf
    lease: Lease | None = None
    epoch: int = -1
    seq: int = -1
    left_alone: bool = False  # another hand set its limit, and nobody asked for it since
    other_hand_w: float | None = None
    suspected: str | None = None
    written_s: float = -math.inf
    retry_s: float = -math.inf  # what was refused just now is not tried again before
    misses: int = 0  # times in a row that a write did not do what it should
    missed: Write | None = None  # the newest of them
    trouble: Exception | None = None  # why the newest write was not made
    reassert_s: float = -math.inf
    reassert_gap_s: float = 1.0

    @property
    def touched(self) -> bool:
        """Whether anything of ours may be in force."""
        return bool(self.ours_w) or self.locked is not None

    def clocks_within(self, clocks: Clocks | None) -> Clocks | None:
        """What the board takes of a range that an operator names for boards of all kinds."""
        if clocks is None or self.clock_range is None:
            return None
        low, high = self.clock_range
        return min(max(clocks[0], low), high), min(max(clocks[1], low), high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Watts that some boards may be limited to together."""

    watts: float
    uuids: frozenset[str]
    uid: int = 0  # who set it


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """One board is to be brought somewhere; None: that lever is left as it is."""

    uuid: str
    watts: float | None = None
    lock: Clocks | None = None
    unlock: bool = False
    why: str

    def does_as(self, other: Write) -> bool:
        """Whether both would leave the board alike."""
        return (self.watts, self.lock, self.unlock) == (other.watts, other.lock, other.unlock)


def standing(b: Board) -> str:
    """ "300 W is in force"."""
    return f"{b.enforced_w:.0f} W is in force"
