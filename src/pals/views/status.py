"""`pals status`: engines, boards and the agent's newest decision, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pals.core.quantities import BoardInfo, EngineInfo, EngineSample, PowerSample


def print_status(
    folder: Path,
    engines: Sequence[tuple[EngineInfo, EngineSample]],
    boards: Sequence[tuple[BoardInfo, PowerSample]],
    agent: dict[str, Any] | None,
    *,
    emulated: bool,
) -> None:
    """Print what runs in this run directory."""
    console = Console(highlight=False)
    if engines:
        console.print(_engines(engines))
    else:
        console.print(f"no engine with PALS runs in {folder}")
    if boards:
        console.print(_boards(boards, emulated=emulated))
    if agent is None:
        console.print("no agent: engines obey their launch limits, boards keep theirs")
        return
    record, header = agent["record"], agent["header"]
    point = record["guarded"]["point"]
    budget_w = record["budget"]["power_w"]
    power_w = record["sample"]["power_w"]
    console.print(
        f"agent: policy {header['policy']}, mode {record['mode']}, tick {record['index']}\n"
        f"  asked: {point['power_limit_w']:.0f} W per board, {clock_text(record)}, "
        f"{point['active_sequences'] or 'launch'} active sequences, reached by {header.get('lowering', 'drain')}\n"
        f"  why: {record['guarded']['reason']} ({record['guarded']['detail']})\n"
        f"  power: {'unknown' if power_w is None else f'{power_w:.0f} W'}"
        f"{'' if budget_w is None else f' of a budget of {budget_w:.0f} W'}"
    )


def clock_text(record: dict[str, Any]) -> str:
    """The SM clock as requested, accepted by the driver and measured, in a few words."""
    asked = record["guarded"]["point"]["sm_clock_mhz"]
    if asked is None:
        return "no clock lock"
    accepted = [str(mhz or "none") for mhz in record.get("accepted_clocks_mhz", ())]
    measured = [str(b["sm_clock_mhz"]) for b in record["sample"]["boards"]]
    return f"SM clock ≤ {asked} MHz (accepted {'/'.join(accepted)}, measured {'/'.join(measured)})"


def _engines(engines: Sequence[tuple[EngineInfo, EngineSample]]) -> Table:
    table = Table(title="Engines", title_justify="left")
    for column in (
        "process",
        "model",
        "engine",
        "parallelism",
        "running",
        "waiting",
        "active limit (lowering)",
        "KV cache",
    ):
        table.add_column(column)
    for info, now in engines:
        turns = f" ({now.scheduled} in turn)" if now.scheduled is not None and now.lowering == "time-slice" else ""
        table.add_row(
            str(info.pid), info.model, f"{info.engine} {info.version}", info.parallelism, f"{now.running}{turns}",
            str(now.waiting), f"{now.active_limit} of {now.launch_limit} ({now.lowering})", f"{now.kv_usage:.0%}",
        )  # fmt: skip
    return table


def _boards(boards: Sequence[tuple[BoardInfo, PowerSample]], *, emulated: bool) -> Table:
    table = Table(title="Boards (emulated)" if emulated else "Boards", title_justify="left")
    for column in ("board", "name", "power", "limit in force", "range", "SM clock", "limited by power"):
        table.add_column(column)
    for info, now in boards:
        table.add_row(
            str(info.index), info.name, f"{now.power_w:.0f} W", f"{now.enforced_limit_w:.0f} W",
            f"{info.min_limit_w:.0f}..{info.max_limit_w:.0f} W", f"{now.sm_clock_mhz} MHz",
            "yes" if now.throttled_by_power else "no",
        )  # fmt: skip
    return table
