"""Findings of what was tried: does a board obey, how long does a write take, does it stand as found. And of all: the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pals.core.diagnosis import BoardFacts, Finding, NodeFacts, Status, finding
from pals.core.diagnosis_writing import BoardTrial, ClockTrial, LatencyTrial, LimitTrial, Reach
from pals.core.quantities import SAME_LIMIT_W
from pals.views.doctor.boards import count
from pals.views.doctor.capd import why_not

OK, UNKNOWN, WARNING, PROBLEM = Status.OK, Status.UNKNOWN, Status.WARNING, Status.PROBLEM
SLOW_WRITE_S = 0.25  # half a control period of 0.5 s


def trial(tried: BoardTrial) -> Iterator[Finding]:
    """One board that was written to, or why it was not."""
    subject = f"board {tried.index}"
    if tried.refused is not None:
        yield finding(
            "trial", "tried", UNKNOWN, f"not written: {tried.refused}", subject=subject, remedy=tried.remedy,
            writer=tried.writer, refused=tried.refused, error=None,
        )  # fmt: skip
        return
    if tried.error is not None:
        yield finding(
            "trial", "tried", WARNING, f"ended early: {tried.error}", subject=subject,
            remedy="see the findings about capd and permissions", writer=tried.writer, refused=None, error=tried.error,
        )  # fmt: skip
    if tried.clock is not None:
        yield _clock(subject, tried.clock)
    if tried.limit is not None:
        yield _limit(subject, tried.limit)
    if tried.latency is not None:
        yield _latency(subject, tried.latency, tried.writer)
    yield _put_back(subject, tried)


def _clock(subject: str, c: ClockTrial) -> Finding:
    status, text, remedy = _clock_text(c)
    return finding(
        "trial", "clock-lock", status, text, subject=subject, remedy=remedy, before_mhz=c.before_mhz,
        target_mhz=c.target_mhz, measured_mhz=c.measured_mhz, took_s=c.took_s, after_mhz=c.after_mhz, error=c.error,
    )  # fmt: skip


def _clock_text(c: ClockTrial) -> tuple[Status, str, str | None]:
    if c.error is not None:
        return WARNING, f"no clock lock: {c.error}", "steer by power limit and active sequences alone"
    if c.took_s is not None:
        after = "" if c.after_mhz is None else f", {c.after_mhz} MHz after it"
        text = f"a clock lock takes: {c.target_mhz} MHz asked for, {c.measured_mhz} MHz measured within {1e3 * c.took_s:.0f} ms"
        return OK, f"{text}; {c.before_mhz} MHz before{after}", None
    told = f"{c.target_mhz} MHz asked for, {c.measured_mhz} MHz measured"
    again = "try again under load: --try-writes=busy"
    if c.capped:
        return UNKNOWN, f"whether a clock lock takes: {told}, since the power limit holds the clock lower", again
    if c.idle:
        return UNKNOWN, f"whether a clock lock takes: {told}, on an idle board, whose clock may rest", again
    remedy = "look for a lock of somebody else (nvidia-smi -rgc); else steer by power limit and active sequences alone"
    return PROBLEM, f"a clock lock does not take: {told} on a board at work", remedy


def _limit(subject: str, t: LimitTrial) -> Finding:
    status, remedy = OK, None
    if t.error is not None:
        status, text = WARNING, f"the limit could not be set: {t.error}"
        remedy = "see the findings about permissions and capd"
    elif t.asked_w is None:
        status, text = UNKNOWN, f"the limit stands at its minimum ({t.before_w:.0f} W): nothing lower can be tried"
    elif t.enforced_w is not None and abs(t.enforced_w - t.asked_w) < SAME_LIMIT_W:
        text = f"the limit takes: {t.asked_w:.0f} W asked for and in force, {t.before_w:.0f} W before"
    else:
        status, text = WARNING, f"the limit does not follow: {t.asked_w:.0f} W asked for, {t.enforced_w:.0f} W in force"
        remedy = "look at the BMC's or rack's power cap"
    return finding(
        "trial", "limit-write", status, text, subject=subject, remedy=remedy,
        before_w=t.before_w, asked_w=t.asked_w, enforced_w=t.enforced_w, error=t.error,
    )  # fmt: skip


def _latency(subject: str, t: LatencyTrial, writer: str) -> Finding:
    slow = t.p99_s > SLOW_WRITE_S
    what = (
        "renewals of a lease (capd answers, the driver is not asked)"
        if writer == "capd"
        else "writes of the same limit"
    )
    return finding(
        "trial", "write-latency", WARNING if slow else OK,
        f"{t.writes} {what}: {1e3 * t.p50_s:.2g} ms (p50), {1e3 * t.p99_s:.2g} ms (p99)", subject=subject,
        remedy="find who keeps the driver busy (nvidia-smi loops, monitoring)" if slow else None,
        writes=t.writes, p50_s=t.p50_s, p99_s=t.p99_s, through=writer,
    )  # fmt: skip


def _put_back(subject: str, t: BoardTrial) -> Finding:
    status, remedy = OK, None
    if t.left_w is None or t.found_w is None:
        status, text = PROBLEM, "how the board was left could not be read"
        remedy = "nvidia-smi -q -d POWER"
    elif _still_locked(t.clock):
        status, text = PROBLEM, "the clock still stands where it was locked, though the lock was released"
        remedy = f"sudo nvidia-smi -i {t.index} -rgc"
    elif abs(t.left_w - t.found_w) < SAME_LIMIT_W:
        text = f"the board stands as found: {t.left_w:.0f} W in force, our clock lock released"
    else:
        status, text = PROBLEM, f"{t.found_w:.0f} W were in force before, {t.left_w:.0f} W are now"
        remedy = f"pals restore, or sudo nvidia-smi -i {t.index} -pl {t.found_w:.0f}"
    return finding(
        "trial", "put-back", status, text, subject=subject, remedy=remedy, found_w=t.found_w, left_w=t.left_w
    )


def _still_locked(c: ClockTrial | None) -> bool:
    """Where the lock took and moved the clock: whether it stands there still. A lock has no getter."""
    if c is None or c.took_s is None or c.after_mhz is None:
        return False
    return abs(c.after_mhz - c.target_mhz) <= abs(c.after_mhz - c.before_mhz)


def verdict(node: NodeFacts, found: Sequence[Finding]) -> Iterator[Finding]:
    """Whether PALS can steer these boards, in one line, with the remedy of what keeps it; nothing where there is none."""
    if not node.nvml.boards:
        return
    against = _against(node)
    able = [b for b in node.nvml.boards if against is None and not _unfit(node, b)]
    levers = _levers(able)
    told = f"{len(able)} of {count(len(node.nvml.boards), 'board')}"
    status, remedy = OK, None
    if against is not None:
        status, text = WARNING, f"PALS cannot steer these boards now, only advise: {against}"
        remedy = _remedy(found, ("permissions", "capd") if node.chosen.kind == "direct" else ("capd", "permissions"))
    elif len(able) < len(node.nvml.boards):
        status, text = WARNING, f"PALS can steer {told}, by {levers or 'nothing'}, written by {node.chosen.told}"
        remedy = "see the boards that are not usable, have MIG on, or a limit that cannot be moved"
    else:
        text = f"PALS can steer {told}: by {levers}, written by {node.chosen.told}"
    yield finding(
        "verdict", "steerable", status, text, remedy=remedy, boards=len(node.nvml.boards), steerable=len(able),
        writer=node.chosen.kind, why_not=against,
    )  # fmt: skip


def _against(node: NodeFacts) -> str | None:
    """What keeps every board from being steered."""
    by_capd = node.chosen.kind == "capd"
    if node.chosen.kind == "none" and not node.nvml.may_write:
        return f"this process may not write, and {why_not(node.capd) or 'there is no capd'}"
    if node.chosen.kind == "none":
        return why_not(node.capd) or node.chosen.why or "nobody may write"
    if by_capd and node.capd.off:
        return "capd's kill switch is on"
    if by_capd and node.capd.dry_run:
        return "capd runs dry"
    if node.chosen.kind == "direct" and node.privilege.sys_admin is False and not node.nvml.emulated:
        return "root without CAP_SYS_ADMIN"
    return None


def _remedy(found: Sequence[Finding], areas: Sequence[str]) -> str:
    """That of the worst finding of the first area that has one."""
    bad = [f for f in found if f.remedy and f.area in areas and f.status in (WARNING, PROBLEM)]
    bad.sort(key=lambda f: (areas.index(f.area), f.status is not PROBLEM))
    return next((f.remedy for f in bad if f.remedy), "see the findings above that are no ok")


def _unfit(node: NodeFacts, board: BoardFacts) -> bool:
    if board.info is None or board.settings is None or board.settings.mig_mode:
        return True
    by_capd = node.chosen.kind == "capd" and node.capd.reach is Reach.ANSWERS
    refused = {b.uuid for b in node.capd.boards if b.refusal is not None}
    return by_capd and board.info.uuid in refused


def _levers(boards: list[BoardFacts]) -> str:
    limits = any(b.info is not None and b.info.max_limit_w - b.info.min_limit_w >= 1.0 for b in boards)
    clocks = any(b.settings is not None and b.settings.clock_lock_api for b in boards)
    return " and ".join(filter(None, ("power limit" if limits else "", "SM clock" if clocks else "")))
