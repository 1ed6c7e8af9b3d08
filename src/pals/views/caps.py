"""`pals caps`: what capd holds every board at, for whom and for how long, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pwd import getpwuid
from typing import Any

from rich.table import Table

from pals.views.report import wide_console


def print_caps(told: Mapping[str, Any]) -> None:
    """Print capd's answer to `read`."""
    console = wide_console()
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
    for column in ("board", "limit/enforced/found", "SM clock", "lease", "another hand"):
        table.add_column(column, no_wrap=column != "lease", overflow="fold")
    for b in boards:
        limits = "/".join(f"{b[key]:.0f}" for key in ("limit_w", "enforced_w", "found_w"))
        other_w = b["other_hand_w"]
        table.add_row(
            b["uuid"], f"{limits} W", _clock(b), _lease(b["lease"]), "" if other_w is None else watts(other_w)
        )
    return table


def _lease(lease: Mapping[str, Any] | None) -> str:
    """ "root, 2.9 s more: pals agent 12"."""
    if lease is None:
        return "none"
    return f"{_user(lease['uid'])}, {lease['expires_s']:.1f} s more: {lease['reason']}"


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
