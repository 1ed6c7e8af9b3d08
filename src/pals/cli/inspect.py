"""`pals replay`, `pals status`, `pals restore`, `pals models` and `pals dashboard`: look, compare, mend."""

from __future__ import annotations

import argparse
import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any

from pals.cli.agent import living
from pals.cli.main import say
from pals.cli.mending import mend
from pals.cli.run_folder import agent_lives, boards_told, emulated_bank, put_back, read_status
from pals.control.guard import Guard
from pals.control.policies import build_policy
from pals.core.errors import ConfigError, EngineGoneError, PalsError
from pals.hardware.nvml import open_boards
from pals.hardware.zeusd_board import Zeusd, zeusd_path
from pals.models.profile import Profile
from pals.runtime.agent import FOUND_RECORD, STATUS_FILES
from pals.runtime.channel import run_dir
from pals.runtime.files import check_folder
from pals.runtime.found import left_by_dead_agent
from pals.runtime.group import unique_name
from pals.runtime.journal import read_journal
from pals.runtime.replay import replay as replay_records
from pals.views.status import EngineNow, print_status


def replay(args: argparse.Namespace) -> int:
    """Recompute every decision; 0 when all agree, 1 when one differs."""
    header, records = read_journal(Path(args.journal))
    profile = Profile.from_json(header.profile_json, name=args.journal) if header.profile_json else None
    guard = Guard.of(header.boards, header.engine.launch_sequences)
    try:
        policy = build_policy(
            header.policy, header.policy_settings, profile, guard, accepted=header.accepted_mismatch,
            interleaving=header.interleaving,
        )  # fmt: skip
    except TypeError as e:  # a setting this policy does not have
        raise ConfigError(f"{args.journal}, line 1: policy_settings do not fit {header.policy}: {e}") from e
    result = replay_records(policy, guard, records)
    for difference in result.differences[:5]:
        print(difference)
    print(f"{args.journal}: {result.same} of {result.total} decisions identical ({header.policy})")
    if result.total == 0:
        raise ConfigError(f"{args.journal} holds no decision")
    return 0 if result.same == result.total else 1


def status(args: argparse.Namespace) -> int:
    """Print engines, boards and the agent's newest records."""
    folder = run_dir(os.environ)
    bank = emulated_bank(folder)
    boards = []
    try:
        with open_boards(emulated=bank) as nvml:
            for why in nvml.failed.values():
                say(why)
            for board in nvml.boards:
                try:
                    boards.append((board.info, board.read()))
                except (PalsError, ValueError) as e:  # the others are shown all the same
                    say(str(e))
    except ConfigError as e:
        say(str(e))
    engines = engines_now(folder)
    if len({e.info.bank for e in engines}) > 1:
        say(f"engines on different boards run in {folder}; those shown are {boards_told(str(bank) if bank else None)}")
    print_status(
        folder, engines, boards, steered_now(folder), emulated=bank is not None, limited=limited(folder),
        died=died_now(folder),
    )  # fmt: skip
    return 0


def limited(folder: Path) -> int:
    """How many boards a killed agent left limited; none where the agent lives, or its record cannot be read."""
    with contextlib.suppress(ConfigError):
        return len(left_by_dead_agent(folder / FOUND_RECORD))
    return 0


def engines_now(folder: Path) -> list[EngineNow]:
    """The living engines with their counters, by their boards; one that ends meanwhile is left out."""
    groups = living(folder)
    found = []
    for group in groups:
        with contextlib.suppress(EngineGoneError):
            found.append(EngineNow(name=unique_name(group, groups), info=group.info, sample=group.read()))
    return sorted(found, key=lambda e: e.info.boards)


def steered_now(folder: Path) -> list[dict[str, Any]]:
    """What a living agent wrote of each engine last, by its boards; a file being replaced or removed is left out."""
    found = []
    for path in folder.glob(STATUS_FILES):
        told = read_status(path)
        if told is not None and "record" in told and agent_lives(told):
            found.append(told)
    return sorted(found, key=lambda s: [b["index"] for b in s["header"]["boards"]])


def died_now(folder: Path) -> dict[int, float]:
    """Agents that ended without removing what they told last: process id, and when they told it (Unix time)."""
    found: dict[int, float] = {}
    for path in folder.glob(STATUS_FILES):
        with contextlib.suppress(OSError):
            told, at_s = read_status(path), path.stat().st_mtime
            if told is not None and not agent_lives(told):
                found[told["agent_pid"]] = max(at_s, found.get(told["agent_pid"], 0.0))
    return found


def restore(args: argparse.Namespace) -> int:
    """Put boards back that a killed agent left limited."""
    folder = run_dir(os.environ)
    check_folder(folder)
    through = Zeusd(zeusd_path(os.environ)) if args.writer == "zeusd" else None
    if put_back(folder, partial(mend, setters=through)) == 0:
        say(f"nothing was put back: no board stands where a dead agent of {folder} left it")
    return 0


def models(args: argparse.Namespace) -> int:
    """List the models whose shapes are shipped."""
    from pals.engines.model_zoo import model_names

    for name in model_names():
        print(name)
    return 0


def dashboard(args: argparse.Namespace) -> int:
    """Print the Grafana dashboard."""
    from pals.views.grafana import dashboard_json

    print(dashboard_json(), end="")
    return 0
