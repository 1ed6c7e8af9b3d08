"""`pals status`: engines, boards and the agent's newest decisions, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pals.core.quantities import BoardInfo, EngineInfo, EngineSample, PowerSample
from pals.runtime.agent import runs_text


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineNow:
    """An engine and its counters."""

    name: str
    info: EngineInfo
    sample: EngineSample


def print_status(
    folder: Path,
    engines: Sequence[EngineNow],
    boards: Sequence[tuple[BoardInfo, PowerSample]],
    steered: Sequence[dict[str, Any]],
    *,
    emulated: bool,
    limited: int,
    died: Mapping[int, float] = MappingProxyType({}),
) -> None:
    """Print what runs in this run directory.

    `steered` are the contents of the living agent's status files; `limited` boards were left so by a killed one;
    `died` are killed agents by process id, with the Unix time of their newest record.
    """
    console = Console(highlight=False)
    if engines:
        console.print(_engines(engines))
    else:
        console.print(f"no engine with PALS runs in {folder}")
    if boards:
        console.print(_boards(boards, engines, emulated=emulated))
    for pid, at_s in sorted(died.items()):
        since = datetime.fromtimestamp(at_s).strftime("%Y-%m-%d %H:%M:%S")
        console.print(f"agent (process {pid}): dead since {since}{'; run `pals restore`' if limited else ''}")
    if limited:
        console.print(
            f"an agent was killed: {limited} boards may stay limited until the next agent, or `pals restore`, puts them back"
        )
    if not steered:
        console.print("no agent: engines obey their launch limits, boards keep theirs")
        return
    console.print(_agent_line(steered))
    for each in steered:
        _print_decision(console, each)
    names = {s["name"] for s in steered}
    for engine in engines:
        if engine.name not in names and engine.info.name not in names:
            console.print(f"{engine.name}: not steered", markup=False)


def _agent_line(now: Sequence[dict[str, Any]]) -> str:
    shares_w = [s["record"]["budget"]["power_w"] for s in now]
    pids = ", ".join(str(p) for p in sorted({s["agent_pid"] for s in now}))
    budget = "no budget" if None in shares_w else f"budget {sum(shares_w):.0f} W"
    shared = f" shared by {len(now)} engines" if len(now) > 1 and None not in shares_w else ""
    writers = ", ".join(sorted({s["writer"] for s in now if s.get("writer")}))
    return f"agent: process {pids}, {budget}{shared}, {f'boards are written by {writers}' if writers else 'writes no board'}"


def _print_decision(console: Console, each: dict[str, Any]) -> None:
    record, header = each["record"], each["header"]
    point, share_w, power_w = record["guarded"]["point"], record["budget"]["power_w"], record["sample"]["power_w"]
    detail = record["guarded"]["detail"]
    console.print(Text(each["name"], "bold"), end="")
    console.print(
        f": policy {header['policy']}, mode {record['mode']}, tick {record['index']}{_arm_text(each)}\n"
        f"  asked: {point['power_limit_w']:.0f} W per board, {clock_text(record)}, "
        f"{point['active_sequences'] or 'launch'} active sequences, reached by {header.get('lowering', 'drain')}"
        f"{_queue_bound(record)}\n"
        f"  why: {record['guarded']['reason']}{f' ({detail})' if detail else ''}\n"
        f"  power: {'unknown' if power_w is None else f'{power_w:.0f} W'}"
        f"{'' if share_w is None else f' of {share_w:.0f} W granted'}",
        markup=False,
    )
    if learnt := record.get("correction"):
        console.print(f"  profile: {_learnt(learnt, record.get('drift', {}))}", markup=False)
    for note in record["notes"]:
        console.print(f"  note: {note}", markup=False)


def _arm_text(each: dict[str, Any]) -> str:
    """Which arm acts, and how often the policy's does; nothing where nothing is compared."""
    arm, design = each["record"]["guarded"].get("arm"), each["header"].get("interleaving")
    if arm is None or design is None:
        return ""
    actor = "the policy acts" if arm == "on" else f"{design['baseline']} acts"
    return f"\n  arm: {arm} ({actor}; the policy's are {100 * design['share']:g} % of {design['window_s']:g} s windows)"


def _learnt(correction: dict[str, float], drift: dict[str, float]) -> str:
    """How far measurements are from the profile now, in a few words."""
    names = {"power": "power", "step": "step time", "clock": "SM clock"}
    told = [
        f"{names.get(q, q)} {factor - 1:+.1%}{' (drift)' if q in drift else ''}" for q, factor in correction.items()
    ]
    return f"measured against predicted: {', '.join(told)}"


def _queue_bound(record: dict[str, Any]) -> str:
    """ ", at most 20 waiting (7 refused so far)" where the queue is bounded."""
    most, engine = record["guarded"].get("most_waiting"), record["sample"]["engine"] or {}
    return "" if most is None else f", at most {most} waiting ({engine.get('refused_requests', 0)} refused so far)"


def clock_text(record: dict[str, Any]) -> str:
    """The SM clock as requested, accepted by the driver and measured, in a few words."""
    asked = record["guarded"]["point"]["sm_clock_mhz"]
    if asked is None:
        return "no clock lock"
    accepted = [str(mhz or "none") for mhz in record.get("accepted_clocks_mhz", ())]
    measured = [str(b["sm_clock_mhz"]) for b in record["sample"]["boards"]]
    return f"SM clock ≤ {asked} MHz (accepted {'/'.join(accepted)}, measured {'/'.join(measured)})"


def _engines(engines: Sequence[EngineNow]) -> Table:
    versions = sorted({f"{e.info.engine} {e.info.version}" for e in engines})
    table = Table(title=f"Engines: {', '.join(versions)}", title_justify="left")
    table.add_column("engine", overflow="fold")  # alone gives way in a narrow terminal
    for column in ("process", "boards", "running", "waiting", "active limit", "KV"):
        table.add_column(column, no_wrap=True)
    for e in engines:
        info, now = e.info, e.sample
        turns = f" ({now.scheduled} in turn)" if now.scheduled is not None and now.lowering == "time-slice" else ""
        lowering = "" if now.lowering == "drain" else f" ({now.lowering})"
        table.add_row(
            e.name, str(info.pid), f"{runs_text(info.boards) or 'unknown'}{_parallelism(info.parallelism)}",
            f"{now.running}{turns}", str(now.waiting), f"{now.active_limit} of {now.launch_limit}{lowering}",
            f"{now.kv_usage:.0%}",
        )  # fmt: skip
    return table


def _parallelism(told: str) -> str:
    """ " (tp4 dp2 ep)" of "tp4 pp1 dp2 ep1": without what is 1 anyway."""
    parts = [p.replace("ep1", "ep") for p in told.split() if p == "ep1" or p[2:] not in ("0", "1")]
    return f" ({' '.join(parts)})" if parts else ""


def _boards(boards: Sequence[tuple[BoardInfo, PowerSample]], engines: Sequence[EngineNow], *, emulated: bool) -> Table:
    """All boards; a line divides those of different engines."""
    names = sorted({info.name for info, _ in boards})
    table = Table(title=f"Boards{' (emulated)' if emulated else ''}: {', '.join(names)}", title_justify="left")
    for column in ("board", "power", "limit in force", "range", "SM clock", "limited by power"):
        table.add_column(column)
    before = None
    for info, now in boards:
        users = [e.name for e in engines if info.index in e.info.boards]
        if before is not None and users != before:
            table.add_section()
        before = users
        table.add_row(
            str(info.index), f"{now.power_w:.0f} W", f"{now.enforced_limit_w:.0f} W",
            f"{info.min_limit_w:.0f}..{info.max_limit_w:.0f} W", f"{now.sm_clock_mhz} MHz",
            "yes" if now.throttled_by_power else "no",
        )  # fmt: skip
    return table
