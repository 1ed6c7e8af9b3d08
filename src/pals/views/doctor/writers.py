"""Findings about writing: who would, may this process, who else does, is an agent at work. Nothing is written to find out."""

from __future__ import annotations

from collections.abc import Iterator

from pals.core.diagnosis import Finding, NvmlFacts, PrivilegeFacts, RunDirFacts, Status, WriterFacts, finding
from pals.core.diagnosis_writing import CapdFacts, Program, Reach, WriterChoice
from pals.views.doctor.boards import count
from pals.views.doctor.capd import why_not

OK, WARNING, PROBLEM = Status.OK, Status.WARNING, Status.PROBLEM
STALE_S = 3.0
ONLY_IF_TOLD = ("DCGM", "dcgmi")  # how capd's names begin of those that set limits only where told to
ADVISE = "PALS can only advise (decisions recorded, nothing written)"


def permissions(nvml: NvmlFacts, privilege: PrivilegeFacts, chosen: WriterChoice, capd: CapdFacts) -> Iterator[Finding]:
    """Who would write for an agent started here; nothing where there is no board."""
    if not nvml.boards:
        return
    status, text, remedy = _may_write(nvml, privilege, chosen, capd)
    yield finding(
        "permissions", "write", status, text, remedy=remedy, writer=chosen.kind, told=chosen.told, why=chosen.why,
        euid=privilege.euid, sys_admin=privilege.sys_admin, may_write=nvml.may_write,
    )  # fmt: skip


def _may_write(
    nvml: NvmlFacts, privilege: PrivilegeFacts, chosen: WriterChoice, capd: CapdFacts
) -> tuple[Status, str, str | None]:
    if chosen.kind in ("capd", "zeusd"):
        return OK, f"{chosen.told} would write for an agent started here; this process needs no right of its own", None
    if nvml.emulated and not nvml.may_write:
        return WARNING, f"these emulated boards refuse writes: {ADVISE}", "serve without --unprivileged"
    if chosen.kind == "none" and nvml.may_write:
        text = f"nobody would write: {why_not(capd) or chosen.why}; {ADVISE}"
        return WARNING, text, "see capd below; or pass it by: --writer direct"
    if nvml.emulated:
        return OK, "the emulated boards accept writes: this process would write them", None
    if not nvml.may_write:
        text = f"nobody would write: this process (user id {privilege.euid}) may read, but not set limits or clocks; {ADVISE}"
        return WARNING, text, "have capd write (see below), or run the agent as root: sudo pals agent --mode auto"
    if privilege.sys_admin is False:
        text = f"root without CAP_SYS_ADMIN: the driver will likely refuse writes, then {ADVISE}"
        return WARNING, text, "start the container with --cap-add SYS_ADMIN"
    return OK, "this process (root) would write limits and clocks (not tried)", None


def other_writers(writer: WriterFacts) -> Finding:
    """Who else is known to write."""
    status, remedy = OK, None
    if writer.error is not None:
        status, text = WARNING, writer.error
        remedy = "run as the agent's user; if it is damaged: check limits with nvidia-smi -q -d POWER, remove it"
    elif writer.pid is None:
        text = "no PALS agent of this run directory writes (other tools leave no record to look at)"
    elif writer.alive:
        text = f"a PALS agent (process {writer.pid}) sets {count(writer.boards, 'board')}; a second would be refused"
    else:
        status, remedy = PROBLEM, "pals restore"
        text = f"a PALS agent (process {writer.pid}) was killed; {count(writer.boards, 'board')} may still be as it set them"
    return finding(
        "permissions", "other-writers", status, text, remedy=remedy,
        pid=writer.pid, alive=writer.alive, boards=writer.boards, error=writer.error,
    )  # fmt: skip


def other_programs(programs: tuple[Program, ...] | None, capd: CapdFacts, *, emulated: bool) -> Iterator[Finding]:
    """Programs that can write, seen here or, where it answers, by capd; on emulated boards only capd's word counts."""
    if programs is None:
        return
    here = [p for p in programs if not emulated]
    writing = [f"{p.name} (process {p.pid})" for p in here if p.writes]
    able = [f"{p.name} (process {p.pid})" for p in here if p.writes is None]
    for told in capd.others if capd.reach is Reach.ANSWERS else ():
        if not any(told.endswith(f"(process {p.pid})") for p in here):
            (able if told.startswith(ONLY_IF_TOLD) else writing).append(told)
    if writing:
        yield _seen(
            WARNING, writing, "it can set limits or clocks, and two writers would fight",
            "let one write: stop it, or have PALS write through it (--writer zeusd), or only advise",
        )  # fmt: skip
    if able:
        yield _seen(
            Status.UNKNOWN, able, "it sets limits only where it is told to",
            "see that no configuration of it sets power or clocks (dcgmi config --get)",
        )  # fmt: skip
    if loops := [f"{p.name} (process {p.pid})" for p in here if p.writes is False]:
        yield _seen(OK, loops, "it reads only, but takes the driver's time", None)
    if not (writing or able or loops):
        yield _seen(OK, [], "no other program known to write limits or clocks is seen", None)


def _seen(status: Status, who: list[str], what: str, remedy: str | None) -> Finding:
    text = f"{', '.join(who)}: {what}" if who else what
    return finding("permissions", "other-programs", status, text, remedy=remedy, seen=who)


def agents(folder: RunDirFacts) -> Iterator[Finding]:
    """The agent of this run directory, engine by engine."""
    if not folder.agents:
        yield finding("agent", "agent", OK, "none runs: engines obey their launch limits, boards keep theirs")
    for facts in folder.agents:
        stale = facts.age_s > max(STALE_S, 4 * facts.period_s)
        text = (
            f"{facts.model}: policy {facts.policy}, mode {facts.mode}, tick {facts.tick}, {facts.age_s:.1f} s ago"
            f"{': it no longer ticks' if stale else ''}"
        )
        yield finding(
            "agent", "agent", WARNING if stale else OK, text, model=facts.model, policy=facts.policy, mode=facts.mode,
            tick=facts.tick, period_s=facts.period_s, age_s=facts.age_s,
            remedy="see whether its process lives; pals restore puts boards back after a kill" if stale else None,
        )  # fmt: skip
