"""Who may ask what of which board: refusals, each with its word, what is in force, and what to do. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from pals_capd.board import Ask, Board, standing
from pals_capd.refused import Refused


class Node(Protocol):
    """What must be known of the node."""

    @property
    def boards(self) -> Mapping[str, Board]:
        """By UUID."""
        ...

    @property
    def stopped(self) -> str | None:
        """Why no lease is granted."""
        ...


def permit(node: Node, ask: Ask, *, uid: int, admin: bool) -> Board:
    """The board, if this user may ask that of it, as it stood when last read.

    Raises:
        Refused: why not.
    """
    b = leasable(node, ask.uuid)
    fence(b, uid, ask.epoch, ask.seq, admin=admin)
    _in_range(b, ask)
    return b


def leasable(node: Node, uuid: str) -> Board:
    """The board, if anybody may lease it now."""
    b = node.boards.get(uuid)
    if b is None:
        raise Refused("board", f"there is no board {uuid!r} on this node; boards are named by UUID (see `read`)")
    if node.stopped is not None:
        raise Refused(stop_word(node.stopped), f"{node.stopped}. {standing(b)}")
    if b.refusal is not None:
        raise Refused("board", f"{b.refusal}. {standing(b)}")
    if b.lost is not None:
        raise Refused("lost", f"{b.lost}. Its limit is unknown; reset the board or restart the node")
    return b


def stop_word(stopped: str | None) -> str:
    """The word of a refusal while no lease is granted."""
    return "off" if (stopped or "").startswith("kill switch") else "state"


def fence(b: Board, uid: int, epoch: int, seq: int, *, admin: bool) -> None:
    """Refuse who is late, and whoever would take a board that another user holds."""
    if b.lease is not None and b.lease.uid != uid and not admin:
        raise Refused(
            "leased",
            f"{b.uuid} is leased by user {b.lease.uid}; {standing(b)}. Try again when that lease has ended",
        )
    if epoch < b.epoch or (epoch == b.epoch and seq <= b.seq):
        raise Refused(
            "stale",
            f"{b.uuid}: epoch {epoch}, sequence {seq} come after epoch {b.epoch}, sequence {b.seq}: another client, or a "
            f"later request, was here first. {standing(b)}; say hello again to take over",
        )


def _in_range(b: Board, ask: Ask) -> None:
    if ask.watts is not None and not b.min_w <= ask.watts <= b.found_w + 0.5:
        whose = "another hand set" if b.other_hand_w is not None else "found"
        raise Refused(
            "range",
            f"{b.uuid}: {ask.watts:.0f} W lies outside {b.min_w:.0f}..{b.found_w:.0f} W (the limit {whose} is the "
            f"highest; the board takes up to {b.max_w:.0f} W). {standing(b)}",
            ceiling_w=b.found_w,
        )
    if ask.sm_clock_mhz is None:
        return
    if b.clock_range is None:
        raise Refused("not_supported", f"{b.uuid}: this board takes no clock lock. {standing(b)}")
    low, high = b.clock_range
    if not low <= ask.sm_clock_mhz[0] <= ask.sm_clock_mhz[1] <= high:
        raise Refused("range", f"{b.uuid}: {ask.sm_clock_mhz} MHz lies outside {low}..{high} MHz. {standing(b)}")


def refuse_others_boards(named: Iterable[Board], uid: int, *, admin: bool) -> None:
    """Refuse a budget of boards that another user leases."""
    for b in named:
        if b.lease is not None and b.lease.uid != uid and not admin:
            raise Refused(
                "leased",
                f"{b.uuid} is leased by user {b.lease.uid}, whom a budget of it would cut; name other boards, or ask an admin. "
                "The budget is as it was",
            )
