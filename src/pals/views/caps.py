"""`pals caps`: what capd holds every board at, for whom and for how long, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pwd import getpwuid
from typing import Any

from rich.console import Console
from rich.table import Table


def print_caps(told: Mapping[str, Any]) -> None:
    """Print capd's answer to `read`."""
    console = Console(highlight=False)
    console.print(_boards(told["boards"]))
    for line in caps_lines(told):
        console.print(line, markup=False, soft_wrap=True)


def caps_lines(told: Mapping[str, Any]) -> list[str]:
    """What concerns all boards: budgets, kill switch, alarm, other writers."""
    budget = told["budget"]
    lines = ["budget: none was set by a client"]
    if budget["watts"] is not None:
        lines = [f"budget: {budget['watts']:.0f} W over {len(budget['boards'])} boards, set by a client"]
    if told.get("node_budget_w") is not None:
        lines.append(f"budget: {told['node_budget_w']:.0f} W over all boards, always (policy file)")
    if told["off"]:
        lines.append("off: the kill switch is there; every board is at its exit policy, and nothing is leased")
    if told["alarm"] is not None:
        lines.append(f"alarm: {told['alarm']}")
    for board in told["boards"]:
        if board["suspected_lock"]:
            lines.append(f"{board['uuid']}: {board['suspected_lock']}")
        if board["refusal"]:
            lines.append(f"{board['uuid']} is not written: {board['refusal']}")
    lines += [f"also here, and made to write boards: {who}" for who in told.get("others", ())]
    return lines


def _boards(boards: list[Mapping[str, Any]]) -> Table:
    table = Table(title=f"Boards: {', '.join(sorted({b['name'] for b in boards})) or 'none'}", title_justify="left")
    table.add_column("board", overflow="fold")
    for column in ("limit", "enforced", "found", "SM clock", "leased by", "until", "for", "another hand"):
        table.add_column(column)
    for b in boards:
        lease = b["lease"]
        table.add_row(
            b["uuid"], watts(b["limit_w"]), watts(b["enforced_w"]), watts(b["found_w"]), _clock(b),
            "nobody" if lease is None else _user(lease["uid"]),
            "" if lease is None else f"{lease['expires_s']:.1f} s",
            "" if lease is None else lease["reason"],
            "" if b["other_hand_w"] is None else watts(b["other_hand_w"]),
        )  # fmt: skip
    return table


def watts(value: float) -> str:
    """ "300 W"."""
    return f"{value:.0f} W"


def _clock(board: Mapping[str, Any]) -> str:
    locked = board.get("locked_mhz") or (board["lease"] or {}).get("sm_clock_mhz")
    return f"{board['sm_clock_mhz']} MHz{f' (≤ {locked[1]})' if locked and locked[1] else ''}"


def _user(uid: int) -> str:
    try:
        return getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
