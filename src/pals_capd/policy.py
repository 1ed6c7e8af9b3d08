"""The policy file: who may ask, what boards go back to, the node's budget; refused where others may write it."""

from __future__ import annotations

import difflib
import math
import os
import pwd
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pals_capd.refused import ConfigError

RIGHTS = ("none", "read", "set", "admin")  # each may do what those before it may
EXITS = ("restore", "safe", "hold")
OTHER_HANDS = ("yield", "reassert", "fail")
LARGEST_BYTES = 1 << 20
LONGEST_TTL_S, SHORTEST_TTL_S = 600.0, 0.1
EXAMPLE = """\
# Who may do what: user name or uid = "read" | "set" | "admin". Root is always admin.
[rights]
pals = "set"

[node]
# budget_w = 2400            # watts all boards may be limited to together, always
# exit = "restore"           # where a lease ends: restore | safe | hold (default: safe under a budget, else restore)
# safe_w = 300               # for exit = "safe" (default: the board's fair part of the budget)
# sm_clock_mhz = [210, 1410] # clock lock to leave on exit (default: none)
# other_hand = "yield"       # somebody else sets a limit: yield | reassert | fail
# ttl_s = 3.0                # a lease lives so long unless it is renewed
# max_ttl_s = 60.0           # the longest lease that may be asked for

# [board."GPU-6e2b1c0a-…"]   # one board: exit, safe_w, sm_clock_mhz as above; steer = false leaves it alone
# steer = false
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """What one board goes to when nobody leases it."""

    exit: str | None = None  # None: `safe` under a budget, else `restore`
    safe_w: float | None = None  # None: the board's fair part of the budget
    sm_clock_mhz: tuple[int, int] | None = None  # None: no lock
    steer: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Everything the operator decides."""

    rights: Mapping[int, str] = field(default_factory=dict)  # by uid
    budget_w: float | None = None
    other_hand: str = "yield"
    ttl_s: float = 3.0
    max_ttl_s: float = 60.0
    node: Exit = field(default_factory=Exit)
    boards: Mapping[str, Exit] = field(default_factory=dict)  # by UUID, where they differ

    def may(self, uid: int, right: str) -> bool:
        """Whether this user has at least that right."""
        held = "admin" if uid in (0, os.geteuid()) else self.rights.get(uid, "none")
        return RIGHTS.index(held) >= RIGHTS.index(right)

    def exit_of(self, uuid: str) -> Exit:
        """The exit policy of one board."""
        return self.boards.get(uuid, self.node)


def load_policy(path: Path) -> Policy:
    """The policy in `path`; where there is no such file, the default: root alone may ask.

    Raises:
        ConfigError: others may write it, or it cannot be understood.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as f:
            _refuse_foreign(path, os.fstat(f.fileno()))
            _refuse_foreign(path.parent, os.stat(path.parent))
            if len(text := f.read(LARGEST_BYTES + 1)) > LARGEST_BYTES:
                raise ConfigError(f"the policy file {path} is longer than {LARGEST_BYTES} bytes; nothing was changed")
            return parse_policy(text.decode(), str(path))
    except FileNotFoundError:
        return Policy()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"the policy file {path} cannot be read ({e}); nothing was changed") from e


def _refuse_foreign(path: Path, facts: os.stat_result) -> None:
    shared = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not facts.st_mode & stat.S_ISVTX
    if facts.st_uid not in (0, os.geteuid()) or shared:
        raise ConfigError(
            f"{path} may be written by others (owner {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):o}): whoever writes it "
            f"would hold root on the boards. chown root {path} and chmod go-w {path}; nothing was changed"
        )


def parse_policy(text: str, source: str) -> Policy:
    """Read TOML strictly.

    Raises:
        ConfigError: no TOML, an unknown key, a value of a wrong type or out of range.
    """
    try:
        return _policy_of(tomllib.loads(text), source)
    except (ValueError, OverflowError, RecursionError) as e:  # also numbers and tables that are too large to be told
        raise ConfigError(f"{source}: {e}; nothing was changed") from e


def _policy_of(data: Mapping[str, Any], source: str) -> Policy:
    _known(data, ("rights", "node", "board"), source)
    rights, node, boards = (_table(data, name, source) for name in ("rights", "node", "board"))
    _known(node, ("budget_w", "exit", "safe_w", "sm_clock_mhz", "other_hand", "ttl_s", "max_ttl_s"), f"{source} [node]")
    for_all = {k: v for k, v in node.items() if k in ("exit", "safe_w", "sm_clock_mhz")}
    _refuse_unsafe(for_all, boards, "budget_w" in node, source)
    max_ttl_s = _number(node, "max_ttl_s", source, SHORTEST_TTL_S, LONGEST_TTL_S, 60.0)
    return Policy(
        rights={_uid(who, source): _choice(right, RIGHTS, f"{source} [rights] {who}") for who, right in rights.items()},
        budget_w=_number(node, "budget_w", source, 1.0, 1e7, None) if "budget_w" in node else None,
        other_hand=_choice(node.get("other_hand", "yield"), OTHER_HANDS, f"{source} [node] other_hand"),
        ttl_s=_number(node, "ttl_s", source, SHORTEST_TTL_S, max_ttl_s, min(3.0, max_ttl_s)),
        max_ttl_s=max_ttl_s,
        node=_exit(for_all, f"{source} [node]"),
        boards={u: _exit({**for_all, **_table(boards, u, source)}, f"{source} [board.{u!r}]") for u in boards},
    )


def _refuse_unsafe(for_all: Mapping[str, Any], boards: Mapping[str, Any], budget: bool, source: str) -> None:
    for table in (for_all, *({**for_all, **_table(boards, u, source)} for u in boards)):
        if table.get("exit") == "safe" and "safe_w" not in table and not budget:
            raise ConfigError(
                f'{source}: exit = "safe" needs safe_w, or a budget_w to be a part of; nothing was changed'
            )


def _exit(values: Mapping[str, Any], where: str) -> Exit:
    _known(values, ("exit", "safe_w", "sm_clock_mhz", "steer"), where)
    chosen, steer, clocks = values.get("exit"), values.get("steer", True), values.get("sm_clock_mhz")
    if not isinstance(steer, bool):
        raise ConfigError(f"{where}: steer must be true or false, not {steer!r}; nothing was changed")
    if clocks is not None and not is_clock_range(clocks):
        raise ConfigError(
            f"{where}: sm_clock_mhz must be [lowest, highest] in MHz, not {clocks!r}; nothing was changed"
        )
    return Exit(
        exit=None if chosen is None else _choice(chosen, EXITS, f"{where} exit"),
        safe_w=_number(values, "safe_w", where, 1.0, 1e5, None) if "safe_w" in values else None,
        sm_clock_mhz=None if clocks is None else (clocks[0], clocks[1]),
        steer=steer,
    )


def is_clock_range(value: object) -> bool:
    """Whether it is [lowest, highest] in whole MHz."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 < v < 100_000 for v in value)
        and value[0] <= value[1]
    )


def _uid(who: str, source: str) -> int:
    if who.isascii() and who.isdigit() and len(who) <= 10:
        return int(who)
    try:
        return pwd.getpwnam(who).pw_uid
    except (KeyError, ValueError) as e:
        raise ConfigError(f"{source} [rights]: there is no user {who!r} on this node; nothing was changed") from e


def _known(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
            raise ConfigError(f"{where}: unknown key {key!r}; {hint} Nothing was changed")


def _table(data: Mapping[str, Any], name: str, source: str) -> Mapping[str, Any]:
    table = data.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{source}: {name} must be a table, not {table!r}; nothing was changed")
    return table


def _choice(value: object, known: tuple[str, ...], where: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{where}: {value!r} is none of {', '.join(known)}; nothing was changed")
    return value


def _number(values: Mapping[str, Any], key: str, where: str, low: float, high: float, default: float | None) -> Any:
    value = values.get(key, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise ConfigError(f"{where}: {key} = {value!r} must be a number in {low:g}..{high:g}; nothing was changed")
    return float(value)
