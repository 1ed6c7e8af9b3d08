"""Findings about writing: may this process, who else does, is an agent at work. Nothing is written to find out."""

from __future__ import annotations

from collections.abc import Iterator

from pals.core.diagnosis import Finding, NvmlFacts, PrivilegeFacts, RunDirFacts, Status, WriterFacts, finding
from pals.views.doctor.boards import count

OK, WARNING, PROBLEM = Status.OK, Status.WARNING, Status.PROBLEM
STALE_S = 3.0
ADVISE = "PALS can only advise (decisions recorded, nothing written)"


def permissions(nvml: NvmlFacts, privilege: PrivilegeFacts) -> Iterator[Finding]:
    """May this process write; nothing where there is no board."""
    if not nvml.boards:
        return
    status, remedy = WARNING, None
    if nvml.emulated and nvml.may_write:
        status, text = OK, "the emulated boards accept writes"
    elif nvml.emulated:
        text, remedy = f"these emulated boards refuse writes: {ADVISE}", "serve without --unprivileged"
    elif not nvml.may_write:
        text = f"this process (user id {privilege.euid}) may read, but not set limits or clocks: {ADVISE}"
        remedy = "run the agent as root: sudo pals agent --mode auto"
    elif privilege.sys_admin is False:
        text = f"root without CAP_SYS_ADMIN: the driver will likely refuse writes, then {ADVISE}"
        remedy = "start the container with --cap-add SYS_ADMIN"
    else:
        status, text = OK, "this process (root) may set limits and clocks (not tried)"
    yield finding(
        "permissions", "write", status, text, remedy=remedy,
        euid=privilege.euid, sys_admin=privilege.sys_admin, may_write=nvml.may_write,
    )  # fmt: skip


def other_writers(writer: WriterFacts) -> Finding:
    """Who else is known to write."""
    status, remedy = OK, None
    if writer.error is not None:
        status, text = WARNING, writer.error
        remedy = "run as the agent's user; if it is damaged: check limits with nvidia-smi -q -d POWER, remove it"
    elif writer.pid is None:
        text = "no PALS agent writes here (other tools leave no record to look at)"
    elif writer.alive:
        text = f"a PALS agent (process {writer.pid}) sets {count(writer.boards, 'board')}; a second would be refused"
    else:
        status, remedy = PROBLEM, "pals restore"
        text = f"a PALS agent (process {writer.pid}) was killed; {count(writer.boards, 'board')} may still be as it set them"
    return finding(
        "permissions", "other-writers", status, text, remedy=remedy,
        pid=writer.pid, alive=writer.alive, boards=writer.boards, error=writer.error,
    )  # fmt: skip


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
