"""The agent: every engine of this node, one budget, one grid; engines come and go while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pals.core.errors import ConfigError, EngineGoneError, NotPutBackError, PalsError
from pals.core.quantities import Budget
from pals.runtime.agent import EXIT_ENGINE_GONE, AgentSetup, Session, open_session, slug
from pals.runtime.group import EngineGroup, refuse_shared_boards, unique_name
from pals.runtime.live_budget import LiveBudget
from pals.runtime.loop import GridClock, on_grid
from pals.runtime.sharing import lowering_first, share_now

LOOK_EVERY_S = 2.0  # for engines that have come


def control_engines(setup: AgentSetup, clock: GridClock) -> int:
    """Steer every engine that `setup.find` finds until the clock says stop; 0 then, 3 when the last one has ended.

    Raises:
        ConfigError: bad settings or profile, shared boards, or no engine at the start; nothing was written.
        NotPutBackError: it has ended, and some boards could not be put back.
    """
    node = Node(setup, clock)
    with node.open_at_start():
        code = _steer(node, setup, clock)
    if setup.budget_keeper is not None:  # an agent that fails, or leaves boards behind, leaves its budget in force
        setup.budget_keeper.end()
    return code


def _steer(node: Node, setup: AgentSetup, clock: GridClock) -> int:
    try:
        on_grid(clock, setup.config.control.period_s, node.step)
    except EngineGoneError as e:
        if clock.wait(0.0):  # told to stop just now: the engine ends because we all do
            return 0
        setup.say(str(e))
        return EXIT_ENGINE_GONE
    return 0


def refuse_existing(journal: Path) -> None:
    """Raise `ConfigError` where a journal was written already: it may be the only record of what happened."""
    if journal.is_dir():
        raise ConfigError(f"the journal {journal} is a folder; name a file. No board was changed")
    if journal.is_file() and journal.stat().st_size:
        raise ConfigError(f"the journal {journal} exists; choose another, or remove it. No board was changed")


class Node:
    """The engines that are steered now."""

    def __init__(self, setup: AgentSetup, clock: GridClock) -> None:
        self.sessions: list[Session] = []
        self._setup, self._clock = setup, clock
        self._budgets = setup.budgets or LiveBudget(setup.config.budget, now_s=clock.now_s, say=setup.say)
        self._refused: set[frozenset[int]] = set()
        self._seen: set[frozenset[int]] = set()
        self._journals: set[Path] = set()
        self._looked_at_s = 0.0
        self._left: list[NotPutBackError] = []

    @contextmanager
    def open_at_start(self) -> Iterator[None]:
        """Open the engines found; whatever happens inside, every engine's boards are put back at the end."""
        with ExitStack() as exits:
            exits.callback(self._close_all)
            exits.callback(self._promise_nothing)  # before the boards are put back
            groups = list(self._setup.find())
            refuse_shared_boards(groups)
            for group in groups:
                self._open_at_start(group, groups)
            if not self.sessions:
                raise ConfigError("no running engine to steer. Nothing was written")
            self._promise()
            yield

    def _promise(self) -> None:
        """Say which budget the engines steered now can keep."""
        self._budgets.least_w = sum(s.rig.guard.least_budget_w for s in self.sessions)

    def _promise_nothing(self) -> None:
        self._budgets.least_w = None

    def _open_at_start(self, group: EngineGroup, groups: Sequence[EngineGroup]) -> None:
        """A board that cannot be opened keeps its own engine from being steered, and no other."""
        try:
            self._open(group, groups)
        except ConfigError:
            raise
        except (PalsError, ValueError) as e:
            self._refuse(group, e)

    def _refuse(self, group: EngineGroup, why: Exception) -> None:
        self._refused.add(group.pids)
        self._setup.say(f"{group.told()} is not steered: {why}")

    def step(self, elapsed_s: float) -> None:
        """One slot of the grid: look for engines now and then, then tick each.

        Raises:
            EngineGoneError: the last engine has ended.
        """
        if elapsed_s - self._looked_at_s >= LOOK_EVERY_S:
            self._looked_at_s = elapsed_s
            self._look()
        self._promise()
        budget = self._budgets.at(elapsed_s)
        self._hand_on(budget)
        for session, target_w in lowering_first(self.sessions, budget, self._clock.now_s()):
            self._tick(session, budget, target_w)

    def _hand_on(self, budget: Budget) -> None:
        """Have the boards that are written held to the budget too, less what those of engines that only get advice may draw."""
        keeper = self._setup.budget_keeper
        if keeper is None:
            return
        beside_w = sum(s.limits_w for s in self.sessions if not s.acts)
        watts = None if budget.power_w is None else max(1.0, budget.power_w - beside_w)
        keeper.keep(watts, [m.info.uuid for s in self.sessions if s.acts for m in s.rig.meters])

    def _tick(self, session: Session, budget: Budget, target_w: float) -> None:
        now_s = self._clock.now_s()
        share = share_now(session, self.sessions, target_w, budget, now_s)
        try:
            session.tick(share, now_s)
        except EngineGoneError as e:
            told = "put back as found" if self._close(session) else "not all put back (run `pals restore`)"
            if not self.sessions:
                raise EngineGoneError(f"{e}; the boards are {told} and the agent stops") from e
            self._setup.say(f"{e}; its boards are {told}, {len(self.sessions)} more are steered on")

    def _look(self) -> None:
        """Take up engines that have come; a group that has grown by a rank is taken up anew.

        The ranks of a data-parallel engine come one by one: it is taken up when two looks in a row saw the same ones.
        """
        groups = list(self._setup.find())
        known = self._refused | {s.group.pids for s in self.sessions}
        seen, self._seen = self._seen, {g.pids for g in groups}
        for group in groups:
            if group.pids in known or (group.info.data_parallel and group.pids not in seen):
                continue
            for grown in [s for s in self.sessions if s.group.pids < group.pids]:
                self._close(grown)
            try:
                refuse_shared_boards([group, *(s.group for s in self.sessions)])
                self._open(group, groups)
            except (PalsError, ValueError) as e:
                self._refuse(group, e)

    def _open(self, group: EngineGroup, groups: Sequence[EngineGroup]) -> None:
        name = unique_name(group, groups)
        self.sessions.append(open_session(self._setup, group, name, self._journal(name, alone=len(groups) == 1)))

    def _journal(self, name: str, *, alone: bool) -> Path:
        """The file asked for, with the engine's name in it where there are several; never one that was written already."""
        setup = self._setup
        if given := setup.config.output.journal:
            path = Path(given)
            path = path if alone else path.with_stem(f"{path.stem}-{slug(name)}")
            if path not in self._journals:
                refuse_existing(path)
        else:
            path = (setup.journals or setup.folder) / f"journal-{slug(name)}-{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"
        first, n = path, 1
        while path in self._journals or (n > 1 and path.is_file()):
            n += 1
            path = first.with_stem(f"{first.stem}-{n}")
        self._journals.add(path)
        return path

    def _close(self, session: Session) -> bool:
        """End steering an engine; whether all its boards were put back. What was not is told in full at the end."""
        self.sessions.remove(session)
        self._refused.clear()  # what stood in the way may be gone
        try:
            session.close()
        except NotPutBackError as e:  # the other engines are steered on
            self._left.append(e)
            return False
        return True

    def _close_all(self) -> None:
        with ExitStack() as exits:  # one that fails to close keeps none of the others from closing
            for session in [*self.sessions]:
                exits.callback(self._close, session)
        if self._left:
            raise NotPutBackError("; ".join(map(str, self._left)))
