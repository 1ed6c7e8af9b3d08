"""From the boards' power to the node's: a line that was fitted to 4×A100 nodes (arXiv:2605.21427), elsewhere a range."""

from __future__ import annotations

from pals.models.forecast import Estimates

SLOPE, OFFSET_W = 1.05, 345.0
FEWEST, MOST = 4, 8  # boards of a node that the line may stand for
RANGE = 0.2  # of the offset, where the line is not calibrated


def share_of_nodes(boards: int) -> float:
    """How many nodes these boards are, at least the share of one: of 4 boards where they are fewer."""
    return max(1.0, boards / MOST) if boards >= FEWEST else boards / FEWEST


def node_power_w(boards_w: Estimates, boards: int) -> Estimates:
    """Power of the share of nodes that these boards are; fewer than a node's boards carry their part of its offset.

    The interval holds the boards' own, and how much of a node's offset they may have to carry.
    """
    share = share_of_nodes(boards)
    least = share * (1.0 - RANGE) if boards >= FEWEST else boards / MOST
    most = share * (1.0 + RANGE) if boards >= FEWEST else 1.0
    return Estimates(
        SLOPE * boards_w.value + share * OFFSET_W,
        SLOPE * boards_w.low + least * OFFSET_W,
        SLOPE * boards_w.high + most * OFFSET_W,
    )
