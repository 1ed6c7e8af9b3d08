"""Findings for a terminal of any width, and as JSON for tools."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pals.core.diagnosis import Finding, Status
from pals.views.doctor.boards import count

FORMAT = 1
BY_BOARD = ("boards", "trial")  # areas told check by check, boards together
STYLES = {Status.OK: "green", Status.UNKNOWN: "cyan", Status.WARNING: "yellow", Status.PROBLEM: "bold red"}


def as_json(found: Sequence[Finding], *, pals: str, run_dir: str, emulated: bool) -> str:
    """The report as docs/doctor.md describes it."""
    report: dict[str, Any] = {
        "format": FORMAT,
        "pals": pals,
        "run_dir": run_dir,
        "emulated": emulated,
        "counts": {s.value: sum(f.status is s for f in found) for s in Status},
        "findings": [
            {
                "area": f.area,
                "check": f.check,
                "subject": f.subject,
                "status": f.status.value,
                "text": f.text,
                "remedy": f.remedy,
                "values": dict(f.values),
            }
            for f in found
        ],
    }
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)


def print_findings(found: Sequence[Finding], console: Console, *, emulated: bool) -> None:
    """One block per area; boards of which the same is true share a line."""
    for area, members in groupby(found, key=lambda f: f.area):
        title = (
            f"{area.capitalize()} (EMULATED)" if emulated and area in (*BY_BOARD, "permissions") else area.capitalize()
        )
        console.print(Text(title, style="bold"))
        console.print(_block(shared(list(members))))
    counts = Counter(f.status for f in found)
    told = [count(counts[s], s.value) for s in (Status.PROBLEM, Status.WARNING)]
    told += [f"{counts[s]} {s.value}" for s in (Status.UNKNOWN, Status.OK)]
    console.print(Text(", ".join(told), style="bold"))


def _block(found: Sequence[Finding]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, width=9)
    subjects = any(f.subject for f in found)
    if subjects:
        table.add_column(no_wrap=True, max_width=20)
    table.add_column(overflow="fold")
    for f in found:
        body = Text(f.text)
        if f.remedy is not None:
            body.append(f"\n→ {f.remedy}", style="italic")
        subject = (Text(f.subject),) if subjects else ()
        table.add_row(Text(f"  {f.status.value}", style=STYLES[f.status]), *subject, body)
    return table


def shared(found: Sequence[Finding]) -> list[Finding]:
    """Findings of several boards with the same text as one; boards are told check by check."""
    checks = list(dict.fromkeys(f.check for f in found))
    merged: dict[tuple[str, ...], list[Finding]] = {}
    for f in sorted(found, key=lambda f: checks.index(f.check) if f.area in BY_BOARD else 0):
        key = (f.area, f.check, f.status.value, f.text, f.remedy or "")
        merged.setdefault(key if f.area in BY_BOARD else (*key, f.subject), []).append(f)
    return [
        members[0] if len(members) == 1 else Finding(
            area=members[0].area, check=members[0].check, status=members[0].status, text=members[0].text,
            subject=f"boards {ranges([int(m.subject.split()[-1]) for m in members])}", remedy=members[0].remedy,
        )
        for members in merged.values()
    ]  # fmt: skip


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ",".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans)
