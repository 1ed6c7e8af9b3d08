"""Who writes this agent's boards: capd where it may be asked, else this process, else nobody; never two at once.

Whatever `auto` does not choose is said once, with the reason. Where a capd holds the boards and will not have this
user, nobody else writes them either: two writers would fight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pals.core.errors import ConfigError, PalsError, PermissionDeniedError
from pals.hardware.capd_board import SHORTEST_TTL_S, CapdBoard
from pals.hardware.capd_budget import CapdBudget
from pals.hardware.capd_client import CapdClient, Hello, Reply, socket_path
from pals.hardware.nvml import Nvml
from pals.hardware.nvml_board import NvmlBoard
from pals.hardware.zeusd_board import NO_DEAD_MAN, Zeusd, zeusd_board, zeusd_path
from pals.runtime.agent import BudgetKeeper
from pals.runtime.config import Config, ControlConfig
from pals.runtime.modes import WRITING
from pals.runtime.tick import LEASE_PERIODS

ROOT_ONLY = "this process may not write power limits (needs root)"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """How boards are written; where `may_write` is not, `why_not` says why."""

    kind: str  # capd, direct, zeusd or none
    told: str  # who, and whether there is a dead-man
    why_not: str = ROOT_ONLY
    board: Callable[[NvmlBoard], NvmlBoard | CapdBoard] = lambda board: board
    budget_keeper: BudgetKeeper | None = None
    read_capd: Callable[[], Reply] | None = None  # for the metrics; to be called from one thread at a time

    @property
    def may_write(self) -> bool:
        """Whether anybody writes."""
        return self.kind != "none"


def may_mend(control: ControlConfig, *, emulated: bool) -> bool:
    """Whether this process could put back what a dead agent left, by itself or through zeusd."""
    return emulated or os.geteuid() == 0 or control.writer == "zeusd"


def will_write(config: Config, *, emulated: bool, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether an agent of this process would have power limits of some engine written, as far as is known before it starts."""
    modes = {c.control.mode or ("auto" if emulated else "advise") for c in (config, *config.engines.values())}
    if modes.isdisjoint(WRITING):
        return False
    writer = config.control.writer
    there = writer == "auto" and os.path.exists(socket_path(environ))
    return may_mend(config.control, emulated=emulated) or writer == "capd" or there


@contextmanager
def writing(
    control: ControlConfig,
    nvml: Nvml,
    boards: Sequence[NvmlBoard],
    *,
    bank: Path | None,
    say: Say,
    lease_s: float | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Iterator[Writer]:
    """Who writes these boards (those known at the start), as `control.writer` says; `lease_s` where it renews slowly.

    Raises:
        ConfigError: the writer asked for by name cannot be had; nothing was written.
    """
    client = CapdClient(socket_path(environ))
    try:
        if control.writer == "zeusd":
            yield _zeusd(boards, zeusd_path(environ), say)
        elif control.writer == "direct":
            yield _direct(nvml, client, boards, say)
        else:
            least_s = LEASE_PERIODS * control.period_s if lease_s is None else lease_s
            yield _capd_or_direct(control, nvml, client, boards, least_s=least_s, emulated=bank is not None, say=say)
    finally:
        client.close()


def _capd_or_direct(
    control: ControlConfig,
    nvml: Nvml,
    client: CapdClient,
    boards: Sequence[NvmlBoard],
    *,
    least_s: float,
    emulated: bool,
    say: Say,
) -> Writer:
    why, fights = _unusable(client, boards, control.period_s, emulated=emulated)
    if why is None:
        return _capd(client, max(SHORTEST_TTL_S, least_s), say)
    if control.writer == "capd":
        raise ConfigError(f"--writer capd: {why}. Nothing was written")
    if fights:
        told = f"{why}; capd may hold these boards, and two writers would fight"
        return Writer(kind="none", told="nobody", why_not=told)
    if not nvml.may_write:
        return Writer(kind="none", told="nobody", why_not=f"{ROOT_ONLY}, and {why}")
    say(
        f"boards are written by this process, without a dead-man: {why}. After a kill -9, `pals restore` puts them back"
    )
    return Writer(kind="direct", told="this process (no dead-man)")


def _unusable(
    client: CapdClient, boards: Sequence[NvmlBoard], period_s: float, *, emulated: bool
) -> tuple[str | None, bool]:
    """Why capd cannot write these boards (None: it can), and whether it may all the same be holding them."""
    if not os.path.exists(client.path):
        return f"there is no capd at {client.path}", False
    try:
        hello = client.say_hello()
    except PermissionDeniedError as e:  # a node's capd, which turns this user away, has no emulated boards
        return str(e), not emulated
    except (PalsError, ValueError) as e:
        return str(e), client.silent
    unknown = [b.info for b in boards if b.info.uuid not in hello.boards]
    if unknown:
        names = ", ".join(f"board {i.index} ({i.uuid})" for i in unknown)
        return f"capd at {client.path} does not know {names}", len(unknown) < len(boards)
    if not hello.may_set:
        told = f"capd at {client.path} lets user {os.geteuid()} only {hello.rights}: grant it `set` in its policy file"
        return told, True
    if hello.max_ttl_s < 2 * period_s:
        return (
            f"capd's longest lease, {hello.max_ttl_s:g} s, is shorter than two control periods of {period_s:g} s",
            True,
        )
    return None, False


def _capd(client: CapdClient, least_s: float, say: Say) -> Writer:
    hello: Hello = client.hello
    ttl_s = min(least_s, hello.max_ttl_s)
    dry = ", which runs dry: it writes nothing" if hello.dry_run else ""
    say(f"boards are written by capd at {client.path}{dry}; a lease that nobody renews ends after {ttl_s:g} s")
    watching = CapdClient(client.path, timeout_s=0.5)

    def read() -> Reply:
        try:
            return watching.read()
        finally:
            watching.close()

    return Writer(
        kind="capd",
        told=f"capd{' (dry run)' if hello.dry_run else ''} (dead-man: capd, {ttl_s:g} s)",
        board=lambda board: CapdBoard(board, client, ttl_s=ttl_s, reason=f"pals agent {os.getpid()}"),
        budget_keeper=CapdBudget(client, say),
        read_capd=read,
    )


def _direct(nvml: Nvml, client: CapdClient, boards: Sequence[NvmlBoard], say: Say) -> Writer:
    if not nvml.may_write:
        return Writer(kind="none", told="nobody")
    if os.path.exists(client.path):
        try:
            theirs = [b.info.index for b in boards if client.board(b.info.uuid) is not None]
        except (PalsError, ValueError):
            theirs = []
        if theirs:
            say(
                f"capd at {client.path} knows these boards too (--writer direct passes it by): it takes what this process writes for "
                "another hand's, and may write over it"
            )
    return Writer(kind="direct", told="this process (no dead-man)")


def _zeusd(boards: Sequence[NvmlBoard], path: Path, say: Say) -> Writer:
    zeusd = Zeusd(path)
    try:
        zeusd.check([b.info for b in boards])
    except PalsError as e:
        raise ConfigError(f"--writer zeusd: {e}") from e
    say(f"boards are written by zeusd at {path}. {NO_DEAD_MAN}")
    return Writer(kind="zeusd", told="zeusd (no dead-man)", board=lambda board: zeusd_board(board, zeusd))
