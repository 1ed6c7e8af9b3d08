"""Findings about capd: whether it is there, answers, lets this user steer, and what it has seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pals.core.diagnosis import Finding, NvmlFacts, Status, finding
from pals.core.diagnosis_writing import CapdFacts, Reach
from pals.views.doctor.boards import count

OK, WARNING, PROBLEM = Status.OK, Status.WARNING, Status.PROBLEM
SLOW_WRITE_S = 0.25  # half a control period of 0.5 s
GRANT = 'add the user with "set" under [rights] in /etc/pals/capd.toml, then sudo systemctl reload pals-capd'
EXITS = {
    "restore": "restore (as found)",
    "safe": "safe (their part of the budget, or safe_w)",
    "hold": "hold (stay as they are)",
}


def capd(facts: CapdFacts, nvml: NvmlFacts) -> Iterator[Finding]:
    """All about capd; little where it is not reached."""
    yield _daemon(facts, nvml)
    if facts.reach is not Reach.ANSWERS:
        return
    yield _rights(facts)
    yield _dead_man(facts)
    yield _state(facts)
    yield _latency(facts)
    yield _leases(facts)
    yield from _boards(facts, nvml)


def _daemon(facts: CapdFacts, nvml: NvmlFacts) -> Finding:
    status, text, remedy = _reached(facts, needed=bool(nvml.boards) and not nvml.emulated)
    return finding(
        "capd", "daemon", status, text, remedy=remedy, path=facts.path, reach=facts.reach.value, error=facts.error,
        version=facts.version, answered_s=facts.took_s, group=facts.group,
    )  # fmt: skip


def _reached(facts: CapdFacts, *, needed: bool) -> tuple[Status, str, str | None]:
    path = facts.path
    if facts.reach is Reach.MISSING and needed:
        text = f"none at {path}: boards would stay limited after an agent's kill -9, until pals restore"
        return WARNING, text, "run the dead-man: sudo systemctl enable --now pals-capd"
    if facts.reach is Reach.MISSING:
        return OK, f"none at {path}; it is for real boards", None
    if facts.reach is Reach.CLOSED:
        return WARNING, f"this user may not open {path}, which group {facts.group or '(unknown)'} owns", _join(facts)
    if facts.reach is Reach.STALE:
        remedy = "sudo systemctl restart pals-capd (it takes the old file's place); see journalctl -u pals-capd"
        return PROBLEM, f"{path} is there, but nobody listens: capd was killed, or is starting", remedy
    if facts.reach is Reach.SILENT:
        remedy = "sudo systemctl restart pals-capd; until then its own watchdog and capd-release see to the boards"
        return PROBLEM, f"something listens at {path} and does not answer in time: it hangs", remedy
    if facts.reach is Reach.STRANGE:
        return (
            PROBLEM,
            f"what is at {path} is no capd of this version",
            "see PALS_CAPD_SOCKET and journalctl -u pals-capd",
        )
    if facts.reach is Reach.TURNED_AWAY:
        return WARNING, f"capd at {path} gives this user no right", GRANT
    return OK, f"capd {facts.version} at {path} answered in {1e3 * (facts.took_s or 0.0):.1f} ms", None


def _join(facts: CapdFacts) -> str:
    """How to get at the socket; nobody is told to join the group root."""
    if facts.group == "root":
        return "sudo groupadd -f pals; sudo usermod -aG pals $USER; restart capd (--group pals), then log in again"
    if facts.in_group:
        return f"log in again, or newgrp {facts.group}: this login is older than the membership"
    return f"sudo usermod -aG {facts.group or 'pals'} $USER, then log in again"


def why_not(facts: CapdFacts) -> str | None:
    """In a few words, why capd cannot write for this user; None: there is none, or it can."""
    if facts.reach is Reach.ANSWERS:
        return None if facts.rights in ("set", "admin") else f"capd lets this user only {facts.rights}"
    return {
        Reach.CLOSED: "this user may not open capd's socket",
        Reach.STALE: "capd is not running, though its socket's file is there",
        Reach.SILENT: "capd hangs",
        Reach.TURNED_AWAY: "capd gives this user no right",
        Reach.STRANGE: "what is at capd's socket is no capd of this version",
    }.get(facts.reach)


def _rights(facts: CapdFacts) -> Finding:
    may_set = facts.rights in ("set", "admin")
    text = f"this user's right is {facts.rights}" + ("" if may_set else ": it may look, but not lease a board")
    return finding(
        "capd", "rights", OK if may_set else WARNING, text, remedy=None if may_set else GRANT, rights=facts.rights
    )


def _dead_man(facts: CapdFacts) -> Finding:
    kinds = sorted({b.exit_policy for b in facts.boards if b.exit_policy is not None})
    then = " or ".join(EXITS.get(k, k) for k in kinds) or "their exit policy, which this capd does not tell"
    budget = "" if facts.budget_w is None else f"; budget {facts.budget_w:.0f} W"
    status, remedy = OK, None
    if "hold" in kinds:
        status, remedy = (
            WARNING,
            'exit = "restore" or "safe" in /etc/pals/capd.toml, so that a dead agent\'s limits end',
        )
    return finding(
        "capd", "dead-man", status,
        f"a lease that nobody renews ends after {facts.ttl_s:g} s (at most {facts.max_ttl_s:g} s may be asked for); boards then "
        f"go to {then}{budget}",
        remedy=remedy, ttl_s=facts.ttl_s, max_ttl_s=facts.max_ttl_s, exit_policies=kinds, budget_w=facts.budget_w,
    )  # fmt: skip


def _state(facts: CapdFacts) -> Finding:
    """Kill switch, alarm and dry run, the worst first."""
    told: list[tuple[Status, str, str]] = []
    if facts.off:
        told.append((PROBLEM, "the kill switch is on: every request is refused, boards stand at their exit policy",
                     "sudo rm /var/lib/pals-capd/off (the file `off` in capd's --state folder)"))  # fmt: skip
    alarm = facts.alarm
    if alarm is not None and not (facts.off and alarm.startswith("kill switch")):
        told.append((PROBLEM, f"alarm: {alarm}", "journalctl -u pals-capd, then mend its cause or restart capd"))
    if facts.dry_run:
        told.append((WARNING, "it runs dry: requests are granted, nothing is written", "start it without --dry-run"))
    return finding(
        "capd", "state", told[0][0] if told else OK,
        "; ".join(t for _, t, _ in told) or "no kill switch, no alarm, not dry",
        remedy="; ".join(r for _, _, r in told) or None, off=facts.off, alarm=facts.alarm, dry_run=facts.dry_run,
    )  # fmt: skip


def _latency(facts: CapdFacts) -> Finding:
    p50_s, p99_s = facts.write_p50_s, facts.write_p99_s
    status, text, remedy = OK, "it has written nothing since it started", None
    if p50_s is not None and p99_s is not None:
        text = f"its last writes took {1e3 * p50_s:.2g} ms (p50), {1e3 * p99_s:.2g} ms (p99); {facts.writes} since it started"
        if p99_s > SLOW_WRITE_S:
            status = WARNING
            remedy = "find who keeps the driver busy (nvidia-smi loops, monitoring), or use longer control periods"
    return finding(
        "capd", "write-latency", status, text, remedy=remedy, writes=facts.writes, write_p50_s=p50_s, write_p99_s=p99_s
    )


def _leases(facts: CapdFacts) -> Finding:
    holders = sorted({b.leased_by for b in facts.boards if b.leased_by is not None})
    leased = sum(b.leased_by is not None for b in facts.boards)
    text = f"{leased} of {count(len(facts.boards), 'board')} leased" + (f": {', '.join(holders)}" if holders else "")
    return finding("capd", "leases", OK, text, leased=leased, holders=holders)


def _boards(facts: CapdFacts, nvml: NvmlFacts) -> Iterator[Finding]:
    names = {b.info.uuid: f"board {b.index}" for b in nvml.boards if b.info is not None}
    known = {b.uuid for b in facts.boards}
    if names and (missing := sorted(set(names) - known)):
        yield finding(
            "capd", "boards", WARNING, f"capd does not know {', '.join(names[u] for u in missing)}, which NVML lists here",
            remedy="sudo systemctl restart pals-capd; emulated boards need a capd of their own (docs/emulated-nvml.md)",
            unknown=missing,
        )  # fmt: skip
    for b in facts.boards:
        subject = names.get(b.uuid, b.uuid)
        if b.refusal is not None:
            yield finding(
                "capd", "refuses", WARNING, f"capd does not write it: {b.refusal}", subject=subject,
                remedy="turn MIG off, or take `steer = false` out of the policy file; a lost board needs a reset",
                refusal=b.refusal,
            )  # fmt: skip
    hands = {names.get(b.uuid, b.uuid): (b.other_hand_w, b.suspected_lock) for b in facts.boards}
    yield from _second_hands(hands)


def _second_hands(hands: Mapping[str, tuple[float | None, str | None]]) -> Iterator[Finding]:
    seen = {subject: told for subject, told in hands.items() if told != (None, None)}
    if not seen:
        yield finding("capd", "second-hand", OK, "capd saw nobody else set a limit or a clock")
    for subject, (other_w, lock) in seen.items():
        limit = (
            "" if other_w is None else f"somebody else set {other_w:.0f} W: capd leaves it, and leases nothing above it"
        )
        yield finding(
            "capd", "second-hand", WARNING, "; ".join(filter(None, (limit, lock))), subject=subject,
            remedy="find who (nvidia-smi, DCGM, a script); set the limit right, then sudo systemctl restart pals-capd",
            other_hand_w=other_w, suspected_lock=lock,
        )  # fmt: skip
