"""The agent: one engine, its boards, one policy; wires the tick to the world and always leaves in order."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol

from pals.control.guard import Guard
from pals.control.pals_paper import PaperSettings
from pals.control.policies import build_policy
from pals.core.errors import ConfigError, EngineGoneError, ProfileMismatchError
from pals.core.protocols import PowerActuator, PowerMeter
from pals.core.quantities import Slo, fingerprint_of
from pals.models.profile import Profile
from pals.runtime.budgets import BudgetSchedule
from pals.runtime.config import Config
from pals.runtime.group import EngineGroup
from pals.runtime.journal import Journal, JournalHeader, encode
from pals.runtime.loop import boards_as_found, run, wall_clock
from pals.runtime.tick import Rig, TickRecord

log = logging.getLogger("pals")
FOUND_RECORD = "limits-found.json"
STATUS_FILE = "agent-status.json"
EXIT_ENGINE_GONE = 3


class Board(PowerMeter, PowerActuator, Protocol):
    """A board that can be read and, with privilege, written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSetup:
    """What the agent steers and where it writes."""

    boards: Sequence[Board]
    channel: EngineGroup
    config: Config
    emulated: bool
    may_write: bool
    folder: Path
    sinks: Sequence[Callable[[TickRecord], None]]
    say: Callable[[str], None]


class Drive(Protocol):
    """Lets time pass and ticks happen until the end; `pals.runtime.loop.run` with its clock given."""

    def __call__(self, rig: Rig, *, budget: BudgetSchedule, slo: Slo, sink: Callable[[TickRecord], None]) -> int:
        """Return the number of ticks."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualTime:
    """A run in virtual time: how it is driven, and the command without what differs between equal runs."""

    drive: Drive
    command: str


def load_profile(path: Path) -> Profile:
    """Read a profile file.

    Raises:
        ConfigError: missing or unreadable.
    """
    try:
        return Profile.from_json(path.read_text(encoding="utf-8"), name=str(path))
    except OSError as e:
        raise ConfigError(f"cannot read the profile {path}: {e}; make one with `pals profile --out {path}`") from e


def check_profile(profile: Profile, setup: AgentSetup, name: str) -> None:
    """Refuse a profile measured on something else.

    Raises:
        ProfileMismatchError: naming every difference.
    """
    here = fingerprint_of(setup.channel.info, [b.info for b in setup.boards])
    if differences := profile.fingerprint.differences(here):
        raise ProfileMismatchError(
            f"{name} was measured on something else; it is not used and nothing was written:\n  "
            + "\n  ".join(differences)
            + "\nMake one for this engine with `pals profile`."
        )


def control_engine(setup: AgentSetup, stop: threading.Event, virtual: VirtualTime | None = None) -> int:
    """Steer the engine until `stop` is set or the `virtual` run is over; return 0, or 3 when the engine ended by itself.

    Raises:
        ConfigError: bad settings or profile; nothing was written.
    """
    control = setup.config.control
    acts = _mode(setup) == "auto"
    infos = [b.info for b in setup.boards]
    guard = Guard.of(infos, setup.channel.info.launch_sequences)
    profile = load_profile(Path(control.profile)) if control.profile else None
    if profile is not None:
        check_profile(profile, setup, str(control.profile))
    settings = (
        {
            "power_limit_w": control.power_limit_w,
            "sm_clock_mhz": control.sm_clock_mhz,
            "active_sequences": control.active_sequences,
        }
        if control.policy == "static"
        else asdict(PaperSettings())
    )
    rig = Rig(
        meters=setup.boards,
        actuators=setup.boards if acts else (),
        engine=setup.channel,
        setter=setup.channel if acts else None,
        controller=build_policy(control.policy, settings, profile, guard),
        guard=guard,
        period_s=control.period_s,
        lowering=control.lowering,
    )
    header = JournalHeader(
        policy=control.policy,
        policy_settings=settings,
        profile_json=profile.to_json() if profile else None,
        boards=tuple(infos),
        engine=setup.channel.info,
        period_s=control.period_s,
        emulated=setup.emulated,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(["pals", *sys.argv[1:]]),
        lowering=control.lowering,
    )
    _tell_lowering(setup, control.lowering)
    if virtual is not None:
        header = reproducible(header, virtual.command)
    drive = virtual.drive if virtual is not None else partial(run, clock=wall_clock(stop))
    return _run(setup, rig, header, stop, drive)


def reproducible(header: JournalHeader, command: str) -> JournalHeader:
    """`header` without what differs between two runs of one seed: no process id, the date of virtual time's zero."""
    return replace(
        header,
        clock="virtual",
        started_at=datetime.fromtimestamp(0, UTC).isoformat(timespec="seconds"),
        command=command,
        engine=replace(header.engine, pid=0),
    )


def _tell_lowering(setup: AgentSetup, lowering: str) -> None:
    capabilities = setup.channel.info.capabilities
    if lowering != "drain" and not capabilities.get(lowering, False):
        setup.say(
            f"lowering {lowering} is asked for, but this engine's scheduler does not offer what it needs: a lowered "
            "active-sequence limit drains instead"
        )


def _mode(setup: AgentSetup) -> str:
    mode = setup.config.control.mode or ("auto" if setup.emulated else "advise")
    if mode == "auto" and not setup.may_write:
        setup.say(
            "advise only: this process may not write power limits (needs root); decisions are recorded, "
            "every board keeps the limit it has"
        )
        return "advise"
    return mode


def _run(setup: AgentSetup, rig: Rig, header: JournalHeader, stop: threading.Event, drive: Drive) -> int:
    given = setup.config.output.journal
    path = Path(given) if given else setup.folder / f"journal-{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"
    with ExitStack() as exits:
        journal = Journal(path, header)
        exits.callback(journal.close)
        status = StatusFile(setup.folder / STATUS_FILE, header)
        exits.callback(status.remove)
        if rig.setter is not None:
            exits.callback(rig.setter.release)
        rig.locks.write_ahead = exits.enter_context(
            boards_as_found(rig.meters, rig.actuators, setup.folder / FOUND_RECORD)
        )
        setup.say(
            f"policy {header.policy}, mode {rig.mode}, every {rig.period_s:g} s; {len(setup.boards)} boards "
            f"({header.boards[0].name}{', emulated' if setup.emulated else ''}); journal {path}"
        )

        def sink(record: TickRecord) -> None:
            journal.append(record)
            status.write(record)
            for each in setup.sinks:
                each(record)

        try:
            drive(rig, budget=setup.config.budget, slo=setup.config.slo, sink=sink)
        except EngineGoneError as e:
            if stop.is_set():
                return 0
            setup.say(f"{e}; the boards are put back as found and the agent stops")
            return EXIT_ENGINE_GONE
    return 0


class StatusFile:
    """The newest record, for `pals status`; replaced atomically each tick, removed at the end."""

    def __init__(self, path: Path, header: JournalHeader) -> None:
        self._path = path
        self._header = {k: v for k, v in encode(header).items() if k != "profile_json"}

    def write(self, record: TickRecord) -> None:
        """Replace the file."""
        fresh = self._path.with_suffix(".tmp")
        fresh.write_text(json.dumps({"header": self._header, "record": encode(record)}))
        fresh.replace(self._path)

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
