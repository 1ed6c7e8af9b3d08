"""Whether a request may come in: as many wait as may, counting those let in that the engine has not told of yet.

Where there is no channel, no agent or no fresh bound, everybody may. Of several API servers each knows only whom it let in
itself, and takes the others to have let in as many.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from pals.core.admission import queue_full
from pals.core.quantities import EngineSample
from pals.runtime.channel import AgentChannel, Setpoint, open_channels, run_dir
from pals.runtime.group import EngineGroup, parent_of

ON_THE_WAY_S = 2.0  # a request let in is taken to have reached the engine, or to have failed, after this long
SILENT_S = 5.0  # telemetry older than this is of an engine without work: its queue was emptied by aborts, unseen
LEFT_STEPS = (
    3.0  # who has waited for so many steps was left waiting by one: a new one is seen by the second at the latest
)
RATE_S = 5.0  # span over which the rate of finished requests is taken, at least
MOST_RETRY_S = 60


class QueueNow(Protocol):
    """What is known of an engine's queue; `EngineGroup`."""

    @property
    def api_servers(self) -> int:
        """How many let requests in."""
        ...

    def setpoint(self, now_s: float) -> Setpoint | None:
        """What the agent wants, the bound on the queue with it; None: nothing, or no more."""
        ...

    def last(self) -> EngineSample:
        """What the engine published last."""
        ...


class Count(Protocol):
    """Where refusals are counted; `RefusalCounter`."""

    def add(self) -> None:
        """One more request was refused."""
        ...


class Verdict(NamedTuple):
    """On one request."""

    ticket: int | None = None  # of a request let in: names it if it fails on the way
    retry_after_s: int | None = None  # it is refused; None: let in


LET_IN = Verdict()


class Admission:
    """Judges the requests of one API server, and counts those it refuses."""

    def __init__(self, queue: QueueNow, counter: Count, now_s: Callable[[], float]) -> None:
        self._queue, self._counter, self._now_s = queue, counter, now_s
        self._on_the_way: dict[int, float] = {}  # tickets, oldest first, with the times they were given out
        self._tickets = 0
        self._taken: dict[int, float] = {}  # tickets that an arrival was put down to, of the last seconds
        self._arrived = 0
        self._told = 0.0  # part of an arrival told of that is this server's
        self._pace = _Pace()

    def ask(self) -> Verdict:
        """Judge a request that has come now."""
        now_s = self._now_s()
        engine, servers = self._queue.last(), max(1, self._queue.api_servers)
        self._settle(engine.arrived_requests, servers, now_s)
        wanted = self._queue.setpoint(now_s)
        if wanted is None or wanted.most_waiting is None:
            return self._let_in(now_s)
        self._pace.observe(now_s, engine.finished_requests)
        silent = now_s - engine.time_s > SILENT_S
        running, queued = (0, 0) if silent else (engine.running, engine.waiting)
        waiting = queued + servers * len(self._on_the_way)
        left_waiting = queued > 0 and engine.oldest_waiting_s > LEFT_STEPS * engine.last_step_s
        if queue_full(wanted.most_waiting, waiting, wanted.active_sequences - running, left_waiting):
            self._counter.add()
            return Verdict(retry_after_s=self._pace.seconds_for(waiting))
        return self._let_in(now_s)

    def failed(self, ticket: int) -> None:
        """The request with this ticket was turned down before it reached the engine, which will never tell of it.

        Nobody needs to say that a request was answered: the engine has told of its arrival before, and that arrival may have
        been put down to an older ticket, whose own is still to come.
        """
        if (
            self._on_the_way.pop(ticket, None) is None
            and self._taken.pop(ticket, None) is not None
            and self._on_the_way
        ):
            del self._on_the_way[
                next(iter(self._on_the_way))
            ]  # the arrival put down to it was that of one still counted

    def _let_in(self, now_s: float) -> Verdict:
        """Count a request as on the way, also while any number may wait: a bound may come before it has arrived."""
        self._tickets += 1
        self._on_the_way[self._tickets] = now_s
        return Verdict(ticket=self._tickets)

    def _settle(self, arrived: int, servers: int, now_s: float) -> None:
        """Forget as many of those on the way, the oldest, as have arrived since the last look, this server's share of them."""
        self._told += (arrived - self._arrived) / servers
        self._arrived = arrived
        for ticket, since_s in list(self._on_the_way.items()):
            if self._told < 1 and now_s - since_s < ON_THE_WAY_S:
                break
            del self._on_the_way[ticket]
            if self._told >= 1:
                self._taken[ticket] = since_s
            self._told = max(0.0, self._told - 1)
        if not self._on_the_way:
            self._told = 0.0
        while self._taken and now_s - self._taken[oldest := next(iter(self._taken))] >= ON_THE_WAY_S:
            del self._taken[oldest]


class _Pace:
    """How fast requests finish, over the last five to ten seconds in which somebody asked."""

    def __init__(self) -> None:
        self._before: tuple[float, int] | None = None
        self._newer: tuple[float, int] | None = None
        self._now: tuple[float, int] = (0.0, 0)

    def observe(self, now_s: float, finished: int) -> None:
        """Take the counter as it is now."""
        self._now = (now_s, finished)
        if self._newer is None or now_s - self._newer[0] > RATE_S:
            self._before, self._newer = self._newer or self._now, self._now

    def seconds_for(self, waiting: int) -> int:
        """Until so many have finished at this rate: whole seconds, 1..60; 1 before a rate is known."""
        since_s, since = self._before or self._now
        passed_s, finished = self._now[0] - since_s, self._now[1] - since
        if passed_s < 1.0:
            return 1
        if finished <= 0:
            return MOST_RETRY_S
        return max(1, min(MOST_RETRY_S, math.ceil(waiting * passed_s / finished)))


def admission_of(group: EngineGroup, now_s: Callable[[], float]) -> Admission:
    """What judges the requests of this engine, all its ranks; counted at the first of them, offered at each.

    Raises:
        OSError: a channel is gone, or has no slot left.
    """
    counters = [rank.refusals.claim(rank.path) for rank in group.ranks]
    return Admission(group, counters[0], now_s)


def own_engine(environ: Mapping[str, str]) -> EngineGroup | None:
    """The engine that this API server serves, all its ranks: its children, or its siblings where there are several servers.

    None: no channel of it is there.
    """
    living = [c for c in open_channels(run_dir(dict(environ))) if c.alive()]
    for parent in (os.getpid(), os.getppid()):
        mine: list[AgentChannel] = [c for c in living if parent_of(c.info.pid) == parent or c.info.pid == os.getpid()]
        if mine:
            return EngineGroup(mine)
    return None
