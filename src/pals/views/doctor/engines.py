"""Findings about engines: those that publish in the run directory, and those of this node that do not."""

from __future__ import annotations

from collections.abc import Iterator

from pals.core.diagnosis import EngineFacts, Finding, RunDirFacts, Status, finding
from pals.views.doctor.boards import count

OK, WARNING, PROBLEM = Status.OK, Status.WARNING, Status.PROBLEM
STALE_S = 3.0  # as long as an engine's setpoint lives


def engines(folder: RunDirFacts) -> Iterator[Finding]:
    """All engines of the run directory, and vLLM engines that are not in it."""
    for facts in folder.engines:
        yield from engine(facts)
    for name in folder.unreadable:
        yield finding(
            "engines", "channel", WARNING, "belongs to another user or another version of PALS and cannot be read",
            subject=name, remedy="run pals as the engine's user, from the engine's environment", channel=name,
        )  # fmt: skip
    if pids := folder.without_plugin:
        yield finding(
            "engines", "plugin", WARNING,
            f"{count(len(pids), 'vLLM engine')} without the PALS plugin, or with another run directory: "
            f"process {', '.join(map(str, pids))}",
            remedy=f"install pals-llm in its environment and start it with PALS_RUN_DIR={folder.path}", pids=list(pids),
        )  # fmt: skip
    for who in folder.killed:
        yield finding(
            "engines", "killed", WARNING, f"{who} was killed and left its channel", killed=who,
            remedy="see its log; the next agent clears the channel away",
        )  # fmt: skip
    if not (folder.engines or folder.unreadable or folder.without_plugin):
        yield finding("engines", "engine", OK, "none runs; pals serve MODEL starts one")


def engine(facts: EngineFacts) -> Iterator[Finding]:
    """One engine: what it is, whether it tells, whether it can be steered."""
    info = facts.info
    subject = f"process {facts.pids[0]}"
    where = f"boards {', '.join(map(str, info.boards))}" if info.boards else "boards unknown"
    status, remedy = OK, None
    text = f"{info.model}; {info.engine} {info.version}, {info.parallelism}, {where}; plugin loaded"
    if not info.boards:
        status, remedy = PROBLEM, "start the engine with board indices in CUDA_VISIBLE_DEVICES, e.g. 0,1"
        text += "; PALS does not steer boards it would have to guess"
    elif not facts.complete:
        status, remedy = WARNING, "wait until it has started; else start all ranks with the same PALS_RUN_DIR"
        text += f"; only {count(len(facts.pids), 'data-parallel rank')} here"
    yield finding(
        "engines", "engine", status, text, subject=subject, remedy=remedy, pids=list(facts.pids), model=info.model,
        engine=info.engine, version=info.version, parallelism=info.parallelism, boards=list(info.boards),
        ranks_complete=facts.complete, capabilities=dict(info.capabilities),
    )  # fmt: skip
    yield _telemetry(subject, facts)
    yield _sequences(subject, facts)


def _telemetry(subject: str, facts: EngineFacts) -> Finding:
    now = facts.sample
    if now is None:
        return finding(
            "engines", "telemetry", PROBLEM, "it ended just now", subject=subject,
            remedy="look at vLLM's log, and start it again",
        )  # fmt: skip
    status, remedy = OK, None
    last = "no step yet" if now.steps == 0 else f"last step {facts.age_s:.1f} s ago"
    if now.running + now.waiting == 0:
        text = f"idle, {last}"
    else:
        text = f"{now.running} running, {now.waiting} waiting, {last}"
        if facts.age_s >= STALE_S:
            status, text = WARNING, f"{text}: stalled, or the plugin gave up"
            remedy = "look for 'PALS plugin failed' in vLLM's log; requests are then served without PALS"
    return finding(
        "engines", "telemetry", status, text, subject=subject, remedy=remedy,
        age_s=facts.age_s, steps=now.steps, running=now.running, waiting=now.waiting, kv_usage=now.kv_usage,
    )  # fmt: skip


def _sequences(subject: str, facts: EngineFacts) -> Finding:
    offers, launch = facts.info.capabilities, facts.info.launch_sequences
    limit = facts.sample.active_limit if facts.sample is not None else None
    named = ", ".join(name for name, there in offers.items() if there) or "nothing"
    status, remedy = OK, None
    if offers.get("active_limit") or offers.get("running_limit"):
        asked = "no setpoint in force" if facts.setpoint is None else f"setpoint {facts.setpoint} in force"
        text = f"active-sequence limit {limit or 'unknown'} of {launch}, {asked}; offers {named}"
    else:
        status, text = WARNING, f"offers no active-sequence limit (only {named}); it keeps its launch limit {launch}"
        remedy = "use a vLLM version that PALS is made for; power limit and clock can still be steered"
    return finding(
        "engines", "active-sequences", status, text, subject=subject, remedy=remedy,
        active_limit=limit, launch_limit=launch, setpoint=facts.setpoint,
    )  # fmt: skip
