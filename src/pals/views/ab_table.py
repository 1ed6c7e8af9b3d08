"""A comparison of two arms for people: a table, then what is saved in words."""

from __future__ import annotations

from typing import Protocol

from rich.table import Table

from pals.control.interleaved import Interleaving


class ArmRow(Protocol):
    """What the table shows of one arm; see `pals.experiments.ab.Arm`."""

    @property
    def windows(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def j_per_token(self) -> float | None: ...
    @property
    def tokens_per_s(self) -> float | None: ...
    @property
    def power_w(self) -> float | None: ...
    @property
    def ttft_p95_s(self) -> float | None: ...
    @property
    def tpot_p95_s(self) -> float | None: ...
    @property
    def refused_requests(self) -> int: ...
    @property
    def stay_s(self) -> float | None: ...


class ShareRow(Protocol):
    """A relative difference with its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


class ComparisonRow(Protocol):
    """What is known of both arms; see `pals.experiments.ab.Comparison`."""

    @property
    def on(self) -> ArmRow: ...
    @property
    def off(self) -> ArmRow: ...
    @property
    def pairs(self) -> int: ...
    @property
    def left_out(self) -> int: ...
    @property
    def unsound(self) -> int: ...
    @property
    def level(self) -> float: ...
    @property
    def saving(self) -> ShareRow | None: ...
    @property
    def saving_node(self) -> ShareRow | None: ...
    @property
    def same_load(self) -> ShareRow | None: ...
    @property
    def throughput(self) -> ShareRow | None: ...


def ab_table(c: ComparisonRow, *, policy: str, design: Interleaving, settle_s: float) -> Table:
    """One column an arm, one row a figure."""
    title = (
        f"{policy} against {design.baseline}: {c.pairs} pairs of {design.window_s:g} s windows, "
        f"first {settle_s:.3g} s left out"
    )
    table = Table(title=title, title_justify="left")
    for column in ("", f"on: {policy}", f"off: {design.baseline}", "difference"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, on: float | None, off: float | None, form: str, scale: float = 1.0) -> None:
        shown = ["–" if v is None else f"{v * scale:{form}}" for v in (on, off)]
        table.add_row(name, *shown, "–" if on is None or not off else f"{on / off - 1:+.1%}")

    on, off = c.on, c.off
    row("GPU energy per output token, J", on.j_per_token, off.j_per_token, ".3f")
    row("mean power of the boards, W", on.power_w, off.power_w, ".0f")
    row("output tokens/s", on.tokens_per_s, off.tokens_per_s, ".0f")
    row("TTFT p95, ms", on.ttft_p95_s, off.ttft_p95_s, ".0f", 1e3)
    row("TPOT p95, ms", on.tpot_p95_s, off.tpot_p95_s, ".1f", 1e3)
    row("mean stay of a request, s", on.stay_s, off.stay_s, ".1f")
    table.add_row("requests refused", str(on.refused_requests), str(off.refused_requests), "")
    table.add_row("windows", str(on.windows), str(off.windows), "")
    table.add_row("minutes measured", f"{on.seconds / 60:.1f}", f"{off.seconds / 60:.1f}", "")
    return table


def ab_words(c: ComparisonRow, *, settle_s: float) -> list[str]:
    """What is known and what to mind, a line each."""
    level = f"{100 * c.level:g} %"
    return [
        f"saving, GPU energy per output token:  {share_text(c.saving, level)}",
        f"saving, node energy per output token: {share_text(c.saving_node, level)}",
        f"saving, GPU, load taken out:          {share_text(c.same_load, level)}; holds where requests come whether or not "
        "earlier ones were answered",
        f"output tokens/s, on against off:      {share_text(c.throughput, level)}",
        *ab_notes(c, settle_s=settle_s),
    ]


def ab_notes(c: ComparisonRow, *, settle_s: float) -> list[str]:
    """What to mind, a line each."""
    lines = []
    stay_s = max((arm.stay_s for arm in (c.on, c.off) if arm.stay_s is not None), default=0.0)
    if stay_s > settle_s:
        lines.append(
            f"careful: a request stays {stay_s:.1f} s, longer than the {settle_s:.3g} s left out of each window, so the arms do each "
            "other's work and the saving is not the true one. Leave out more (--settle-s), in longer windows"
        )
    if c.left_out:
        lines.append(f"{c.left_out} pairs with next to no output are not counted")
    if c.unsound:
        lines.append(f"{c.unsound} windows are not counted: something was unknown in them, or nothing was written")
    return lines


def share_text(share: ShareRow | None, level: str) -> str:
    """ "+8.1 % (95 % interval +5.9..+10.2 %)"."""
    if share is None:
        return "unknown, no pair yet"
    value = f"{100 * share.value:+.1f} %"
    if share.low is None or share.high is None:
        return f"{value} so far; too few pairs for a {level} interval"
    return f"{value} ({level} interval {100 * share.low:+.1f}..{100 * share.high:+.1f} %)"
