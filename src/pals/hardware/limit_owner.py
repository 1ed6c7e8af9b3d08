"""Whose power limit a board stands at: ours, or one that another hand (nvidia-smi, a BMC, another agent) set meanwhile.

The driver does not say who wrote a limit. What stands there is ours if it is what we wrote last, or were about to write
when the call failed; before our first write, what was found. Anything else was set by another hand.
"""

from __future__ import annotations

from pals.core.quantities import SAME_LIMIT_W, BoardWrite


class LimitOwner:
    """What one board's limit was, is and goes back to, W."""

    def __init__(self, uuid: str, found_w: float) -> None:
        self.restore_w = found_w
        self.other_hand_w: float | None = None
        self.written = False
        self._uuid = uuid
        self._mine_w: tuple[float, ...] = (found_w,)

    def is_mine(self, limit_w: float) -> bool:
        """Whether a board that stands at `limit_w` was left there by us, or as found."""
        return any(abs(limit_w - w) < SAME_LIMIT_W for w in self._mine_w)

    def seen(self, limit_w: float) -> bool:
        """Take note of the limit set now; True where another hand set it: from then on it is the ceiling, and put back."""
        mine = self.is_mine(limit_w)
        if not mine:
            self.other_hand_w = self.restore_w = limit_w
            self.written = False
        self._mine_w = (limit_w,)
        return not mine

    def capped(self, wanted_w: float) -> float:
        """`wanted_w`, or what another hand set where that is lower."""
        return wanted_w if self.other_hand_w is None else min(wanted_w, self.other_hand_w)

    def about_to_write(self, limit_w: float) -> None:
        """Until the driver has answered, the board may stand at either limit."""
        self._mine_w, self.written = (*self._mine_w, limit_w), True

    def wrote(self, limit_w: float) -> None:
        """The driver accepted `limit_w`."""
        self._mine_w = (limit_w,)

    def was_put_back(self, limit_w: float) -> None:
        """Nothing of ours is in force."""
        self._mine_w, self.written = (limit_w,), False

    def told(self, *, clock_locked: bool) -> BoardWrite:
        """For the record, ahead of a write."""
        return BoardWrite(
            uuid=self._uuid,
            found_limit_w=self.restore_w,
            written_w=self._mine_w if self.written else (),
            clock_locked=clock_locked,
        )
