"""One engine under the agent: its boards, one policy, its journal and status; made by `open_session`, ended in order."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from pals.control.guard import Guard
from pals.control.policies import ACCEPTED_WIDENING, build_policy, default_settings
from pals.control.share import Claim, Holding
from pals.core.errors import ConfigError
from pals.core.fingerprint import check_fingerprint
from pals.core.protocols import PowerActuator, PowerMeter, WorthOfWatts
from pals.core.quantities import BoardInfo, Budget, Slo, fingerprint_of
from pals.models.profile import Profile
from pals.runtime.config import Config, ControlConfig
from pals.runtime.group import EngineGroup, Steered
from pals.runtime.journal import Journal, JournalHeader
from pals.runtime.live_budget import LiveBudget
from pals.runtime.loop import boards_as_found
from pals.runtime.modes import WRITING
from pals.runtime.outlets import Outlet, StatusFile, close_quietly, journal_outlet
from pals.runtime.routing_meter import RoutingMeter
from pals.runtime.tick import Rig, TickRecord, TickState, tick

FOUND_RECORD = "limits-found.json"
STATUS_FILES = "agent-status-*.json"  # one per engine
EXIT_ENGINE_GONE = 3
EXIT_NOT_PUT_BACK = 4
WORTH_EVERY_S = 1.0  # how often a policy is asked what watts are worth to it
IDLE_AFTER_S = 5.0  # without a request for so long, an engine lends its share of the budget


class Board(PowerMeter, PowerActuator, Protocol):
    """A board that can be read and, with privilege, written."""


class BudgetKeeper(Protocol):
    """Whoever holds the boards of this agent to its budget too, also when the agent is gone."""

    def keep(self, watts: float | None, uuids: Sequence[str]) -> None:
        """From now on these boards may be limited to `watts` together (None: to anything); called before each slot's ticks."""
        ...

    def end(self) -> None:
        """All boards are released and the agent ends in order: nothing is to be kept any more."""
        ...


class Watcher(Protocol):
    """Whoever looks at one engine's records as they come: metrics, a test."""

    def observe(self, record: TickRecord) -> None:
        """Take one record."""
        ...

    def close(self) -> None:
        """The engine is no longer steered."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSetup:
    """What the agent steers and where it writes."""

    find: Callable[[], Sequence[EngineGroup]]  # the engines to steer that live now
    open_boards: Callable[[EngineGroup], Sequence[Board]]  # as they are found now; raises ConfigError
    config: Config
    emulated: bool
    may_write: bool
    folder: Path
    watch: Callable[[str, Sequence[BoardInfo]], Watcher]  # by the engine's name and its boards
    say: Callable[[str], None]
    journals: Path | None = None  # where those go that nobody named; None: `folder`
    budgets: LiveBudget | None = None  # None: the schedule of `config` alone
    cannot_write: str = "this process may not write power limits (needs root)"  # said where `may_write` is not
    writer: str = ""  # who writes, and whether there is a dead-man; for `pals status`
    budget_keeper: BudgetKeeper | None = None  # None: the agent keeps its budget alone
    virtual_command: str | None = None  # in virtual time: the command, without what differs between equal runs


def load_profile(path: Path, *, refit: bool = False) -> Profile:
    """Read a profile file; `refit`: fit its rows anew.

    Raises:
        ConfigError: missing, unreadable, or no profile.
    """
    try:
        return Profile.from_json(path.read_text(encoding="utf-8"), name=str(path), refit=refit)
    except OSError as e:
        raise ConfigError(f"cannot read the profile {path}: {e}; make one with `pals profile --out {path}`") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not a profile: no text ({e.reason} at byte {e.start}); nothing was loaded") from e


def check_profile(
    profile: Profile, group: EngineGroup, boards: Sequence[Board], control: ControlConfig
) -> tuple[str, ...]:
    """Refuse a profile measured on something else; return what differs and is accepted.

    Raises:
        ProfileMismatchError: naming every difference.
    """
    return check_fingerprint(
        profile.fingerprint,
        fingerprint_of(group.info, [b.info for b in boards]),
        accept=control.accept_mismatch,
        name=str(control.profile),
        advice="Make one for this engine with `pals profile`.",
    )


def told_accepted(name: str, differences: Sequence[str]) -> str:
    """One line for people: a profile of something else is in use."""
    return (
        f"{name}: the profile was measured on something else, accepted by --accept-mismatch; its intervals are "
        f"{ACCEPTED_WIDENING:g} times as wide: {'; '.join(differences)}"
    )


class Session:
    """One engine that is steered: tick it, ask what it holds, close it."""

    def __init__(
        self, *, name: str, group: Steered, rig: Rig, slo: Slo, sink: Callable[[TickRecord], None], exits: ExitStack
    ) -> None:
        self.name, self.group, self.rig = name, group, rig
        self._slo, self._sink, self._exits = slo, sink, exits
        self._state = TickState(controller=rig.controller.initial())
        self._granted_w: float | None = None
        self._limits_w = [m.info.found_limit_w for m in rig.meters]
        self._busy_at_s: float | None = None
        self._valuing = rig.controller if isinstance(rig.controller, WorthOfWatts) else None
        self._worth: tuple[tuple[float, float], ...] = ()
        self._needed_w: float | None = None
        self._valued_at_s: float | None = None

    def tick(self, budget: Budget, now_s: float) -> None:
        """One control period with this share of the budget.

        Raises:
            EngineGoneError: the engine has ended.
        """
        record, self._state = tick(self.rig, self._state, budget, self._slo, now_s)
        self._granted_w = budget.power_w
        self._limits_w = [*record.enforced_limits_w, *map(self.rig.reserve_w, record.sample.absent)]
        engine = record.sample.engine
        if engine is None or engine.running + engine.waiting or self._busy_at_s is None:
            self._busy_at_s = now_s
        self._sink(record)

    @property
    def acts(self) -> bool:
        """Whether its boards are written."""
        return bool(self.rig.actuators)

    @property
    def limits_w(self) -> float:
        """What all its boards may draw, by the limits last known in force."""
        return sum(self._limits_w)

    def holding(self, now_s: float) -> Holding:
        """What the engine may draw now, and what it could use."""
        guard = self.rig.guard
        idle = self._busy_at_s is not None and now_s - self._busy_at_s >= IDLE_AFTER_S
        self._ask_worth(now_s)
        claim = Claim(
            boards=guard.boards,
            least_w=guard.least_budget_w,
            most_w=guard.most_budget_w,
            idle=idle,
            worth=self._worth,
            needed_w=self._needed_w,
        )
        return Holding(claim=claim, granted_w=self._granted_w, limits_w=guard.share_of(self._limits_w))

    def _ask_worth(self, now_s: float) -> None:
        """Ask the policy what watts are worth to it, where it knows; at most once in a while, since it predicts."""
        if self._valuing is None or (self._valued_at_s is not None and now_s - self._valued_at_s < WORTH_EVERY_S):
            return
        self._valued_at_s = now_s
        self._worth = self._valuing.worth(self._state.controller)
        self._needed_w = self._valuing.needed_w(self._state.controller)

    def close(self) -> None:
        """Put the boards back as found, let the engine return to its launch limit, close what was opened.

        Raises:
            NotPutBackError: some boards could not be put back; all else is done.
        """
        self._exits.close()


def open_session(setup: AgentSetup, group: EngineGroup, name: str, journal_path: Path) -> Session:
    """Begin to steer an engine; nothing is written to a board before the first tick.

    Raises:
        ConfigError: bad settings or profile, boards unknown or missing; nothing was written.
    """
    config = setup.config.of(group.info)
    rig, header = _assemble(setup, config, group)
    with ExitStack() as exits:
        sink = _sink(setup, name, header, journal_path, exits, writes=bool(rig.actuators))
        if rig.setter is not None:
            exits.callback(rig.setter.release)
        exits.enter_context(boards_as_found(rig.meters, rig.actuators, setup.folder / FOUND_RECORD))
        setup.say(
            f"{name}: policy {header.policy}, mode {_told_mode(rig, header)}, every {rig.period_s:g} s; {indices_text(group.info.boards)} "
            f"({header.boards[0].name}{', emulated' if setup.emulated else ''}); journal {journal_path}"
        )
        return Session(name=name, group=group, rig=rig, slo=config.slo, sink=sink, exits=exits.pop_all())


def _assemble(setup: AgentSetup, config: Config, group: EngineGroup) -> tuple[Rig, JournalHeader]:
    control, boards = config.control, setup.open_boards(group)
    infos = [b.info for b in boards]
    mode = _mode(setup, config, boards)
    acts, interleaving = mode in WRITING, control.interleaving if mode == "canary" else None
    guard = Guard.of(infos, group.info.launch_sequences)
    profile = load_profile(Path(control.profile)) if control.profile else None
    accepted = check_profile(profile, group, boards, control) if profile is not None else ()
    if accepted:
        setup.say(told_accepted(str(control.profile), accepted))
    settings = policy_settings(control)
    rig = Rig(
        meters=boards,
        actuators=boards if acts else (),
        engine=group,
        setter=group if acts else None,
        controller=build_policy(control.policy, settings, profile, guard, accepted=accepted, interleaving=interleaving),
        guard=guard,
        period_s=control.period_s,
        lowering=control.lowering,
        acting=mode if acts else "auto",
        experts=_experts(setup, control, group, profile),
    )
    header = JournalHeader(
        policy=control.policy,
        policy_settings=settings,
        profile_json=profile.to_json() if profile else None,
        boards=tuple(infos),
        engine=group.info,
        period_s=control.period_s,
        emulated=setup.emulated,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(["pals", *sys.argv[1:]]),
        lowering=control.lowering,
        accepted_mismatch=accepted,
        interleaving=interleaving,
    )
    if setup.virtual_command is not None:
        header = reproducible(header, setup.virtual_command)
    if control.lowering != "drain" and not group.info.capabilities.get(control.lowering, False):
        setup.say(
            f"lowering {control.lowering} is asked for, but this engine's scheduler does not offer what it needs: a lowered "
            "active-sequence limit drains instead"
        )
    return rig, header


def _experts(
    setup: AgentSetup, control: ControlConfig, group: EngineGroup, profile: Profile | None
) -> RoutingMeter | None:
    """What reads the engine's routing; drift is from the profile's, where it stores one. None: not to be used, or a dense model."""
    shape = group.info.shape
    if control.experts == "off" or (shape is not None and shape.experts == 0):
        return None
    return RoutingMeter.of_engine(setup.folder, group.pids, reference=profile.routing if profile is not None else None)


def policy_settings(control: ControlConfig) -> dict[str, Any]:
    """What the policy of this configuration is made with."""
    if control.policy == "pals":
        return {"objective": control.objective}
    if control.policy != "static":
        return default_settings(control.policy)
    return {
        "power_limit_w": control.power_limit_w,
        "sm_clock_mhz": control.sm_clock_mhz,
        "active_sequences": control.active_sequences,
    }


def reproducible(header: JournalHeader, command: str) -> JournalHeader:
    """`header` without what differs between two runs of one seed: no process id or folder, the date of virtual time's zero."""
    return replace(
        header,
        clock="virtual",
        started_at=datetime.fromtimestamp(0, UTC).isoformat(timespec="seconds"),
        command=command,
        engine=replace(header.engine, pid=0, bank=header.engine.bank and Path(header.engine.bank).name),
    )


def _mode(setup: AgentSetup, config: Config, boards: Sequence[Board]) -> str:
    mode = config.control.mode or ("auto" if setup.emulated else "advise")
    if mode in WRITING and not setup.may_write:
        setup.say(f"advise only: {setup.cannot_write}; decisions are recorded, every board keeps the limit it has")
        return "advise"
    if mode in WRITING and (refused := [b.refusal for b in boards if b.refusal is not None]):
        setup.say(f"advise only: {'; '.join(refused)}. Decisions are recorded, every board keeps the limit it has")
        return "advise"
    return mode


def _told_mode(rig: Rig, header: JournalHeader) -> str:
    """ "auto", or "canary (10 % of 30 s windows, static in the others)"."""
    if (design := header.interleaving) is None:
        return rig.mode
    return f"{rig.mode} ({100 * design.share:g} % of {design.window_s:g} s windows, {design.baseline} in the others)"


def _sink(
    setup: AgentSetup, name: str, header: JournalHeader, journal_path: Path, exits: ExitStack, *, writes: bool
) -> Callable[[TickRecord], None]:
    """Where an engine's records go: journal, status file, watcher; closed by `exits`."""
    try:
        journal = Journal(journal_path, header)
    except OSError as e:
        raise ConfigError(
            f"the journal {journal_path} cannot be written ({e.strerror}); name another with --journal. No board was changed"
        ) from e
    exits.callback(close_quietly, journal)
    path = setup.folder / STATUS_FILES.replace("*", slug(name))
    status = StatusFile(path, name, header, writer=setup.writer if writes else "")
    exits.callback(status.remove)
    watcher = setup.watch(name, header.boards)
    exits.callback(watcher.close)

    outlets = (
        journal_outlet(journal, setup.say),
        Outlet(f"the status file {status.path} cannot be written", status.write, status.remove, setup.say),
        Outlet("the metrics cannot be shown", watcher.observe, lambda: None, setup.say),
    )

    def sink(record: TickRecord) -> None:
        for outlet in outlets:
            outlet.take(record)

    return sink


def slug(name: str) -> str:
    """An engine's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "engine"


def indices_text(boards: Sequence[int]) -> str:
    """ "board 3", "boards 0-3" or "boards 0, 2, 5-7"."""
    return f"board{'s' if len(boards) != 1 else ''} {runs_text(boards)}"


def runs_text(boards: Sequence[int]) -> str:
    """ "3", "0-3" or "0, 2, 5-7"."""
    runs: list[list[int]] = []
    for i in sorted(boards):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
