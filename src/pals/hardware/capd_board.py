"""A board that capd writes for us: read here without privilege, held by a lease that every `apply` renews.

A reader who applies seldom (a sweep) keeps its lease by reading: a third of its time after the last renewal, `read` asks anew.
Where the agent ends, however it ends, the lease runs out and capd puts the board to its exit policy: the dead-man.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from pals.core.errors import ConfigError, NotSupportedError, PalsError
from pals.core.quantities import SAME_LIMIT_W, BoardInfo, BoardWrite, OperatingPoint, PowerSample
from pals.hardware.capd_client import CapdClient, Reply, refused
from pals.hardware.nvml_board import NvmlBoard

log = logging.getLogger("pals")
LATER = ("deferred", "coalesced")  # capd brings the board there by itself
SHORTEST_TTL_S = 3.0


class CapdBoard:
    """One board: a `PowerMeter` of its own, a `PowerActuator` through capd."""

    def __init__(self, board: NvmlBoard, client: CapdClient, *, ttl_s: float, reason: str) -> None:
        """Take a board over; nothing is written.

        Raises:
            ConfigError: capd does not know it.
            PalsError: capd does not answer.
        """
        self._board, self._client, self._ttl_s, self._reason = board, client, ttl_s, reason
        uuid = board.info.uuid
        told = client.board(uuid)
        if told is None:
            raise ConfigError(
                f"capd at {client.path} does not know board {board.info.index} ({uuid}). Nothing was written: restart capd, or "
                "steer without it (--writer direct)"
            )
        self._found_w = self._ceiling_w = float(told["found_w"])
        self._info = replace(board.info, found_limit_w=self._found_w)  # the driver tells what an earlier lease left
        self._refusal = board.refusal or told["refusal"]
        self._epoch: int | None = None  # with which we asked last; None: we hold nothing
        self._follows_w: float | None = None
        self._held: tuple[float, int | None] | None = None  # limit and clock leased, renewed at `_renewed_s`
        self._renewed_s = 0.0

    @property
    def info(self) -> BoardInfo:
        """What the board is and accepts; the found limit is the one that capd puts back."""
        return self._info

    @property
    def refusal(self) -> str | None:
        """Why this board must not be written: MIG, or capd's policy."""
        return self._refusal

    @property
    def other_hand_w(self) -> float | None:
        """The limit that another hand set since, as capd tells it; None: nobody did."""
        return None if abs(self._ceiling_w - self._found_w) < SAME_LIMIT_W else self._ceiling_w

    @property
    def follows_w(self) -> float | None:
        """The limit that capd will raise the board to by itself, within about a second; None: it is there."""
        return self._follows_w

    def announce_to(self, write_ahead: Callable[[BoardWrite], None]) -> None:
        """Nothing is announced: capd keeps its own record of what to undo."""

    def read(self) -> PowerSample:
        """Return a fresh reading, as `NvmlBoard`; a lease that nobody has renewed for a while is."""
        if self._held is not None and self._client.now_s() - self._renewed_s > self._ttl_s / 3:
            try:
                self._set(*self._held)
            except PalsError as e:  # the reading is worth having all the same; the next `apply` tells who wants to know
                log.warning("%s", e)
        return self._board.read()

    def apply(self, wanted: OperatingPoint) -> OperatingPoint:
        """Lease the board at `wanted`, or at what another hand or capd's budget leaves of it; return what is in force.

        The clock returned is the one leased: while it waits to be raised, the lock in force is a lower one.

        Raises:
            ValueError: outside the board's range; nothing was changed.
            PermissionDeniedError, NotSupportedError, DeviceLostError: as capd says.
            PalsError: capd does not answer, or another agent steers this board.
        """
        self._check(wanted)
        self._held = None
        limit_w, clock_mhz = min(wanted.power_limit_w, self._ceiling_w), wanted.sm_clock_mhz
        reply = self._set(limit_w, clock_mhz)
        if (lower_w := self._most_w(reply, limit_w)) is not None:
            limit_w = lower_w
            reply = self._set(limit_w, clock_mhz)
        if reply.get("error") == "not_supported" and clock_mhz is not None:
            self._set(limit_w, None)  # the limit is in force where only the lock was refused
        if not reply["ok"]:
            raise refused(reply)
        self._follows_w = limit_w if reply["outcome"] in LATER else None
        self._held = (limit_w, clock_mhz)
        return OperatingPoint(power_limit_w=float(reply["watts"]["enforced"]), sm_clock_mhz=clock_mhz)

    def pin_clock(self, mhz: int) -> None:
        """Lease the SM clock at this one, and leave the limit; nobody renews it, so it ends by itself. Raises as `apply`."""
        self._check(OperatingPoint(power_limit_w=self._found_w, sm_clock_mhz=mhz))
        self._held = None
        reply = self._lease(None, [mhz, mhz])
        if not reply["ok"]:
            raise refused(reply)

    def write_again(self) -> None:
        """Ask once more for what is leased: nothing changes, but how long it takes can be seen. Raises as `apply`."""
        if self._held is not None and not (reply := self._set(*self._held))["ok"]:
            raise refused(reply)

    def restore(self) -> None:
        """End the lease: the board goes to capd's exit policy at once. One that another agent steers now is left to it.

        Raises:
            PalsError, ValueError: capd does not answer, or could not; the message says what is in force.
        """
        self._follows_w = self._held = None
        if self._epoch is None:
            return
        try:
            reply = self._ask_leased("release")
        except _TakenError as e:
            log.warning("%s; left so", e)
            self._epoch = None
            return
        if not reply["ok"] and reply["error"] != "off":  # under the kill switch it is at its exit policy already
            raise refused(reply)
        self._epoch = None

    def _check(self, wanted: OperatingPoint) -> None:
        """Refuse what must not be asked, before anything is."""
        info, clock_mhz, low_mhz = self._info, wanted.sm_clock_mhz, self._info.lockable_clocks_mhz[0]
        if self._refusal is not None:
            raise NotSupportedError(f"{self._refusal}. Nothing was asked of capd")
        if not info.min_limit_w <= wanted.power_limit_w <= info.max_limit_w:
            raise ValueError(
                f"board {info.index}: {wanted.power_limit_w:.0f} W lies outside {info.min_limit_w:.0f}..{info.max_limit_w:.0f} W; "
                "nothing was asked of capd"
            )
        if clock_mhz is not None and not low_mhz <= clock_mhz <= info.max_sm_clock_mhz:
            raise ValueError(
                f"board {info.index}: an SM clock of {clock_mhz} MHz lies outside {low_mhz}..{info.max_sm_clock_mhz} MHz; "
                "nothing was asked of capd"
            )

    def _set(self, limit_w: float, clock_mhz: int | None) -> Reply:
        low_mhz = self._info.lockable_clocks_mhz[0]
        return self._lease(limit_w, None if clock_mhz is None else [low_mhz, clock_mhz])

    def _lease(self, limit_w: float | None, clocks_mhz: list[int] | None) -> Reply:
        self._renewed_s = self._client.now_s()
        reply = self._ask_leased("set", watts=limit_w, sm_clock_mhz=clocks_mhz, ttl_s=self._ttl_s, reason=self._reason)
        if (ceiling_w := reply.get("ceiling_w")) is not None:
            self._ceiling_w = float(ceiling_w)
        return reply

    def _most_w(self, reply: Reply, asked_w: float) -> float | None:
        """The limit that may be asked for where `asked_w` was too much: another hand came, or capd's budget is full."""
        most_w = {"range": reply.get("ceiling_w"), "budget": reply.get("headroom_w")}.get(str(reply.get("error")))
        if reply["ok"] or most_w is None:
            return None
        lower_w = float(most_w) if reply["error"] == "range" else float(math.floor(most_w))
        return lower_w if self._info.min_limit_w <= lower_w < asked_w else None

    def _ask_leased(self, op: str, **fields: object) -> Reply:
        """Ask with our epoch; where that is none any more (capd or the connection began anew), with a new one, once."""
        for _ in range(2):
            epoch = self._client.hello.epoch
            if self._epoch not in (None, epoch):
                self._refuse_taken()
            reply = self._client.ask_leased(op, uuid=self._info.uuid, **fields)
            if reply is None:
                continue
            if reply.get("error") != "stale":
                self._epoch = epoch
                return reply
            self._refuse_taken()
            self._client.say_hello()
        if reply is None:
            raise PalsError(
                f"capd at {self._client.path} closes every connection; what it held for us runs out by itself"
            )
        raise self._taken()

    def _refuse_taken(self) -> None:
        """Raise where another client of this user holds the board now: two agents taking turns would fight."""
        now = self._client.board(self._info.uuid)
        lease = now and now["lease"]
        if lease and lease["epoch"] != self._epoch:
            raise self._taken()

    def _taken(self) -> _TakenError:
        return _TakenError(
            f"board {self._info.index}: another agent steers this board through capd now (it said hello later); nothing was "
            "changed. Stop one of the two; this one goes on when the other's lease has ended"
        )


class _TakenError(PalsError):
    """Another client of the same user took the board over."""
