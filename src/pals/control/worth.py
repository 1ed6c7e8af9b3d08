"""What watts are worth to one engine: output tokens per second over its share of a budget, and the share that its targets need."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pals.control.choice import Excess
from pals.control.guard import Guard
from pals.control.lever_table import Rows
from pals.control.outlook import Outlook

EVERY_S = 2.0  # seconds between two looks
SAME = 0.03  # a need that fell less stays as it was: watts are not handed to and fro for chance
RATE_ROOM = 0.01  # of a logarithm: a throughput target is met in every period, not only on average


class Worth(NamedTuple):
    """At one moment; shares are W of all boards, margin included."""

    at_s: float = -1e9
    points: tuple[tuple[float, float], ...] = ()  # share, tokens/s
    needed_w: float | None = None  # None: nothing that is known keeps the targets


def worth_of(before: Worth, rows: Rows, o: Outlook, e: Excess, guard: Guard, now_s: float) -> Worth:
    """From figures of every lever under the limit found, at the launch batch.

    Where targets are kept by some share, more is worth nothing: it would only be saved. Between two limits what is missed is
    taken as linear, so that the share needed does not jump from level to level.
    """
    levels = [(float(w) or rows.ceiling_w, i) for i, w in enumerate(rows.limits_w) if w > 0 or i == 0]
    levels.sort()
    shares_w = [guard.share_of([w] * guard.boards) for w, _ in levels]
    missed = [float(max(e.rate[i, 0] + RATE_ROOM, e.ttft[i, 0], e.tpot[i, 0])) for _, i in levels]
    needed_w = _kept(before.needed_w, _needed_w(shares_w, missed))
    if needed_w is not None:
        return Worth(now_s, (), needed_w)
    tokens = [float(min(o.tokens_per_s[i, 0], o.most_per_s[i, 0])) for _, i in levels]
    return Worth(now_s, tuple((round(w, 1), round(t, 1)) for w, t in zip(shares_w, tokens, strict=True)))


def _needed_w(shares_w: list[float], missed: list[float]) -> float | None:
    kept = next((k for k, m in enumerate(missed) if m <= 0.0), None)
    if kept is None or kept == 0:
        return None if kept is None else shares_w[0]
    low, high = max(missed[kept - 1], 1e-9), missed[kept]
    part = 1.0 if not np.isfinite(low) or low > 2.0 else low / (low - high)
    return shares_w[kept - 1] + part * (shares_w[kept] - shares_w[kept - 1])


def _kept(before_w: float | None, now_w: float | None) -> float | None:
    """A need that rises is told at once, one that falls only where it falls by enough."""
    if before_w is None or now_w is None or now_w > before_w:
        return now_w
    return before_w if before_w - now_w <= SAME * before_w else now_w
