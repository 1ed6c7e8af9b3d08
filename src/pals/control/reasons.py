"""What a decision says of itself, in one sentence for people."""

from __future__ import annotations

from pals.control.choice import NO_TPOT, Pick
from pals.control.lever_table import FREE, Lever, Rows
from pals.control.outlook import CLOSED, FULL, Asked, Outlook
from pals.core.quantities import Slo
from pals.models.forecast import FloatArray


def told_move(
    rows: Rows,
    o: Outlook,
    here: Pick,
    to: Pick,
    a: Asked,
    slo: Slo,
    batches: FloatArray,
    before: Lever,
    reason: str,
    boards: int,
) -> str:
    """From where to where, what it saves or why it must be, and what latencies become."""
    i, j = (here.lever, here.batch), (to.lever, to.batch)
    parts = []
    if reason == "queue":
        parts.append(f"{a.waiting} requests wait, the oldest {a.oldest_s:.1f} s")
    boards_w = rows.ceiling_w * boards
    if before == FREE and rows.levers[to.lever].clock_mhz is not None and o.natural_w[i] < boards_w:
        parts.append(f"the limit of {boards_w:.0f} W does not bind at {o.natural_w[i]:.0f} W")
    parts.append(_levers(rows, o, here, to))
    if here.batch != to.batch:
        parts.append(f"batch {batches[here.batch]:.0f} → {batches[to.batch]:.0f}")
    saved = 1.0 - float(o.cost_j[j]) / float(o.cost_j[i])
    what = f"saves {saved:.0%}" if saved >= 0 else f"costs {-saved:.0%}"
    figures = _figures(o, i, j, a, slo)
    return "; ".join(p for p in parts if p) + f" {what}" + (f", {figures}" if figures else "")


def _levers(rows: Rows, o: Outlook, here: Pick, to: Pick) -> str:
    a, b = rows.levers[here.lever], rows.levers[to.lever]
    if a == b:
        return ""
    before, after = (f"{o.clock_mhz[p.lever, p.batch]:.0f}" for p in (here, to))
    how = (
        f"limit {b.limit_w:.0f} W" if b.limit_w is not None else "clock lock" if b.clock_mhz is not None else "no lock"
    )
    return f"{how}: clock {before} → {after} MHz"


def _figures(o: Outlook, i: tuple[int, int], j: tuple[int, int], a: Asked, slo: Slo) -> str:
    told = []
    tpot, ttft = slo.tpot_p95_s or slo.tpot_p99_s, slo.ttft_p95_s or slo.ttft_p99_s
    if tpot is not None:
        told.append(f"TPOT p95 {1e3 * o.tpot_s[i]:.0f} → {1e3 * o.tpot_s[j]:.0f} ms of {1e3 * tpot:.0f}")
    if ttft is not None and o.ttft_s[j] < 1e3:
        told.append(f"TTFT p95 {_ms(o.ttft_s[i])} → {_ms(o.ttft_s[j])} ms of {1e3 * ttft:.0f}")
    if a.kind in (CLOSED, FULL):
        told.append(f"{o.tokens_per_s[i]:.0f} → {o.tokens_per_s[j]:.0f} tokens/s")
    elif slo.throughput_tokens_s is not None:
        told.append(f"at most {o.most_per_s[i]:.0f} → {o.most_per_s[j]:.0f} tokens/s of {slo.throughput_tokens_s:.0f}")
    return ", ".join(told)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds < 1e3 else "endless"


def told_held(o: Outlook, at: Pick, a: Asked, slo: Slo) -> str:
    """Why nothing moves."""
    i = (at.lever, at.batch)
    figures = _figures(o, i, i, a, slo)
    return f"{o.power_w[i]:.0f} W for {o.tokens_per_s[i]:.0f} tokens/s; nothing else saves enough" + (
        f"; {figures}" if figures else ""
    )


def told_sacrifice(told: str, pick: Pick, *, only_queue: bool) -> str:
    """The same, with what cannot be kept."""
    if only_queue:
        return f"not all who wait now will be in time: {told}"
    lost = "TPOT" if pick.given_up == NO_TPOT else "TTFT or throughput"
    return f"{lost} cannot surely be kept at this load by any point that the budget and the boards allow: {told}"
